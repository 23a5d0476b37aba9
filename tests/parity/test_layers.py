# SPDX-License-Identifier: Apache-2.0
"""Whole artifacts of decoders beyond Llama's: layers taken for one kind are caught in every format, other types are
right too, and GGUF files hold what llama.cpp computes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import recipe_for
from support.gguf_files import Tensors, changed
from support.pico import v5_rope
from support.verifying import CODES, baked, options_by_target, verify

from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import UnsupportedError
from lrconvert.families.layers import FULL, SLIDING
from lrconvert.parity import Options
from lrconvert.parity.mutants import layers_alike, unpermuted_qk
from lrconvert.recipe.models import own_recipe
from lrconvert.rope import yarn_attention_factor, yarn_factors

SHORT, WINDOW = 256, 1024  # llama.cpp's contexts count in steps of the first
FAR = 100
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT}
# What each needs to be a model that llama.cpp's C++ can be told of.
IN_GGUF: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": None, "tie_word_embeddings": True},
    "olmo2": {},
    "glm4": {},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "layer_types": None,
        "sliding_window": 96,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
    "olmo3": {"num_hidden_layers": 4, "layer_types": None, "sliding_window": 96},
}
WINDOWED = ["olmo3", "gemma3_text"]
KINDS = ["smollm3", *WINDOWED]  # families with layers that the recipe doesn't rotate
Pico = Callable[..., Model]


@pytest.fixture(scope="module")
def options() -> Iterator[Callable[[str], Options]]:
    with options_by_target() as get:
        yield get


@pytest.mark.parametrize("target", ["hf", "onnx"])
@pytest.mark.parametrize("family", KINDS)
def test_layers_taken_for_one_kind_are_caught(
    pico: Pico, tmp_path: Path, family: str, target: str, options: Callable[[str], Options]
) -> None:
    """By every code of every format, far outside of its tolerance."""
    model = pico(family)
    wrong, recipe = layers_alike(model), recipe_for(model, even=True)
    assert wrong is not None
    artifact = baked(target, wrong, recipe, tmp_path)
    report = verify(artifact, against=model.reference, recipe=recipe, options=options(target))
    for code in CODES[target]:
        caught = [row for row in report.failed if row.code == code]
        assert caught, f"passed in {code}"
        assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


def test_layers_of_one_kind_can_not_be_forgotten(pico: Pico) -> None:
    assert layers_alike(pico("llama")) is None


@pytest.mark.parametrize("target", ["hf", "onnx", "gguf"])
@pytest.mark.parametrize("family", WINDOWED)
def test_lifted_windows_leave_the_kinds_of_layers(
    pico: Pico, tmp_path: Path, family: str, target: str, options: Callable[[str], Options]
) -> None:
    """Where a user asks for that: every layer sees every token, and those that slid rotate as they did. What it costs
    is measured."""
    model = yarn_model(pico, family)
    artifact = baked(target, model, own_recipe(model)[0], tmp_path, lift=True)
    report = verify(artifact, options=options(target))
    assert report.passed, report.summary
    assert [row for row in report.rows if row.code == "lifted" and (row.kl_mean or 0) > 1e-3]
    assert open_model(artifact).shape.own_theta == model.shape.own_theta


TYPES: list[tuple[str, str, dict[str, Any]]] = [
    *((family, "onnx", {"dtype": "f16"}) for family in IN_GGUF),
    *((family, "onnx", {"dtype": "int8", "attention": "standard"}) for family in IN_GGUF),
    *((family, "hf", {"dtype": "bf16"}) for family in IN_GGUF),
]


@pytest.mark.parametrize(("family", "target", "more"), TYPES, ids=str)
def test_other_types_are_right_too(
    pico: Pico, tmp_path: Path, family: str, target: str, more: dict[str, Any], options: Callable[[str], Options]
) -> None:
    model = pico(family)
    report = verify(baked(target, model, recipe_for(model, even=True), tmp_path, **more), options=options(target))
    assert report.passed, report.summary


# --- GGUF ------------------------------------------------------------------------------------------------


def yarn_model(pico: Pico, family: str, **more: Any) -> Model:
    """One that is scaled by YaRN already, as llama.cpp's C++ can be told of it."""
    return pico(family, **{**IN_GGUF[family], "max_position_embeddings": WINDOW, "rope_scaling": YARN, **more})


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("family", IN_GGUF)
def test_a_yarn_is_right_in_llama_cpp(
    pico: Pico, tmp_path: Path, family: str, kind: str, options: Callable[[str], Options]
) -> None:
    """At every length up to the window, in short and long contexts; and the file is a source like any other."""
    model = yarn_model(pico, family)
    recipe, _ = own_recipe(model)
    artifact = baked("gguf", model, recipe, tmp_path, type=kind)
    report = verify(artifact, options=options("gguf"))
    assert report.passed, report.summary
    judged = {row.case: row for row in report.rows if row.code == "llama.cpp" and row.verdict == "pass"}
    assert {"short", "far end", "decode, long context"} <= set(judged)
    if kind == "f32":
        assert max(row.kl_mean or 0 for row in judged.values()) < 1e-6
    again = open_model(artifact)
    assert (again.family, again.shape.own_theta) == (model.family, model.shape.own_theta)
    assert again.rotation.kind == "yarn"
    report = verify(baked("onnx", again, recipe, tmp_path), options=options("onnx"))
    assert report.passed, report.summary


