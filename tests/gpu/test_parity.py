# SPDX-License-Identifier: Apache-2.0
"""Parity on a GPU: `pytest -m gpu tests/gpu`. CONTRIBUTING says how; the report goes to LRCONVERT_GPU_REPORT.

The reference computes in float32 with float64 angles there, in chunks, so that 64k consecutive tokens fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import recipe_for
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model, open_model
from lrconvert.parity import Options, Report
from lrconvert.parity.mutants import RECIPE_MUTANTS, unpermuted_qk
from lrconvert.recipe import Recipe, derive_recipe, load_recipe
from lrconvert.rope import longrope_attention_factor
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.transformers import WORKER, open_session
from lrconvert.targets import hf

pytestmark = pytest.mark.gpu
SMOLLM2 = os.environ.get("LRCONVERT_SMOLLM2_GGUF")
REPORT = os.environ.get("LRCONVERT_GPU_REPORT")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    import torch

    assert torch.cuda.is_available(), "these tests are for a machine with a GPU"
    started = Interpreter(WORKER)
    yield started
    started.close()


@pytest.fixture(scope="module")
def record() -> Iterator[Callable[[str, Report], None]]:
    """Keeps every report; written as one JSON file at the end."""
    kept: dict[str, Any] = {}
    yield lambda name, report: kept.update({name: report.to_json()})
    if REPORT:
        Path(REPORT).write_text(json.dumps(kept, indent=1) + "\n")


def even(recipe: Recipe, attention: float) -> Recipe:
    """The recipe with one attention factor, which native code can express."""
    return replace(recipe, tiers=tuple(replace(tier, attention_factor=attention) for tier in recipe.tiers))


def baked(model: Model, recipe: Recipe, output: Path) -> Path:
    bake_plan(hf.plan(model, recipe, output))
    return output


def on_gpu(report: Report) -> None:
    """The numbers came from a GPU: its name is what the runtime says of its device."""
    assert report.runtimes
    assert all(info["device"] not in ("cpu", "") for info in report.runtimes.values()), report.runtimes


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_demo_model_at_its_window_and_past_it(
    interpreter: Interpreter, record: Callable[[str, Report], None], tmp_path: Path, dtype: str
) -> None:
    """Consecutive tokens up to 32k, decode across 4096, native and custom code."""
    artifact = baked(open_model("demo"), load_recipe("demo-yarn-8x"), tmp_path / "a")
    report = verify(artifact, options=Options("cuda", dtype, interpreter=interpreter))
    record(f"demo {dtype}", report)
    on_gpu(report)
    assert report.passed, report.summary
    assert max(row.length or 0 for row in report.rows if row.verdict == "pass") == 32768


@pytest.mark.skipif(not SMOLLM2, reason="LRCONVERT_SMOLLM2_GGUF names no file")
@pytest.mark.parametrize("dtype", DTYPES)
def test_smollm2_up_to_64k(
    interpreter: Interpreter, record: Callable[[str, Report], None], tmp_path: Path, dtype: str
) -> None:
    """A real model from a Q4_1 GGUF: consecutive tokens at 8k and at 64k, decode across 8192."""
    assert SMOLLM2 is not None
    model = open_model(SMOLLM2)
    shape = model.shape
    recipe = derive_recipe(
        "yarn",
        8.0,
        family=model.family.name,
        rotary_dim=shape.rotary_dim,
        theta=shape.theta,
        original_window=8192,
        base_model="SmolLM2-135M-Instruct",
        attention_factor=longrope_attention_factor(8.0, 8192),
    )
    artifact = baked(model, recipe, tmp_path / "a")
    report = verify(artifact, options=Options("cuda", dtype, interpreter=interpreter))
    record(f"SmolLM2-135M {dtype}", report)
    on_gpu(report)
    assert report.passed, report.summary
    assert any(row.verdict == "pass" and row.case == "decode across 8192" for row in report.rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutant", [*RECIPE_MUTANTS, "unpermuted q/k"])
def test_mutants_are_caught_there_too(
    interpreter: Interpreter, record: Callable[[str, Report], None], tmp_path: Path, dtype: str, mutant: str
) -> None:
    """On the trained demo model, in bfloat16 as well: what the tolerances for it can still see."""
    model = open_model("demo")
    right = even(load_recipe("demo-yarn-8x"), longrope_attention_factor(8.0, 4096))
    starts = mutant == "no start tokens"
    if starts:  # n̂ matters little to this model: the largest of LongRoPE's values, and custom code alone
        right = replace(right, tiers=tuple(replace(tier, start_tokens=256) for tier in right.tiers))
    if mutant == "unpermuted q/k":
        artifact = baked(unpermuted_qk(model), right, tmp_path / "a")
    else:
        wrong = RECIPE_MUTANTS[mutant](right)
        assert wrong is not None
        artifact = baked(model, wrong, tmp_path / "a")
    report = verify(artifact, against="demo", recipe=right, options=Options("cuda", dtype, interpreter=interpreter))
    record(f"mutant {mutant}, {dtype}", report)
    for code in ("custom",) if starts else ("native", "custom"):
        assert any(row.code == code for row in report.failed), f"{mutant} passed in {code} code, {dtype}"


def test_every_family_in_bfloat16(
    interpreter: Interpreter, record: Callable[[str, Report], None], tmp_path: Path, pico: Callable[..., Model]
) -> None:
    """Three tiers with start tokens on pico models: custom code exact in float32, near in bfloat16."""
    for family in ("llama", "mistral", "qwen2", "qwen3", "phi3"):
        artifact = baked(pico(family), recipe_for(pico(family), tiers=3, start_tokens=12), tmp_path / family)
        for dtype in DTYPES:
            report = verify(artifact, options=Options("cuda", dtype, interpreter=interpreter))
            record(f"pico {family} {dtype}", report)
            assert report.passed, report.summary


def test_a_long_prompt_leaves_no_memory_behind(interpreter: Interpreter, tmp_path: Path) -> None:
    """The reference computes next, on the same GPU. The MLP alone has three tensors of a float32 for each of 32k tokens
    and each of its channels, and one layer's are kept by PyTorch where nobody gives them back."""
    import torch

    artifact = baked(open_model("demo"), load_recipe("demo-yarn-8x"), tmp_path / "a")
    with open_session(artifact, custom=True, device="cuda", interpreter=interpreter) as session:
        session.logits([[3, 4, 5]], keep=[-1])  # libraries take what they keep
        before, _ = torch.cuda.mem_get_info()
        session.logits([[3] * 32768], keep=[-1])
        after, _ = torch.cuda.mem_get_info()
    channels = open_model("demo").checkpoint.config["intermediate_size"]
    assert before - after < 3 * 32768 * channels * 4 / 2
