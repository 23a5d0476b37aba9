# SPDX-License-Identifier: Apache-2.0
"""GGUF files in llama.cpp with all layers on a GPU: `pytest -m gpu tests/gpu/test_llama_cpp.py`, with
LRCONVERT_LLAMA_LIBRARY naming a CUDA build. CONTRIBUTING says how; the report goes to LRCONVERT_GPU_REPORT.

A session refuses a file that llama.cpp did not put on the GPU as a whole (by its log), so a report is one from
there. Products in float32 are kept out of TF32, prompts are read in one call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pico import write_pico
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model, open_model
from lrconvert.parity import Options, Report
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.recipe import Recipe, derive_recipe
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.llama_cpp import WORKER
from lrconvert.runtimes.llama_library import VARIABLE
from lrconvert.targets import gguf

pytestmark = pytest.mark.gpu
REPORT = os.environ.get("LRCONVERT_GPU_REPORT")
SMOLLM2 = os.environ.get("LRCONVERT_SMOLLM2_GGUF")
TYPES = ("f32", "f16", "q8_0", "q4_k_m")
MUTANTS = [name for name in RECIPE_MUTANTS if name not in ("no start tokens", "boundary one late")]
Record = Callable[[str, Report], None]


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} names no llama.cpp with CUDA")
    interpreter = Interpreter(WORKER)
    yield Options("cuda", interpreter=interpreter)
    interpreter.close()


@pytest.fixture(scope="module")
def record() -> Iterator[Record]:
    """Keeps every report; written as one JSON file at the end."""
    kept: dict[str, Any] = {}

    def keep(name: str, report: Report) -> None:
        assert report.runtimes["llama.cpp"]["device"] not in ("cpu", ""), report.runtimes
        kept[name] = report.to_json()

    yield keep
    if REPORT:
        Path(REPORT).write_text(json.dumps(kept, indent=1) + "\n")


def bake(model: Model, recipe: Recipe, output: Path, kind: str | None, window: int | None = None) -> Path:
    bake_plan(gguf.plan(model, recipe, output, gguf.Options(type=kind, window=window)))
    return output


def yarn(model: Model, ratio: float) -> Recipe:
    """A uniform recipe: llama.cpp has one attention factor."""
    shape = model.shape
    return derive_recipe("yarn", ratio, family=model.family.name, rotary_dim=shape.rotary_dim, theta=shape.theta,
                         original_window=shape.window, base_model=model.family.name, uniform=True)  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_the_demo_model(options: Options, record: Record, tmp_path: Path, kind: str) -> None:
    """Consecutive tokens up to 32k, both sets, decoding in either, several sequences."""
    model = open_model("demo")
    report = verify(bake(model, yarn(model, 8), tmp_path / "m.gguf", kind), options=options)
    record(f"demo {kind}", report)
    assert report.passed, report.summary
    assert max(row.length or 0 for row in report.rows if row.verdict == "pass") == 32768


@pytest.mark.skipif(not SMOLLM2, reason="LRCONVERT_SMOLLM2_GGUF names no file")
@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_k_m", None])
def test_smollm2(options: Options, record: Record, tmp_path: Path, kind: str | None) -> None:
    """A real model from a Q4_1 GGUF, converted and (None) re-baked: consecutive tokens on both sides of 8192."""
    assert SMOLLM2 is not None
    model = open_model(SMOLLM2)
    report = verify(bake(model, yarn(model, 8), tmp_path / "m.gguf", kind), options=options)
    record(f"SmolLM2-135M {kind or 'as stored'}", report)
    assert report.passed, report.summary
    assert {"at 8192", "one past 8192"} <= {row.case for row in report.rows if row.verdict == "pass"}


@pytest.fixture(scope="module")
def few_layers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Two layers of the true head size, an original window of 4096. Widened by 2: more amplifies every rounding."""
    made: dict[str, Path] = {}
    shape = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "max_position_embeddings": 4096}

    def get(family: str) -> Model:
        if family not in made:
            extra = {"original_max_position_embeddings": 4096} if family == "phi3" else {}
            made[family] = write_pico(tmp_path_factory.mktemp(family), family, widen=2.0, **shape, **extra)
        return open_model(made[family])

    return get


FAR = [(64, 32768), (64, 131072), (64, 262144), (512, 524288), (512, 1048576), (512, 2097152)]


@pytest.mark.parametrize(("ratio", "window"), FAR)
def test_positions_up_to_two_million(
    options: Options, record: Record, tmp_path: Path, few_layers: Callable[[str], Model], ratio: int, window: int
) -> None:
    """Factor sets of 64x and 512x: float32 stays within the tolerance of its position."""
    model = few_layers("llama")
    artifact = bake(model, yarn(model, ratio), tmp_path / "m.gguf", "f32", window)
    report = verify(artifact, options=options)
    record(f"llama {ratio}x to {window} f32", report)
    assert report.passed, report.summary
    assert any(row.case == "far end" and row.length == window for row in report.rows)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_every_family_and_type(
    options: Options, record: Record, tmp_path: Path, few_layers: Callable[[str], Model], family: str, kind: str
) -> None:
    """64x on every family's layout, phi3's fused tensors and partial rotation among them."""
    model = few_layers(family)
    report = verify(bake(model, yarn(model, 64), tmp_path / "m.gguf", kind), options=options)
    record(f"{family} 64x {kind}", report)
    assert report.passed, report.summary


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught_there_too(options: Options, record: Record, tmp_path: Path, mutant: str, kind: str) -> None:
    """On the trained demo model, in every type: what bounds and the closest hypothesis can still see."""
    model = open_model("demo")
    right = yarn(model, 8)
    wrong = RECIPE_MUTANTS[mutant](right)
    assert wrong is not None
    artifact = bake(model, wrong, tmp_path / "m.gguf", kind)
    report = verify(artifact, against="demo", recipe=right, options=options)
    record(f"mutant {mutant}, {kind}", report)
    assert any(row.code == "llama.cpp" for row in report.failed), f"{mutant} passed in {kind}"
