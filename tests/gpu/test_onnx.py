# SPDX-License-Identifier: Apache-2.0
"""ONNX folders with the CUDA provider: `pytest -m gpu tests/gpu/test_onnx.py`, where onnxruntime is onnxruntime-gpu.

float32 runs with the standard attention (the fused one has no kernel for it) and without TF32; float16 and bfloat16 run
with the fused one. A node on floats that ran on the CPU fails the run: the report says where each session ran. The
report goes to LRCONVERT_GPU_REPORT.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.pico import write_pico
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import UnsupportedError
from lrconvert.parity import Options, Report
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.recipe import Recipe, derive_recipe, load_recipe
from lrconvert.rope import Tier
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.onnxruntime import WORKER
from lrconvert.targets import onnx

pytestmark = pytest.mark.gpu
REPORT = os.environ.get("LRCONVERT_GPU_REPORT")
SMOLLM2 = os.environ.get("LRCONVERT_SMOLLM2_GGUF")
GRAPHS = (("f32", "standard"), ("f16", "gqa"), ("f16", "standard"), ("bf16", "gqa"))
MUTANTS = [name for name in RECIPE_MUTANTS if name != "no start tokens"]
Record = Callable[[str, Report], None]


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    runtime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    interpreter = Interpreter(WORKER)
    yield Options("cuda", interpreter=interpreter)
    interpreter.close()


@pytest.fixture(scope="module")
def record() -> Iterator[Record]:
    """Keeps every report; written as one JSON file at the end."""
    kept: dict[str, Any] = {}

    def keep(name: str, report: Report) -> None:
        kept[name] = report.to_json()
        rows = {row.case: row.verdict for row in report.rows}
        assert rows.get("all products on the GPU") == "pass", [row for row in report.rows if row.verdict == "fail"]

    yield keep
    if REPORT:
        Path(REPORT).write_text(json.dumps(kept, indent=1) + "\n")


def bake(model: Model, recipe: Recipe, output: Path, dtype: str, attention: str, **more: Any) -> Path:
    bake_plan(onnx.plan(model, recipe, output, onnx.Options(dtype=dtype, attention=attention, **more)))
    return output


def yarn(model: Model, ratio: float) -> Recipe:
    shape = model.shape
    return derive_recipe("yarn", ratio, family=model.family.name, rotary_dim=shape.rotary_dim, theta=shape.theta,
                         original_window=shape.window, base_model=model.family.name)  # fmt: skip


@pytest.mark.parametrize(("dtype", "attention"), GRAPHS)
def test_the_demo_model(options: Options, record: Record, tmp_path: Path, dtype: str, attention: str) -> None:
    """Consecutive tokens up to 32k, and decoding across 4096 with both policies, agree with the reference."""
    report = verify(
        bake(open_model("demo"), load_recipe("demo-yarn-8x"), tmp_path / "m", dtype, attention), options=options
    )
    record(f"demo {dtype} {attention}", report)
    assert report.passed, report.summary


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("dtype", "attention"), (("f32", "standard"), ("f16", "gqa")))
def test_positions_up_to_two_million(
    options: Options, record: Record, tmp_path: Path, dtype: str, attention: str, double: bool
) -> None:
    """Three tiers with start tokens and a factor each, 512 times the original window: as exact at 2M as at 4k."""
    model = open_model(write_pico(tmp_path / "pico", "llama", max_position_embeddings=4096, widen=2.0))
    recipe = yarn(model, 512)
    first, last = recipe.tiers
    middle = Tier(262144, tuple((value + 1) / 2 for value in last.factors), 16, 1.1)
    recipe = replace(recipe, tiers=(first, middle, replace(last, start_tokens=4)))
    report = verify(bake(model, recipe, tmp_path / "m", dtype, attention, double=double), options=options)
    record(f"pico 512x {dtype} {attention}{'' if double else ' from tables'}", report)
    assert report.passed, report.summary


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize(("dtype", "attention"), (("f32", "standard"), ("f16", "gqa")))
def test_families(options: Options, record: Record, tmp_path: Path, family: str, dtype: str, attention: str) -> None:
    """Every family's own parts (biases, head norms, fused and partial tensors) have kernels on a GPU, and are right."""
    model = open_model(write_pico(tmp_path / "pico", family))
    report = verify(bake(model, yarn(model, 8), tmp_path / "m", dtype, attention), options=options)
    record(f"pico {family} {dtype} {attention}", report)
    assert report.passed, report.summary


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize(("dtype", "attention"), (("f32", "standard"), ("f16", "gqa")))
def test_mutants_fail(
    options: Options, record: Record, tmp_path: Path, dtype: str, attention: str, mutant: str
) -> None:
    """Every mistake is caught with these bounds, on this hardware."""
    model = open_model(write_pico(tmp_path / "pico", "llama"))
    right = yarn(model, 8)
    wrong = RECIPE_MUTANTS[mutant](right)
    if wrong is None:
        pytest.skip("this recipe can't have that mistake")
    report = verify(bake(model, wrong, tmp_path / "m", dtype, attention), against=str(tmp_path / "pico"),
                    recipe=right, options=options)  # fmt: skip
    record(f"mutant {mutant} {dtype} {attention}", report)
    answered = [row for row in report.rows if row.code == "onnxruntime" and row.verdict == "fail"]
    assert answered, "only the graph's own tiers gave it away"


def test_fused_float32_is_refused(options: Options, tmp_path: Path) -> None:
    """It would run on the CPU without a word."""
    artifact = bake(open_model("demo"), load_recipe("demo-yarn-8x"), tmp_path / "m", "f32", "gqa")
    with pytest.raises(UnsupportedError, match="standard"):
        verify(artifact, options=options)


@pytest.mark.skipif(not SMOLLM2, reason="LRCONVERT_SMOLLM2_GGUF names no file")
@pytest.mark.parametrize(("dtype", "attention"), (("f32", "standard"), ("f16", "gqa")))
def test_smollm2(options: Options, record: Record, tmp_path: Path, dtype: str, attention: str) -> None:
    """A real model, from its GGUF, 8k to 64k."""
    model = open_model(SMOLLM2 or "")
    report = verify(bake(model, yarn(model, 8), tmp_path / "m", dtype, attention), options=options)
    record(f"SmolLM2-135M {dtype} {attention}", report)
    assert report.passed, report.summary
