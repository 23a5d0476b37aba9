# SPDX-License-Identifier: Apache-2.0
"""The language model of a larger one: what is left out, what it computes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import own_name
from support.cases import case
from support.float64 import EXACT, TOKENS, by_reference, divided_in_float64, in_float64
from support.larger import CLASSES, LAYERS, published, saved
from support.pico import write_pico
from support.verifying import options_by_target, verify

from lrconvert.api.baking import plan_bake
from lrconvert.api.inspecting import inspect
from lrconvert.artifact.bake import bake
from lrconvert.artifact.manifest import Manifest
from lrconvert.checkpoint import open_model
from lrconvert.cli import run
from lrconvert.errors import InputError, LrconvertError, UnsupportedError, UsageError
from lrconvert.families.parts import PARTS
from lrconvert.families.query_scale import QueryScale
from lrconvert.parity import Options
from lrconvert.recipe.importing import import_recipe
from lrconvert.recipe.models import derive_for

LONGROPE = {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.5, 3.5, 4.5]}
SCALED = {"rope_scaling": LONGROPE, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def options() -> Iterator[Callable[[str], Options]]:
    with options_by_target() as get:
        yield get


# --- what it computes -------------------------------------------------------------------------------------


def natively(folder: Path) -> np.ndarray:
    """Logits of transformers' own class for text alone, in float64."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText if "mistral3" in folder.name else AutoModelForCausalLM
    network = loader.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    shape = open_model(folder, text_only=True).shape
    network = in_float64(network, shape.theta, shape.rotary_dim)
    with torch.no_grad(), divided_in_float64():
        return network(input_ids=torch.as_tensor(TOKENS)[None]).logits[0].numpy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_logits_are_those_of_the_whole_model(kind: str, tied: bool, tmp_path: Path) -> None:
    """Of text. The random heads differ, so that a wrong one would show."""
    folder = saved(tmp_path / kind, kind, tie_word_embeddings=tied)
    model = open_model(folder, text_only=True)
    assert model.shape.tied is tied and model.family.name in ("phi3", "mistral", "ministral3")
    expected = natively(folder)
    assert float(np.abs(by_reference(model) - expected).max()) <= EXACT
    assert float(np.abs(expected).max()) > 1e-3


def test_a_scale_of_queries_stays_in_the_language_model(tmp_path: Path, options: Callable[[str], Options]) -> None:
    """A newer Mistral 3, in every format."""
    source = saved(tmp_path / "mistral3", "mistral3 of ministral3")
    for target in ("hf", "onnx", "gguf"):
        artifact = own_name(tmp_path / "a")
        artifact = artifact.with_suffix(".gguf") if target == "gguf" else artifact
        bake(plan_bake(target, source, None, artifact, text_only=True))
        assert open_model(artifact).shape.query_scale == QueryScale(0.5, 13)
        report = verify(artifact, options=options(target))
        assert report.passed, report.summary


@pytest.mark.parametrize("kind", ["phi3_v", "phi4mm"])
def test_adapters_and_images_change_nothing(kind: str, tmp_path: Path) -> None:
    """Published layouts: the same logits as the plain phi3 that they were made of."""
    plain = open_model(write_pico(tmp_path / "plain", "phi3"))
    model = open_model(published(tmp_path / kind, kind), text_only=True)
    assert model.roles.keys() == plain.roles.keys()
    assert np.array_equal(by_reference(model), by_reference(plain))


@pytest.mark.parametrize(("kind", "target"), [("phi4mm", "hf"), ("phi3_v", "gguf"), ("phi4mm", "onnx")])
def test_artifacts_are_verified_with_the_rotation_that_it_carries(
    kind: str, target: str, tmp_path: Path, options: Callable[[str], Options]
) -> None:
    """On both sides of the window, against the larger model; the manifest counts what was left out."""
    source = published(tmp_path / kind, kind, shards=3, partial_rotary_factor=0.5, **SCALED)
    artifact = own_name(tmp_path / "a")
    artifact = artifact.with_suffix(".gguf") if target == "gguf" else artifact
    bake(plan_bake(target, source, None, artifact, text_only=True))
    report = verify(artifact, options=options(target))
    assert report.passed, report.summary
    assert any(row.verdict == "pass" and "256" in row.case for row in report.rows) or target == "gguf"
    found = Manifest.read(artifact).source["part_of"]
    adapters = {f"*.lora_[AB].{name}.weight": 8 * LAYERS for name in ("vision", "speech")}
    assert (
        found
        == {
            "phi3_v": {"model_type": "phi3_v", "left_out": {"model.vision_embed_tokens.*": 3}},
            "phi4mm": {"model_type": "phi4mm", "left_out": {"model.embed_tokens_extend.*": 2, **adapters}},
        }[kind]
    )
    if target == "hf":
        files = sorted(path.name for path in artifact.glob("*.safetensors"))
        index = json.loads((artifact / "model.safetensors.index.json").read_text())
        assert (
            files
            == sorted(set(index["weight_map"].values()))
            == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]
        )
        config = json.loads((artifact / "config.json").read_text())
        assert config["model_type"] == "phi3" and not {"embd_layer", "audio_processor", "vision_lora"} & config.keys()
        assert set(index["weight_map"]) == {tensor.name for tensor in open_model(artifact).roles.values()}


