# SPDX-License-Identifier: Apache-2.0
"""`lrconvert eval ruler` on the embedded model, in three runtimes: what it writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import open_model
from lrconvert.recipe import derive_recipe
from lrconvert.targets import gguf, onnx

Run = Callable[..., Result]
ASKED = ("--tasks", "fwe,vt", "--lengths", "1500,1200", "--samples", 2, "--threads", 1)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model as a GGUF and as an ONNX folder."""
    model, folder = open_model("demo"), tmp_path_factory.mktemp("ruler")
    recipe = derive_recipe("yarn", 2, family="llama", rotary_dim=64, theta=1e4, original_window=4096, uniform=True)
    bake_plan(gguf.plan(model, recipe, folder / "demo.gguf", gguf.Options(type="f32")))
    bake_plan(onnx.plan(model, recipe, folder / "demo-onnx", onnx.Options()))
    return {"llama.cpp": folder / "demo.gguf", "onnxruntime": folder / "demo-onnx"}


def test_every_runtime_answers_the_same_prompts(cli: Run, artifacts: dict[str, Path], tmp_path: Path) -> None:
    """JSON and picture say how they came to be; the prompts, and what was cut of them, are the same in all."""
    pytest.importorskip("wonderwords", reason="the extra eval brings wonderwords")
    kept = {}
    for name, subject in ({"transformers": "demo"} | {name: str(path) for name, path in artifacts.items()}).items():
        result = cli("eval", "ruler", subject, *ASKED, "-o", tmp_path / name)
        assert result.code == 0 and "score (95 %)" in result.out, result.err
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        kept[name] = json.loads((tmp_path / f"{name}.json").read_text())
    told = kept["transformers"]
    assert (told["evaluation"], told["seed"], told["artifact"]) == ("ruler", 0, "demo")
    assert "2 samples of each task and length" in told["protocol"] and told["lm_eval"] in told["protocol"]
    places = [(row["task"], row["length"], row["samples"]) for row in told["rows"]]
    assert places == [("fwe", 1200, 2), ("vt", 1200, 2), ("fwe", 1500, 2), ("vt", 1500, 2)]
    for row in told["rows"]:
        assert 0 <= row["score"]["low"] <= row["score"]["value"] <= row["score"]["high"] <= 1
        assert len(row["scores"].split()) == 2 and row["truncated"] == 0
        assert row["length"] / 2 < row["prompt_tokens"] <= row["length"]
    for other in (kept["llama.cpp"], kept["onnxruntime"]):
        for key in ("task", "length", "prompt_tokens", "prompts_sha256"):
            assert [row[key] for row in other["rows"]] == [row[key] for row in told["rows"]], key


def test_bad_input(cli: Run, artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one line, before a model is loaded."""
    pytest.importorskip("wonderwords", reason="the extra eval brings wonderwords")
    for given, code, words in (
        (("demo", "--lengths", "700", "--tasks", "vt"), 2, "vt needs at least"),
        (("demo", "--lengths", "2k", "--tasks", "vt,vt"), 2, "distinct names"),
        (("demo", "--lengths", "2k", "--tasks", "passkey"), 2, "RULER has no such task"),
        (("demo", "--lengths", "2k", "--tasks", "vt", "--samples", 1), 2, "--samples"),
        (("demo", "--lengths", "2k", "--tasks", "vt", "--samples", 501), 2, "--samples"),
        (("demo", "--lengths", "2k", "--tasks", "vt", "--code", "reference"), 4, "does not generate text"),
        ((artifacts["llama.cpp"], "--lengths", "2k,9000", "--tasks", "vt"), 2, "serves 8192 tokens"),
        (("nowhere", "--lengths", "2k"), 3, "nowhere"),
        (("demo",), 2, "Missing option '--lengths'"),
    ):
        said = cli("eval", "ruler", *given)
        assert said.code == code and words in said.err and said.err.strip().count("\n") <= 2, said.err
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    said = cli("eval", "ruler", "demo", "--lengths", "2k", "--tasks", "vt")
    assert said.code == 6 and "pip install 'lrconvert[eval]'" in said.err


def test_the_picture_has_a_line_for_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wonderwords", reason="the extra eval brings wonderwords")
    from matplotlib.figure import Figure as Picture
    from matplotlib.text import Text

    from lrconvert.evals.figures import share_figure
    from lrconvert.evals.plotting import plot_ruler
    from lrconvert.evals.ruler import RulerRow

    found: list[str] = []
    monkeypatch.setattr(
        Picture, "savefig", lambda self, path, **_: found.append(" ".join(t.get_text() for t in self.findobj(Text)))
    )
    rows = [
        RulerRow(task, length, share_figure(1.5, 3), (1.0, 0.5, 0.0), 9, 0, "")
        for task in ("vt", "cwe")
        for length in (4096, 8192)
    ]
    plot_ruler(rows, tmp_path / "r.png", title="demo: seed 7", protocol="some protocol")
    assert all(
        words in found[0] for words in ("demo: seed 7\nsome protocol", "vt", "cwe", "4,096", "8,192", "3 samples")
    )
