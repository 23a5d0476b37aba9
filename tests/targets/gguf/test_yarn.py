# SPDX-License-Identifier: Apache-2.0
"""Families whose C++ ignores factors: a YaRN is written with llama.cpp's own keys, and is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, recipe_for
from support.gguf_files import Tensors, changed
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import UnsupportedError
from lrconvert.parity import Options
from lrconvert.recipe import Recipe
from lrconvert.recipe.models import own_recipe
from lrconvert.rope import yarn_factors
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.llama_cpp import WORKER
from lrconvert.targets import gguf

pytestmark = pytest.mark.usefixtures("remembered")

SHORT, WINDOW = 256, 1024
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT}
Pico = Callable[..., Model]
FAR = 100


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    interpreter = Interpreter(WORKER)
    yield Options(threads=1, interpreter=interpreter)
    interpreter.close()


def model_of(pico: Pico, **scaling: Any) -> Model:
    return pico("qwen3", max_position_embeddings=WINDOW, rope_scaling={**YARN, **scaling})


def baked(model: Model, recipe: Recipe, output: Path, **options: Any) -> Path:
    bake(gguf.plan(model, recipe, output, gguf.Options(**{"type": "f32", **options})))
    return output


SCALINGS: dict[str, dict[str, Any]] = {
    "as its card has it": {},
    "another attention factor": {"attention_factor": 1.3},
    "no attention factor": {"attention_factor": 1.0},
    "another ratio": {"factor": 3.5},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_model_with_yarn_runs_with_llama_cpps_own(pico: Pico, tmp_path: Path, name: str, options: Options) -> None:
    """From the model's own rotation: right in short and long contexts, at every length up to the window."""
    model = model_of(pico, **SCALINGS[name])
    recipe, _ = own_recipe(model)
    artifact = baked(model, recipe, tmp_path / "m.gguf")
    stored = open_model(artifact).checkpoint.gguf
    assert stored is not None and stored.architecture == "qwen3"
    assert stored.metadata["qwen3.rope.scaling.type"] == "yarn"
    assert not [tensor for tensor in stored.tensors if tensor.startswith("rope_")]
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    assert report.losses == []
    judged = {row.case: row for row in report.rows if row.code == "llama.cpp" and row.verdict == "pass"}
    assert {"short", "far end", "decode, long context"} <= set(judged)
    assert max(row.kl_mean or 0 for row in judged.values()) < 1e-6


def _set(key: str, value: Any) -> Callable[[dict[str, Any], Tensors], None]:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        assert metadata[f"qwen3.rope.scaling.{key}"] != value
        if value is None:
            del metadata[f"qwen3.rope.scaling.{key}"]
        else:
            metadata[f"qwen3.rope.scaling.{key}"] = value

    return change


MUTANTS = {
    "no type": _set("type", None),
    "linear": _set("type", "linear"),
    "another factor": _set("factor", 3.5),
    "another original window": _set("original_context_length", 2 * SHORT),
    "the attention factor once more": _set("attn_factor", 1.1386294),
    "no attention factor": _set("attn_factor", 0.8782489),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_wrong_key_is_caught(pico: Pico, tmp_path: Path, mutant: str, options: Options) -> None:
    """In the metadata, and in llama.cpp's answers."""
    model = model_of(pico)
    recipe, _ = own_recipe(model)
    broken = changed(baked(model, recipe, tmp_path / "m.gguf"), tmp_path / "broken.gguf", MUTANTS[mutant])
    report = verify(broken, against=model.reference, recipe=recipe, options=options)
    assert [row for row in report.failed if row.code == "metadata"]
    caught = [row for row in report.failed if row.code == "llama.cpp"]
    assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


def test_a_derived_yarn_serves_every_length_when_it_is_asked_to(pico: Pico, tmp_path: Path, options: Options) -> None:
    """Two sets are refused, with the way out; the long one alone is a YaRN, and what that costs is measured."""
    model = pico("qwen3", max_position_embeddings=SHORT)
    recipe = recipe_for(model, even=True)
    ratio = 2.0
    short, long = recipe.tiers
    factors = yarn_factors(model.shape.rotary_dim, model.shape.theta, ratio, SHORT)
    plain = replace(short, factors=(1.0,) * len(factors))
    recipe = replace(recipe, tiers=(plain, replace(long, factors=tuple(factors.tolist()))))
    with pytest.raises(UnsupportedError) as refused:
        baked(model, recipe, tmp_path / "m.gguf")
    assert "the recipe has 2 sets" in str(refused.value) and "--static-long" in str(refused.value)
    report = verify(baked(model, recipe, tmp_path / "m.gguf", static=True), options=options)
    assert report.passed, report.summary
    assert any("one factor set for all lengths" in loss for loss in report.losses)
    assert [row for row in report.rows if row.case == "lost at 256" and (row.kl_mean or 0) > 1e-4]


def test_a_set_that_is_no_yarn_is_refused(pico: Pico, tmp_path: Path) -> None:
    model = model_of(pico)
    recipe, _ = own_recipe(model)
    (tier,) = recipe.tiers
    other = replace(tier, factors=tuple(factor * (1.0 + 0.01 * i) for i, factor in enumerate(tier.factors)))
    with pytest.raises(UnsupportedError, match="ignores rope factors for qwen3, and its set is no YaRN"):
        baked(model, replace(recipe, tiers=(other,)), tmp_path / "m.gguf")
    model = model_of(pico, beta_fast=8.0, beta_slow=2.0)
    with pytest.raises(UnsupportedError, match="a YaRN whose ramp is not the usual one, between 32 turns and 1"):
        baked(model, own_recipe(model)[0], tmp_path / "m.gguf")


def test_a_plain_model_stays_plain(pico: Pico, tmp_path: Path, options: Options) -> None:
    model = pico("qwen3", max_position_embeddings=WINDOW)
    recipe, _ = own_recipe(model)
    report = verify(baked(model, recipe, tmp_path / "m.gguf"), options=options)
    assert report.passed, report.summary


def test_a_quantised_file_is_baked_again_and_read_back(
    pico: Pico, tmp_path: Path, options: Options, cli: Callable[..., Result]
) -> None:
    """The other way in: a qwen3 GGUF gets YaRN's keys, keeps its weights, and says what it is."""
    model = model_of(pico)
    recipe, _ = own_recipe(model)
    source = baked(model, recipe, tmp_path / "q8.gguf", type="q8_0")
    again = tmp_path / "again.gguf"
    bake(gguf.plan(open_model(source), recipe, again))
    report = verify(again, options=options)
    assert report.passed, report.summary
    facts = json.loads(cli("inspect", again, "--json").out)
    assert facts["rope"]["kind"] == "yarn"
    assert "yarn scaling by 4 up to 1024 tokens" in cli("inspect", again).out