@pytest.mark.parametrize("family", IN_GGUF)
def test_a_derived_yarn_serves_every_length_when_it_is_asked_to(
    pico: Pico, tmp_path: Path, family: str, options: Callable[[str], Options]
) -> None:
    """Two sets are refused, with the way out and the reason; the long one alone is a YaRN."""
    model = pico(family, **IN_GGUF[family], max_position_embeddings=SHORT)
    short, long = recipe_for(model, even=True).tiers
    factors = yarn_factors(model.shape.rotary_dim, model.shape.theta, 2.0, SHORT)
    plain = replace(short, factors=(1.0,) * len(factors))
    recipe = recipe_for(model, even=True)
    with pytest.raises(UnsupportedError) as refused:
        baked("gguf", model, recipe, tmp_path)
    assert f"ignores rope factors for {family}, and the recipe has 2 sets" in str(refused.value)
    long = replace(long, factors=tuple(factors.tolist()))
    if family == "gemma3_text":
        with pytest.raises(UnsupportedError, match=r"an attention factor of 1\.06066, which is not YaRN's own"):
            baked("gguf", model, replace(recipe, tiers=(plain, long)), tmp_path, static=True)
        long = replace(long, attention_factor=yarn_attention_factor(2.0))
    recipe = replace(recipe, tiers=(replace(plain, attention_factor=long.attention_factor), long))
    report = verify(baked("gguf", model, recipe, tmp_path, static=True), options=options("gguf"))
    assert report.passed, report.summary
    assert any("one factor set for all lengths" in loss for loss in report.losses)


def test_scores_of_62_layers_are_those_of_the_27b(pico: Pico, tmp_path: Path) -> None:
    """llama.cpp knows Gemma 3 27B by its layers, and scales its scores by hidden size over heads; others of as many are
    refused. Read back, the file says the same."""
    many = {"num_hidden_layers": 62, "hidden_size": 32, "intermediate_size": 32, "query_pre_attn_scalar": 8}
    model = yarn_model(pico, "gemma3_text", **many)
    again = open_model(baked("gguf", model, own_recipe(model)[0], tmp_path))
    assert again.checkpoint.config["query_pre_attn_scalar"] == pytest.approx(8)
    assert again.shape.multipliers.attention == pytest.approx(2**0.5)
    other = yarn_model(pico, "gemma3_text", **many | {"query_pre_attn_scalar": 16})
    with pytest.raises(UnsupportedError, match="does not multiply as the model does: attention 1"):
        baked("gguf", other, own_recipe(other)[0], tmp_path)


def test_a_file_with_another_pattern_is_refused(pico: Pico, tmp_path: Path) -> None:
    model = yarn_model(pico, "gemma3_text")
    artifact = baked("gguf", model, own_recipe(model)[0], tmp_path)

    def patterned(metadata: dict[str, Any], tensors: Tensors) -> None:
        metadata["gemma3.attention.sliding_window_pattern"] = 2

    with pytest.raises(UnsupportedError, match="sliding_window_pattern is 2; files in which all but every 6th"):
        open_model(changed(artifact, tmp_path / "other.gguf", patterned))


