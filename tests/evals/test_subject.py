# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: the reference over artifacts of every format, and recipes tried on plain models."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import own_name, recipe_for
from support.engine_suite import bake
from support.gguf_files import converter_gguf
from support.onnx_files import write_adapter

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model
from lrconvert.errors import InputError, UnsupportedError, UsageError
from lrconvert.evals.perplexity import measure_perplexity
from lrconvert.evals.protocols import Plan
from lrconvert.evals.reference import ReferenceSession
from lrconvert.evals.subject import Subject, baked, computed, opened
from lrconvert.parity.mutants import late_boundary, no_attention_factor, swapped_sets
from lrconvert.recipe import Recipe, write_recipe
from lrconvert.runtimes.base import Session, score_by_logits
from lrconvert.targets import gguf, hf, onnx

LENGTHS = (40, 64, 65, 128)  # pico's window is 64: on both sides of the boundary, at it, and at the end
TEXT = np.random.default_rng(4).integers(1, 101, size=140)
EXACT = 1e-5  # relative, of perplexities: float32 has 6e-8 a step; a mutant moves them by 1e-3 and more


@contextlib.contextmanager
def session(subject: Subject, **options: Any) -> Iterator[Session]:
    with opened(subject, text=False, **options) as (found, _):
        yield found


def perplexities(subject: Subject, **options: Any) -> list[float]:
    with session(subject, **options) as found:
        rows = measure_perplexity(found, [TEXT], Plan(LENGTHS, whole=True, excerpts=1))
        return [row.perplexity.value for row in rows]


@pytest.fixture(scope="module")
def model(pico: Callable[..., Model]) -> Model:
    return pico("llama")


@pytest.fixture(scope="module")
def recipe(model: Model) -> Recipe:
    return recipe_for(model, tiers=2, start_tokens=4)


@pytest.fixture(scope="module")
def own(model: Model, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, list[float]]:
    """An artifact, and its own code's perplexities."""
    artifact = bake(model, recipe, own_name(tmp_path_factory.mktemp("own") / "artifact"))
    subject = Subject.of(str(artifact))
    return subject, perplexities(subject, code="custom")


# --- the reference ---------------------------------------------------------------------------------------


def test_the_reference_has_the_perplexity_of_the_artifact_s_own_code(own: tuple[Subject, list[float]]) -> None:
    subject, theirs = own
    np.testing.assert_allclose(perplexities(subject, code="reference"), theirs, rtol=EXACT)


@pytest.mark.parametrize(
    ("mutate", "moved"),
    [
        (swapped_sets, {40, 64, 65, 128}),
        (no_attention_factor, {65, 128}),  # the short set's is 1
        (late_boundary, {65}),
    ],
)
def test_a_mutant_has_another_perplexity_where_it_is_wrong(
    mutate: Callable[[Recipe], Recipe | None],
    moved: set[int],
    own: tuple[Subject, list[float]],
    model: Model,
    recipe: Recipe,
    tmp_path: Path,
) -> None:
    """The check above can fail: by a hundred times its bound, at the lengths that the mistake is about."""
    wrong = mutate(recipe)
    assert wrong is not None
    artifact = bake(model, wrong, own_name(tmp_path / "artifact"))
    found = perplexities(Subject.of(str(artifact)), code="reference")
    off = np.abs(np.array(found) / own[1] - 1)
    assert {length for length, by in zip(LENGTHS, off, strict=True) if by > 100 * EXACT} == moved
    assert all(by < EXACT for length, by in zip(LENGTHS, off, strict=True) if length not in moved)


def test_the_reference_stops_where_the_artifact_does(model: Model, recipe: Recipe, tmp_path: Path) -> None:
    """`--window` cut the long set off: what is longer than that has the short one, in both."""
    artifact = own_name(tmp_path / "artifact")
    bake_plan(hf.plan(model, recipe, artifact, hf.Options(window=64)))
    subject = Subject.of(str(artifact))
    np.testing.assert_allclose(perplexities(subject, code="reference"), perplexities(subject), rtol=EXACT)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_the_reference_reads_other_formats(
    kind: str, model: Model, own: tuple[Subject, list[float]], tmp_path: Path
) -> None:
    """A float32 GGUF and an ONNX folder say what the folder says, from the manifest and without one."""
    recipe = recipe_for(model, tiers=2, even=True)
    artifact = tmp_path / ("m.gguf" if kind == "gguf" else "m")
    if kind == "gguf":
        bake_plan(gguf.plan(model, recipe, artifact, gguf.Options(type="f32")))
    else:
        bake_plan(onnx.plan(model, recipe, artifact, onnx.Options()))
    path = str(write_recipe(recipe, tmp_path / "recipe"))
    wanted = perplexities(Subject.of(model.reference, path), code="reference")
    np.testing.assert_allclose(perplexities(Subject.of(str(artifact)), code="reference"), wanted, rtol=EXACT)
    bare = replace(Subject.of(str(artifact)), recipe=None)
    np.testing.assert_allclose(perplexities(bare, code="reference"), wanted, rtol=EXACT)


def test_a_plain_model_has_its_unscaled_rotation(model: Model) -> None:
    subject = Subject.of(model.reference)
    _, spec = computed(subject)
    assert [tier.factors for tier in spec.tiers] == [(1.0,) * 8]
    theirs = perplexities(subject, code="native")
    np.testing.assert_allclose(perplexities(subject, code="reference"), theirs, rtol=EXACT)


