# SPDX-License-Identifier: Apache-2.0
"""A quantised source is named: in the output, in the manifest and on the card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

import lrconvert
from lrconvert.artifact.manifest import Manifest

SAID = "weights dequantised from "


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lrconvert.gguf("demo", None, tmp_path_factory.mktemp("gguf") / "demo.gguf", type="q4_1").path


@pytest.mark.parametrize(
    ("target", "name", "options", "written"),
    [
        ("hf", "out", (), "bf16"),
        ("hf", "out", ("--dtype", "float16"), "f16"),
        ("onnx", "out", ("--dtype", "f32"), "f32"),
        ("gguf", "out.gguf", ("--type", "bfloat16"), "bf16"),
    ],
)
def test_every_format_says_what_it_was(
    quantised: Path, target: str, name: str, options: tuple[str, ...], written: str, tmp_path: Path,
    cli: Callable[..., Result],
) -> None:  # fmt: skip
    if target == "onnx":
        pytest.importorskip("onnx")
    found = cli(target, quantised, "-o", tmp_path / name, *options)
    note = f"{SAID}Q4_1, Q6_K, written as {written}"
    assert found.code == 0 and note in found.err, found.err
    assert note in Manifest.read(tmp_path / name).notes
    if target != "gguf":
        assert f"- {note}." in (tmp_path / name / "README.md").read_text()


def test_what_stays_as_it_is_says_nothing(quantised: Path, tmp_path: Path) -> None:
    """A GGUF that keeps its bytes, and a source of floats that becomes others."""
    again = lrconvert.gguf(quantised, None, tmp_path / "again.gguf")
    plain = lrconvert.hf("demo", None, tmp_path / "plain", dtype="f16")
    for artifact in (again, plain):
        assert not any(SAID in note for note in artifact.manifest.notes)