def test_an_artifact_of_another_language_model_fails(tmp_path: Path, options: Callable[[str], Options]) -> None:
    """The larger model is what is compared with: weights of the adapter merged in, say, are found."""
    source = published(tmp_path / "phi4mm", "phi4mm", **SCALED, partial_rotary_factor=0.5)
    bake(plan_bake("hf", source, None, tmp_path / "a", text_only=True))
    from safetensors.numpy import load_file, save_file

    name = "model.layers.1.self_attn.o_proj"
    stored = load_file(source / "model.safetensors")
    b, a = (stored[f"{name}.lora_{side}.vision.weight"] for side in "BA")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    weights[f"{name}.weight"] += 2.0 * b @ a
    save_file(weights, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    report = verify(tmp_path / "a", options=options("hf"))
    assert not report.passed and any(f"{name}.weight" in row.reason for row in report.rows if row.verdict == "fail")


# --- asking for it ----------------------------------------------------------------------------------------


def test_without_the_flag_it_is_refused_and_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / "phi4mm", "phi4mm")
    assert run(["hf", str(source), "-o", str(tmp_path / "a")]) == 4 and not (tmp_path / "a").exists()
    said = capsys.readouterr().err
    for part in ("phi4mm holds more than a language model", "images and sound", "the adapter for sound", "--text-only"):
        assert part in said
    found = inspect(source)
    assert (found.family, found.part_of) == ("phi3", "phi4mm")
    assert (
        "left out: 2 of images and sound (model.embed_tokens_extend.*), 16 of the adapter for images" in found.notes[0]
    )


def test_other_requests_that_are_refused(tmp_path: Path) -> None:
    plain = write_pico(tmp_path / "plain", "llama")
    with pytest.raises(UsageError, match=r"--text-only: .* is a language model alone"):
        open_model(plain, text_only=True)
    quantised = published(tmp_path / "q", "phi3_v", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedError, match="a quantised phi3_v"):
        open_model(quantised, text_only=True)


def _mistral3_config(**text: Any) -> dict[str, Any]:
    return {"model_type": "mistral3", "text_config": {"model_type": "mistral", **text}, "vision_config": {}}


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[LrconvertError], str]] = {
    "no section": (lambda _: {"model_type": "mistral3"}, InputError, "text_config is None; the settings of mistral3's"),
    "a list for a section": (lambda _: _mistral3_config() | {"text_config": []}, InputError, r"text_config is \[\]"),
    "a scale that grows": (
        lambda _: _mistral3_config(rope_parameters={"rope_type": "default", "llama_4_scaling_beta": 0.1}),
        UnsupportedError,
        r"llama_4_scaling_beta 0\.1 in the rotary settings: a key that changes what .* mistral",
    ),
    "a family that isn't read": (
        lambda _: _mistral3_config(model_type="gpt9"),
        UnsupportedError,
        "'gpt9' is not a family",
    ),
    "no family": (lambda _: _mistral3_config(model_type=None), UnsupportedError, "None is not a family"),
    "a scale of attention": (
        lambda config: config | {"attention_multiplier": 2.0},
        UnsupportedError,
        "attention_multiplier 2.0",
    ),
}


def test_configs_that_are_refused(tmp_path: Path) -> None:
    source = published(tmp_path / "phi3_v", "phi3_v")
    whole = json.loads((source / "config.json").read_text())
    for name, (change, error, words) in BAD.items():
        (source / "config.json").write_text(json.dumps(change(dict(whole))))
        with case(name), pytest.raises(error, match=words):
            open_model(source, text_only=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.0.mlp.down_proj.weight": (4, 4)}, "base_layer.weight and .* are the same tensor"),
        ({"model.vision_tower.x": (4, 4)}, "tensors that phi3 does not have: model.vision_tower.x"),
        ({"model.layers.0.mlp.down_proj.lora_A.default.weight": (4, 4)}, "does not have: .*lora_A.default.weight"),
        ({"model.norm.weight": None}, "missing tensors: model.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Nothing is left out but what a pattern names."""
    from safetensors.numpy import load_file, save_file

    source = published(tmp_path / "phi4mm", "phi4mm")
    tensors = load_file(source / "model.safetensors")
    for name, shape in change.items():
        tensors.pop(name, None)
        tensors |= {} if shape is None else {name: np.zeros(shape, np.float32)}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match=words):
        open_model(source, text_only=True)


# --- recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["phi3_v", "phi4mm"])
def test_their_configs_are_recipes(kind: str, tmp_path: Path) -> None:
    """Under the name of the language model, which they fit: a phi3 extended elsewhere takes them."""
    source = published(tmp_path / kind, kind, partial_rotary_factor=0.5, **SCALED)
    for reference in (source, source / "config.json"):
        recipe, notes = import_recipe([str(reference)])
        assert (recipe.family, recipe.rotary_dim, recipe.original_window) == ("phi3", 8, 64)
        assert [tier.factors[-1] for tier in recipe.tiers] == [1.3, 4.5]
        assert f"the language model of a {kind}" in notes[0]
    plain = write_pico(tmp_path / "plain", "phi3")
    plan = plan_bake("hf", plain, source, tmp_path / "a")
    assert plan.spec.tiers[-1].factors == tuple(LONGROPE["long_factor"])


def test_mistral3_config_is_a_recipe_of_mistral(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mistral3", "mistral3")
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    config["text_config"] |= {"rope_parameters": scaling, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config))
    recipe, _ = import_recipe([str(folder)])
    assert recipe.family == "mistral"
    model = open_model(folder, text_only=True)
    assert model.rotation.kind == "yarn" and model.resolve(recipe).window == 256


def test_every_part_names_what_it_leaves_out() -> None:
    for name, part in PARTS.items():
        assert part.left_out and (part.family is None) == (part.section is not None), name


def test_derive_stands_on_the_language_model(tmp_path: Path) -> None:
    source = published(tmp_path / "phi4mm", "phi4mm", partial_rotary_factor=0.5, **SCALED)
    recipe, _ = derive_for(str(source), "yarn", factor=4)
    assert (recipe.family, [tier.max_length for tier in recipe.tiers]) == ("phi3", [64, 256, 1024])