def _set(key: str, value: Any) -> Callable[[dict[str, Any], Tensors], None]:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        assert metadata[key] != value
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value

    return change


FILE_MUTANTS = [
    ("smollm3", _set("smollm3.rope.scaling.type", "none")),
    ("smollm3", _set("smollm3.rope.freq_base", 20000.0)),
    ("gemma3_text", _set("gemma3.attention.sliding_window", 128)),
    ("gemma3_text", _set("gemma3.rope.freq_base_swa", None)),
    ("olmo3", _set("olmo2.attention.sliding_window", 128)),
]


@pytest.mark.parametrize(("family", "mutant"), FILE_MUTANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_key_is_caught(
    pico: Pico, tmp_path: Path, family: str, mutant: Any, options: Callable[[str], Options]
) -> None:
    """In the metadata, and in llama.cpp's answers."""
    model = yarn_model(pico, family)
    recipe, _ = own_recipe(model)
    broken = changed(baked("gguf", model, recipe, tmp_path), tmp_path / "broken.gguf", mutant)
    report = verify(broken, against=model.reference, recipe=recipe, options=options("gguf"))
    assert [row for row in report.failed if row.code == "metadata"]
    caught = [row for row in report.failed if row.code == "llama.cpp"]
    assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


@pytest.mark.parametrize("family", IN_GGUF)
def test_unpermuted_q_and_k_are_caught(
    pico: Pico, tmp_path: Path, family: str, options: Callable[[str], Options]
) -> None:
    model = yarn_model(pico, family)
    recipe, _ = own_recipe(model)
    artifact = baked("gguf", unpermuted_qk(model), recipe, tmp_path)
    report = verify(artifact, against=model.reference, recipe=recipe, options=options("gguf"))
    caught = [row for row in report.failed if row.code == "weights"]
    assert len(caught) == 1 and any(name in caught[0].reason for name in ("q_proj", "k_proj"))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "gemma3_text",
        {"sliding_window_pattern": 3},
        "layers that rotate by themselves: 0, 1, 3, 4; llama.cpp's gemma3 has",
    ),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "logits have a soft cap of 30; llama.cpp's gemma3 has none"),
    ("gemma3_text", {"attention_bias": True}, "attention has biases; llama.cpp's gemma3 has none"),
    ("gemma3_text", {"query_pre_attn_scalar": 12}, "gemma3 does not multiply as the model does: attention 1.15"),
    ("smollm3", {"no_rope_layer_interval": 2}, "layers without rotation: 1, 3; llama.cpp's smollm3 has every 4th so"),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "layers without rotation: none; llama.cpp's smollm3 has every 4th"),
    (
        "olmo2",
        {"tie_word_embeddings": True},
        "the head is tied to the embedding; llama.cpp's olmo2 needs one of its own",
    ),
    ("olmo2", {"attention_bias": True}, "attention has biases; llama.cpp's olmo2 has none"),
    (
        "olmo3",
        {"layer_types": [FULL, *[SLIDING] * 3]},
        "layers that rotate by themselves: 1, 2, 3; llama.cpp's olmo2 has",
    ),
    (
        "olmo3",
        {"rope_scaling": None, **v5_rope("olmo3", 5e5, own=1e4)},
        "layers that slide rotate by θ 10000, the others by 500000; llama.cpp's olmo2 has one θ for both",
    ),
    ("olmo2", {"head_dim": 32}, "4 heads of 32 make 128 channels; llama.cpp's olmo2 needs as many as the hidden size"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=[message[:50] for _, _, message in REFUSED])
def test_layers_that_llama_cpp_has_otherwise_are_refused(
    pico: Pico, tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    model = yarn_model(pico, family, **changes)
    with pytest.raises(UnsupportedError) as refused:
        baked("gguf", model, own_recipe(model)[0], tmp_path)
    assert message in str(refused.value)
