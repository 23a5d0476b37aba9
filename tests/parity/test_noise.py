# SPDX-License-Identifier: Apache-2.0
"""Bounds that follow the noise of float32: predicted as programs make it, asked for only where needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import own_name
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model
from lrconvert.parity import Options, Report, Row
from lrconvert.parity.judging import SPARED, Asked, judged, with_noise
from lrconvert.parity.measures import Measures
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.parity.tolerances import NOISE
from lrconvert.recipe import Provenance, Recipe
from lrconvert.rope import Tier, longrope_attention_factor, yarn_factors
from lrconvert.runtimes import llama_cpp, onnxruntime, transformers
from lrconvert.runtimes.backend import Rounding
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.tolerances import Tolerance
from lrconvert.targets import gguf, hf, onnx

SHORT, WINDOW = 256, 2**20
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 1}
Pico = Callable[..., Model]


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, Options]]:
    """One interpreter for each runtime."""
    scripts = {"gguf": llama_cpp.WORKER, "hf": transformers.WORKER, "onnx": onnxruntime.WORKER}
    interpreters = {name: Interpreter(script) for name, script in scripts.items()}
    yield {name: Options(threads=1, interpreter=interpreter) for name, interpreter in interpreters.items()}
    for interpreter in interpreters.values():
        interpreter.close()


def model_of(pico: Pico, widen: float) -> Model:
    return pico("llama", max_position_embeddings=SHORT, widen=widen, **SHAPE)


def recipe_of(model: Model) -> Recipe:
    """A short and a long set, as far as the longest published ones reach, one attention factor."""
    shape, factor = model.shape, longrope_attention_factor(WINDOW / SHORT, SHORT)
    sets = (yarn_factors(shape.rotary_dim, shape.theta, ratio, SHORT) for ratio in (1.25, WINDOW / SHORT))
    tiers = (Tier(end, tuple(each.tolist()), 0, factor) for end, each in zip((SHORT, WINDOW), sets, strict=True))
    return Recipe(
        schema_version=1,
        name="far",
        family="llama",
        original_window=SHORT,
        rope_theta=shape.theta,
        rotary_dim=shape.rotary_dim,
        tiers=tuple(tiers),
        provenance=Provenance("published", source="a test"),
    )


def baked(kind: str, model: Model, recipe: Recipe, folder: Path) -> Path:
    output = own_name(folder / "a")
    if kind == "gguf":
        output = output.with_name(f"{output.name}.gguf")
        bake(gguf.plan(model, recipe, output, gguf.Options(type="f32")))
    elif kind == "hf":
        bake(hf.plan(model, recipe, output))
    else:
        bake(onnx.plan(model, recipe, output))
    return output


def rows_of(report: Report, code: str) -> dict[str, Row]:
    return {row.case: row for row in report.rows if row.code == code}


@pytest.mark.parametrize(("kind", "code"), [("gguf", "llama.cpp"), ("hf", "native")])
def test_the_noise_of_float32_angles_is_predicted(
    pico: Pico, tmp_path: Path, kind: str, code: str, workers: dict[str, Options]
) -> None:
    """At a million tokens a right program is far off. As far as the reference with that program's angles, to a part in
    fifty: the prediction is of its arithmetic, not only of its size."""
    model = model_of(pico, 3.0)
    report = verify(baked(kind, model, recipe_of(model), tmp_path), options=workers[kind])
    assert report.passed, report.summary
    far = rows_of(report, code)["far end"]
    assert far.noise is not None and far.kl_mean is not None and far.bound is not None
    assert far.kl_mean > 1e-4
    assert far.kl_mean == pytest.approx(far.noise, rel=0.02)
    assert far.bound == pytest.approx(1e-6 + NOISE * far.noise)
    assert "float32 angles cost the reference" in far.basis
    near = rows_of(report, code)["at 256"]
    assert near.noise is None and near.basis and "reference" not in near.basis


def test_the_noise_of_a_float16_cache_is_predicted(pico: Pico, tmp_path: Path, workers: dict[str, Options]) -> None:
    """`--kv f16` is the default of llama.cpp itself: a right file is off by 1e-5 at any length, and no mutant hides."""
    model, options = model_of(pico, 3.0), replace(workers["gguf"], kv="f16")
    right = recipe_of(model)
    report = verify(baked("gguf", model, right, tmp_path), options=options)
    assert report.passed, report.summary
    near = rows_of(report, "llama.cpp")["at 256"]
    assert near.noise is not None and near.kl_mean == pytest.approx(near.noise, rel=1.0)
    assert "a cache of f16" in near.basis
    for mutant in ("no attention factor", "boundary one early"):
        wrong = RECIPE_MUTANTS[mutant](right)
        assert wrong is not None
        bad = verify(baked("gguf", model, wrong, tmp_path), against=model.reference, recipe=right, options=options)
        assert max((row.kl_mean or 0) / (row.bound or 1) for row in bad.failed if row.code == "llama.cpp") > 100


@pytest.mark.parametrize("code", ["native", "custom"])
def test_the_noise_of_bfloat16_is_predicted(pico: Pico, tmp_path: Path, code: str, workers: dict[str, Options]) -> None:
    """A model that attends sharply is off by more than its row, and by no more than rounding every result of the
    reference predicts, within a factor of eight; no mistake of the rotation hides in that."""
    shape = {**SHAPE, "num_hidden_layers": 2}
    model = pico("llama", max_position_embeddings=SHORT, widen=3.0, **shape)
    right, options = recipe_of(model), replace(workers["hf"], dtype="bfloat16", backends=(code,))
    report = verify(baked("hf", model, right, tmp_path), options=options)
    assert report.passed, report.summary
    noisy = [row for row in rows_of(report, code).values() if row.noise and "bfloat16" in row.basis]
    assert noisy and all(row.kl_mean is not None and row.noise is not None for row in noisy)
    assert max((row.kl_mean or 0) / (row.noise or 1) for row in noisy) < NOISE
    for mutant in ("no attention factor", "swapped sets"):
        wrong = RECIPE_MUTANTS[mutant](right)
        assert wrong is not None
        bad = verify(baked("hf", model, wrong, tmp_path), against=model.reference, recipe=right, options=options)
        assert any(row.code == code and row.kl_mean is not None for row in bad.failed), mutant


CHOSEN = [
    *(("gguf", name, widen) for name in RECIPE_MUTANTS for widen in (2.0, 6.0)),
    *((kind, name, 6.0) for kind in ("hf", "onnx") for name in ("no attention factor", "boundary one early")),
]
# No artifact has start tokens here, and llama.cpp makes contexts in steps of 256: tests/parity/test_gguf.py.
CHOSEN = [each for each in CHOSEN if each[:2] != ("gguf", "boundary one late") and each[1] != "no start tokens"]


@pytest.mark.parametrize(("kind", "mutant", "widen"), CHOSEN, ids=[f"{k}-{m}-{w:g}" for k, m, w in CHOSEN])
def test_no_mutant_hides_in_the_noise(
    pico: Pico, tmp_path: Path, kind: str, mutant: str, widen: float, workers: dict[str, Options]
) -> None:
    """However sharply a model attends: the bounds near the boundary stay below every mistake."""
    model = model_of(pico, widen)
    right = recipe_of(model)
    wrong = RECIPE_MUTANTS[mutant](right)
    assert wrong is not None
    report = verify(baked(kind, model, wrong, tmp_path), against=model.reference, recipe=right, options=workers[kind])
    caught = [row for row in report.failed if row.code in ("llama.cpp", "native", "custom", "onnxruntime")]
    assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > 100


def test_a_slightly_wrong_factor_shows_at_the_far_end(pico: Pico, tmp_path: Path, workers: dict[str, Options]) -> None:
    """One of 32 factors of the long set is off by a tenth: more than noise a million tokens on, where a bound by length
    alone allowed 3e-2."""
    model = model_of(pico, 2.0)
    right = recipe_of(model)
    short, long = right.tiers
    factors = [factor * (1.1 if index == 10 else 1.0) for index, factor in enumerate(long.factors)]
    wrong = replace(right, tiers=(short, replace(long, factors=tuple(factors))))
    artifact = baked("gguf", model, wrong, tmp_path)
    report = verify(artifact, against=model.reference, recipe=right, options=workers["gguf"])
    far = rows_of(report, "llama.cpp")["far end"]
    assert far.verdict == "fail" and (far.kl_mean or 0) < 3e-2


def test_answers_within_their_row_cost_no_second_pass(
    pico: Pico, tmp_path: Path, workers: dict[str, Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Rounding] = []
    right = ReferenceRunner.rounded

    def rounded(self: ReferenceRunner, rounding: Rounding) -> ReferenceRunner:
        asked.append(rounding)
        return right(self, rounding)

    monkeypatch.setattr(ReferenceRunner, "rounded", rounded)
    model = model_of(pico, 3.0)
    recipe = recipe_of(model)
    assert verify(baked("onnx", model, recipe, tmp_path), options=workers["onnx"]).passed
    assert asked == []
    near = replace(recipe, tiers=tuple(replace(t, max_length=min(t.max_length, 512)) for t in recipe.tiers))
    assert verify(baked("gguf", model, near, tmp_path), options=workers["gguf"]).passed
    assert asked == []
    assert verify(baked("gguf", model, recipe, tmp_path), options=workers["gguf"]).passed
    assert asked == [Rounding("powers")]


def test_noise_that_is_no_number_allows_nothing() -> None:
    """A reference that overflowed must not let an artifact pass."""
    row = Tolerance("float32", 1, 1e-6, 1e-4, "a reason")
    for value in (float("nan"), float("inf")):
        assert with_noise(row, Measures(value, value, 0.0, 0.0), Rounding("product")) == row
    assert not row.holds(float("nan"), float("nan"))


@pytest.mark.parametrize(
    ("results", "tipped", "verdict"),
    [("bfloat16", 2, "pass"), ("bfloat16", 3, "fail"), ("float32", 1, "fail")],
)
def test_one_token_in_fifty_may_tip_over_in_a_narrow_type(results: str, tipped: int, verdict: str) -> None:
    """Its answer is another one altogether. A third of 128 such tokens fails, and so does the first in float32."""
    right = np.zeros((128, 8))
    right[:, 0] = 1.0
    rounded, answers = right + 0.02 * np.eye(8)[1], right.copy()
    answers[:tipped, 1] = 6.0  # 4.5 nats
    reference = SimpleNamespace(rounded=lambda rounding: rounding)
    opened: Any = SimpleNamespace(reference=reference, routed=False, rounding=Rounding("float64", results=results))
    asked = Asked([answers], lambda runner: [rounded] if isinstance(runner, Rounding) else [right])
    row = judged("custom", "far end", 2**21, asked, opened, Tolerance("any", 2**62, 0.2, 0.3, "a reason"))
    assert row.verdict == verdict
    assert (SPARED in row.basis) == (results == "bfloat16")
