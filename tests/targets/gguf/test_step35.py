# SPDX-License-Identifier: Apache-2.0
"""Qwen3 as llama.cpp's step35: both sets of any recipe, in real llama.cpp; every mistake is caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import recipe_for
from support.gguf_files import WIDE, changed
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import UnsupportedError, UsageError
from lrconvert.parity import Options
from lrconvert.parity.mutants import RECIPE_MUTANTS, unpermuted_qk
from lrconvert.recipe import Recipe
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.llama_cpp import WORKER
from lrconvert.targets import gguf

pytestmark = pytest.mark.usefixtures("remembered")

WINDOW = 256
FAR = 100
Pico = Callable[..., Model]


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    interpreter = Interpreter(WORKER)
    yield Options(threads=1, interpreter=interpreter)
    interpreter.close()


def baked(model: Model, recipe: Recipe, output: Path, **options: Any) -> Path:
    bake(gguf.plan(model, recipe, output, gguf.Options(**{"type": "f32", "architecture": "step35", **options})))
    return output


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_both_sets_are_right(pico: Pico, tmp_path: Path, tied: bool, kind: str, options: Options) -> None:
    model = pico("qwen3", max_position_embeddings=WINDOW, tie_word_embeddings=tied)
    report = verify(baked(model, recipe_for(model, even=True), tmp_path / "m.gguf", type=kind), options=options)
    assert report.passed, report.summary
    assert report.losses == []
    passed = {row.case for row in report.rows if row.code == "llama.cpp" and row.verdict == "pass"}
    assert {"at 256", "one past 256", "far end", "decode across 256", "short prompt, long context"} <= passed


MUTANTS = [name for name in RECIPE_MUTANTS if name not in ("no start tokens", "boundary one late")]


@pytest.mark.parametrize("mutant", [*MUTANTS, "unpermuted"])
def test_every_mutant_is_caught(pico: Pico, tmp_path: Path, mutant: str, options: Options) -> None:
    model = pico("qwen3", max_position_embeddings=WINDOW)
    right = recipe_for(model, even=True)
    wrong = right if mutant == "unpermuted" else RECIPE_MUTANTS[mutant](right)
    assert wrong is not None
    artifact = baked(unpermuted_qk(model) if mutant == "unpermuted" else model, wrong, tmp_path / "m.gguf")
    report = verify(artifact, against=model.reference, recipe=right, options=options)
    if mutant == "unpermuted":
        assert "weights" in {row.code for row in report.failed}
        return
    caught = [row for row in report.failed if row.code == "llama.cpp"]
    assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


def test_the_file_is_a_qwen3_again(pico: Pico, tmp_path: Path, options: Options) -> None:
    """Without the empty layer, with the rotated width of its heads. In K types too, and baked once more."""
    model = pico("qwen3", max_position_embeddings=WINDOW, tie_word_embeddings=True, **WIDE)
    recipe = recipe_for(model, even=True)
    again = open_model(baked(model, recipe, tmp_path / "m.gguf", type="q4_k_m"))
    report = verify(baked(again, recipe, tmp_path / "n.gguf", type=None), options=options)
    assert report.passed, report.summary
    assert again.family.name == "qwen3"
    assert (again.shape.layers, again.shape.rotary_dim) == (model.shape.layers, model.shape.rotary_dim)
    assert [tier.max_length for tier in again.rotation.tiers] == [WINDOW, 2 * WINDOW]


def test_a_step35_of_another_program_is_refused(pico: Pico, tmp_path: Path) -> None:
    """Its last layer is one of the model, and would be left out."""
    model = pico("qwen3", max_position_embeddings=WINDOW)
    ours = baked(model, recipe_for(model, even=True), tmp_path / "m.gguf")
    other = changed(ours, tmp_path / "other.gguf", lambda metadata, tensors: metadata.pop("lrconvert.family"))
    with pytest.raises(UnsupportedError, match="a step35 of another program"):
        open_model(other)


def test_a_folded_factor_is_right_and_no_shift_is_asked_for(pico: Pico, tmp_path: Path, options: Options) -> None:
    """llama.cpp can't shift a context of this architecture: no failure of the file."""
    model = pico("qwen3", max_position_embeddings=WINDOW)
    report = verify(baked(model, recipe_for(model, even=True), tmp_path / "m.gguf", fold=True), options=options)
    assert report.passed, report.summary
    assert "after a context shift" not in {row.case for row in report.rows}


def test_it_has_to_be_asked_for(pico: Pico, tmp_path: Path) -> None:
    """The refusal names it; no other family has it."""
    model = pico("qwen3", max_position_embeddings=WINDOW)
    with pytest.raises(UnsupportedError, match="ignores rope factors for qwen3") as refused:
        baked(model, recipe_for(model, even=True), tmp_path / "m.gguf", architecture=None)
    assert "--architecture step35 takes any two sets" in str(refused.value)
    llama = pico("llama", max_position_embeddings=WINDOW)
    with pytest.raises(UsageError, match="--architecture step35: llama can't be written as it"):
        baked(llama, recipe_for(llama, even=True), tmp_path / "m.gguf")