def test_a_folded_artifact_runs_with_the_remaining_attention_factor(model: Model, tmp_path: Path) -> None:
    """Its weights carry the attention factor already: folded and unfolded say the same."""
    recipe = recipe_for(model, tiers=2, even=True)
    subjects = [
        Subject.of(str(bake(model, recipe, own_name(tmp_path / f"{folded}"), portable=folded)))
        for folded in (False, True)
    ]
    plain, folded = (perplexities(subject, code="reference") for subject in subjects)
    np.testing.assert_allclose(folded, plain, rtol=EXACT)


def test_scores_are_what_logits_say_in_chunks(
    own: tuple[Subject, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of three tokens, the last one shorter; a long row's logits are never held at once."""
    from lrconvert.reference import decoder

    monkeypatch.setattr(decoder, "MAX_SCORED", 3 * 101)
    with session(own[0], code="reference") as found:
        row = TEXT[:70].tolist()
        (ours,), (wanted,) = found.score([row], [11]), score_by_logits(found, [row], [11])
        (logits,) = found.logits([row], keep=[68])
        row[-1] = int(logits.argmax())
        (chosen,) = found.score([row], [5])
    np.testing.assert_allclose(ours.losses, wanted.losses, rtol=1e-12)
    assert ours.preferred.tolist() == wanted.preferred.tolist() and chosen.preferred[-1]


def test_the_reference_says_what_it_is_and_does_not_generate(own: tuple[Subject, list[float]]) -> None:
    with session(own[0], code="reference") as found:
        assert isinstance(found, ReferenceSession)
        assert (found.info["class"], found.info["dtype"], found.info["device"]) == ("reference", "float64", "cpu")
        with pytest.raises(UnsupportedError, match="does not generate"):
            found.generate([1, 2], 3)
    with pytest.raises(UsageError, match="computes in float64"), session(own[0], code="reference", dtype="float16"):
        pass


# --- recipes on plain models -----------------------------------------------------------------------------


def test_a_recipe_is_tried_without_baking_it(
    own: tuple[Subject, list[float]], model: Model, recipe: Recipe, tmp_path: Path
) -> None:
    """As the baked artifact, by its own code and by the reference; the temporary folder goes away."""
    path = write_recipe(recipe, tmp_path / "recipe")
    subject = Subject.of(model.reference, str(path))
    np.testing.assert_allclose(perplexities(subject), own[1], rtol=EXACT)
    np.testing.assert_allclose(perplexities(subject, code="reference"), own[1], rtol=EXACT)
    with baked(subject) as folder:
        inside = folder / "model.safetensors"
        assert inside.is_file() and (folder / "lrconvert.json").is_file()
    assert not folder.parent.exists()


def test_a_gguf_is_converted_to_be_tried(
    own: tuple[Subject, list[float]], model: Model, recipe: Recipe, tmp_path: Path
) -> None:
    """A GGUF of llama.cpp's converter, which carries no recipe, under one: as the model that it was made of."""
    path = write_recipe(recipe, tmp_path / "recipe")
    plain = converter_gguf(tmp_path / "plain.gguf", model)
    np.testing.assert_allclose(perplexities(Subject.of(str(plain), str(path))), own[1], rtol=EXACT)


def test_an_adapter_that_the_recipe_carries_is_merged(
    own: tuple[Subject, list[float]], model: Model, recipe: Recipe, tmp_path: Path
) -> None:
    """Whether it is baked or asked of the reference; and it matters."""
    shape = model.shape
    rows = shape.heads * shape.head_dim
    write_adapter(tmp_path / "recipe" / "adapter", {"model.layers.0.self_attn.q_proj": (rows, shape.hidden)})
    path = write_recipe(replace(recipe, adapter="adapter"), tmp_path / "recipe")
    subject = Subject.of(model.reference, str(path))
    found = perplexities(subject)
    np.testing.assert_allclose(perplexities(subject, code="reference"), found, rtol=EXACT)
    assert np.abs(np.array(found) / own[1] - 1).min() > 100 * EXACT


def test_only_plain_models_are_tried(own: tuple[Subject, list[float]], model: Model, tmp_path: Path) -> None:
    """What carries a recipe or a scaling says so and what to do; another model's recipe names both values."""
    path = str(write_recipe(recipe_for(model), tmp_path / "recipe"))
    with pytest.raises(UsageError, match=r"already carries the recipe pico.*Omit --recipe"):
        Subject.of(own[0].reference, path)
    scaled = tmp_path / "scaled"
    shutil.copytree(model.checkpoint.path, scaled)
    config = json.loads((scaled / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (scaled / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"already carries linear scaling.*lrconvert hf"):
        Subject.of(str(scaled), path)
    with pytest.raises(InputError, match="rotary dimension 64 in the recipe, 16 in the model"):
        Subject.of(model.reference, "demo-yarn-8x")


def test_code_that_is_not_there_is_named(own: tuple[Subject, list[float]], model: Model) -> None:
    subject = Subject.of(model.reference)
    with (
        pytest.raises(UsageError, match=r"has no custom code\. Available: native, reference"),
        session(subject, code="custom"),
    ):
        pass
