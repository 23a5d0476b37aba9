# SPDX-License-Identifier: Apache-2.0
"""benchmarks/profiles.py: shares of the CPU's time, and the picture that docs/performance.md shows."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import profiles
import pytest

SVG = "{http://www.w3.org/2000/svg}"


def test_shares_are_of_one_and_small_ones_are_together() -> None:
    found = profiles.shares({"sha256": 60.0, "Python": 38.5, "NumPy": 1.0, profiles.OTHER: 0.5})
    assert found == {"sha256": 0.6, "Python": 0.385, profiles.OTHER: pytest.approx(0.015)}
    assert list(found)[-1] == profiles.OTHER


def test_operators_of_a_token_are_together_by_what_they_do() -> None:
    found = profiles.by_purpose({"MatMulNBits": 0.7, "SkipSimplifiedLayerNormalization": 0.1, "RMSNormalization": 0.1,
                                 "Split": 0.015, "Sin": 0.085})  # fmt: skip
    assert found == {"quantised products": 0.7, "norms": 0.2, profiles.OTHER: pytest.approx(0.1)}


def test_operators_are_counted_in_a_layer_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What two and three layers run differs by a layer."""

    def kernels(
        scratch: Path, layers: int, runs: int, genai: Path | None
    ) -> dict[str, dict[tuple[str, str], list[float]]]:
        nodes = [("gather", "Gather"), *((f"{layer}/{n}", "MatMulNBits") for layer in range(layers) for n in range(5))]
        return {"lrconvert": {node: [1.0] for node in nodes}}

    monkeypatch.setattr(profiles, "kernels", kernels)
    assert profiles.operators(tmp_path, None) == {
        "lrconvert": {"a layer": 5, "once": 1, "of a layer": {"MatMulNBits": 5}}
    }


def test_the_picture_has_a_bar_for_every_part() -> None:
    paths = {"a & b": {"sha256": 0.75, profiles.OTHER: 0.25}, "c": {"Python": 0.9, profiles.OTHER: 0.1}}
    root = ElementTree.fromstring(profiles.drawn(paths))
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]
    assert len(bars) == 4
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths[0] == pytest.approx(3 * widths[1])
    assert sum(widths[:2]) == pytest.approx(sum(widths[2:]))
    assert "a & b" in [text.text for text in root.iter(f"{SVG}text")]


def test_the_picture_is_that_of_the_last_result() -> None:
    """Otherwise: python benchmarks/profiles.py --draw."""
    saved = json.loads((profiles.RESULTS / f"{profiles.NAME}.json").read_text())
    assert profiles.PICTURE.read_text(encoding="utf-8") == profiles.drawn(saved["paths"])
