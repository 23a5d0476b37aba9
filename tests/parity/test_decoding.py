# SPDX-License-Identifier: Apache-2.0
"""Decoding across a boundary far out: from a short prompt before it, where code can be asked that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import own_name, recipe_for
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model
from lrconvert.engines.capability import CUSTOM_HF, LLAMA_CPP, ONNX, Capability
from lrconvert.parity import Options, Report, Row
from lrconvert.parity.cases import CPU, SPREAD_TOKENS, Budget, Case, build_cases
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.parity.options import UNLIMITED
from lrconvert.recipe import Recipe, load_recipe
from lrconvert.runtimes import llama_cpp, onnxruntime, transformers
from lrconvert.runtimes.backend import Accepts
from lrconvert.runtimes.base import Interpreter
from lrconvert.targets import gguf, onnx

Pico = Callable[..., Model]
WORKERS = {"gguf": llama_cpp.WORKER, "onnx": onnxruntime.WORKER}


@dataclass(frozen=True)
class Short(Options):
    """Decodes from 24 tokens wherever a boundary is beyond 32."""

    @property
    def budget(self) -> Budget:
        return Budget(dense=32, decode=1000, prompt=24)


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, Short]]:
    """One interpreter for each runtime."""
    interpreters = {kind: Interpreter(worker) for kind, worker in WORKERS.items()}
    yield {kind: Short(threads=1, interpreter=interpreter) for kind, interpreter in interpreters.items()}
    for interpreter in interpreters.values():
        interpreter.close()


def baked(kind: str, model: Model, recipe: Recipe, folder: Path) -> Path:
    output = own_name(folder / "a")
    if kind == "onnx":
        bake(onnx.plan(model, recipe, output))
        return output
    output = output.with_name(f"{output.name}.gguf")
    bake(gguf.plan(model, recipe, output, gguf.Options(type="f32")))
    return output


def decoding(report: Report) -> dict[str, Row]:
    return {row.case: row for row in report.rows if row.case.startswith("decode across")}


def decodes(model: Model, capability: Capability, accepts: Accepts, budget: Budget) -> list[Case]:
    spec = capability.fit(model.resolve(load_recipe("llama2-7b-2048k")))[0]
    return [case for case in build_cases(spec, capability, budget, accepts=accepts) if "across" in case.name]


def test_only_far_boundaries_have_short_prompts(pico: Pico) -> None:
    """Up to the budget of dense sequences a prompt is whole, and with --full. Code that decodes from the first token
    alone always reads a whole one, and is not asked where that is beyond the budget."""
    model = pico(max_position_embeddings=4096, head_dim=128)
    far = CPU.decode + 1
    codes = {
        "custom": (CUSTOM_HF, transformers.RUNTIME.backends[1].accepts),
        "llama.cpp": (LLAMA_CPP, llama_cpp.RUNTIME.backends[0].accepts),
        "onnxruntime": (ONNX, onnxruntime.RUNTIME.backends[0].accepts),
    }
    starts = {
        name: {case.lengths[0]: case.start for case in decodes(model, *code, CPU) if not case.skipped}
        for name, code in codes.items()
    }
    assert starts["custom"] == {4092: 0, 8188: 0}
    ends = [4092, 8188, 16380, 32764, 262140, 524284, 1048572]  # of the prompts, before each boundary
    assert starts["onnxruntime"] == {end: end - SPREAD_TOKENS if end > CPU.dense else 0 for end in ends}
    assert starts["llama.cpp"].items() <= starts["onnxruntime"].items()
    for code in codes.values():
        assert all(case.start == 0 for case in decodes(model, *code, UNLIMITED))
    assert all(case.skipped for case in decodes(model, *codes["custom"], CPU) if case.length > far)
    assert all(case.tokens == SPREAD_TOKENS + 8 for case in decodes(model, *codes["onnxruntime"], CPU) if case.start)


@pytest.mark.parametrize("kind", WORKERS)
def test_a_short_prompt_shows_what_a_whole_one_shows(
    kind: str, pico: Pico, tmp_path: Path, options: dict[str, Short]
) -> None:
    """A right artifact passes with room, and mistakes in decoding across the boundary are caught by these rows."""
    model = pico("llama", max_position_embeddings=256)  # a boundary that llama.cpp can see
    right = recipe_for(model, even=True)
    report = verify(baked(kind, model, right, tmp_path), options=options[kind])
    assert report.passed, report.summary
    rows = decoding(report)
    judged = {case: row for case, row in rows.items() if row.verdict == "pass"}
    assert len(judged) == (2 if kind == "onnx" else 1)
    assert all((row.margin or 0) > 10 for row in judged.values())
    if kind == "onnx":  # a cache that is kept is another computation, and is told apart
        assert (rows["decode across 256, cached keys, against exact"].kl_mean or 0) > 1e-3
    for mutant in ("swapped sets", "no attention factor", "factors as multipliers"):
        wrong = RECIPE_MUTANTS[mutant](right)
        assert wrong is not None
        artifact = baked(kind, model, wrong, tmp_path)
        bad = verify(artifact, against=model.reference, recipe=right, options=options[kind])
        caught = [row for row in decoding(bad).values() if row.verdict == "fail"]
        assert caught and max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > 100, mutant
