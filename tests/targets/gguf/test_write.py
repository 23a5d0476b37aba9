# SPDX-License-Identifier: Apache-2.0
"""What a baked GGUF holds: metadata, tensors, and what is refused because it can hold none of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Result, recipe_for
from safetensors.numpy import load_file, save_file
from support.gguf_files import LONG, SHORT, WIDE, WINDOW, as_f32, bake, command, fields, interleaved, model_of, tensors
from support.pico import write_pico

from lrconvert import __version__
from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import UsageError
from lrconvert.recipe import write_recipe
from lrconvert.targets.gguf.schemes import SCHEMES

Pico = Callable[..., Model]
Cli = Callable[..., Result]
FAMILIES = ("llama", "mistral", "phi3", "qwen2", "granite")


# --- metadata --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_has_the_type_and_the_value_that_llama_cpp_reads(pico: Pico, tmp_path: Path, family: str) -> None:
    """All keys of a file, no more, no fewer; `rope.scaling.factor`, which stacks on the factors, is never one."""
    model = model_of(pico, family)
    recipe = recipe_for(model, even=True)
    found = fields(bake(model, recipe, tmp_path / "m.gguf", type="q8_0"))
    shape, attention = model.shape, float(as_f32(recipe.tiers[-1].attention_factor))
    a = family if family in ("phi3", "granite") else "llama"
    u32, f32, text = "UINT32", "FLOAT32", "STRING"
    own = {
        "block_count": (u32, 2),
        "context_length": (u32, 2 * WINDOW),
        "embedding_length": (u32, 64),
        "feed_forward_length": (u32, 96),
        "attention.head_count": (u32, 4),
        "attention.head_count_kv": (u32, shape.kv_heads),
        "attention.key_length": (u32, 16),
        "attention.value_length": (u32, 16),
        "attention.layer_norm_rms_epsilon": (f32, float(np.float32(1e-5))),
        "rope.dimension_count": (u32, 8 if family == "phi3" else 16),
        "rope.freq_base": (f32, 10000.0),
        "rope.scaling.type": (text, "longrope"),
        "rope.scaling.original_context_length": (u32, WINDOW),
        "rope.scaling.attn_factor": (f32, attention),
        "vocab_size": (u32, 101),
    }
    if family == "granite":
        scales = {"embedding_scale": 12.0, "residual_scale": 0.6, "attention.scale": 0.375, "logit_scale": 0.8}
        own |= {key: (f32, float(np.float32(value))) for key, value in scales.items()}
    stated = found.pop("lrconvert.recipe")
    assert stated[0] == text and json.loads(stated[1])["tiers"] == json.loads(recipe.to_json())["tiers"]
    name, label = found.pop("general.name"), found.pop("general.size_label")
    assert name[0] == label[0] == text and name[1].startswith("phi_3" if family == "phi3" else family)
    assert found == {
        "general.architecture": (text, a),
        "general.type": (text, "model"),
        "general.file_type": (u32, 7),
        "general.quantization_version": (u32, 2),
        **{f"{a}.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": (text, "none"),
        "lrconvert.version": (text, __version__),
        "lrconvert.family": (text, family),
    }


# Types that are noise without an importance matrix.
WEIGHTED = {"iq1_m", "iq1_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq3_xs", "iq3_xxs", "q2_k_s"}


@pytest.mark.parametrize("name", sorted(WEIGHTED))
def test_a_type_that_needs_an_importance_matrix_says_so(pico: Pico, tmp_path: Path, name: str) -> None:
    """Before anything is written."""
    model = model_of(pico, "llama", **WIDE)
    with pytest.raises(UsageError, match="needs an importance matrix"):
        bake(model, recipe_for(model, even=True), tmp_path / "m.gguf", type=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - WEIGHTED))
def test_the_file_type_is_the_schemes_and_norms_and_factors_are_f32_in_all_of_them(
    pico: Pico, tmp_path: Path, name: str
) -> None:
    """llama.cpp aborts on F16 factors; what the name of the type promises, most of the file has."""
    model = model_of(pico, "llama", **WIDE)
    path = bake(model, recipe_for(model, even=True), tmp_path / "m.gguf", type=name)
    found = tensors(path)
    for tensor in (SHORT, LONG, "output_norm.weight", "blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"):
        assert found[tensor][0] == "F32"
    file_type = gguf.LlamaFileType(fields(path)["general.file_type"][1]).name
    assert file_type.removeprefix("ALL_").removeprefix("MOSTLY_").lower() == SCHEMES[name].name
    assert found["blk.1.ffn_up.weight"][0] == SCHEMES[name].base.name


def test_a_licence_languages_and_base_models_come_from_the_card(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """As llama.cpp's own converter spells them; without a card the licence file says its name."""
    folder = write_pico(tmp_path / "My Model", max_position_embeddings=WINDOW)
    (folder / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004")
    recipe = recipe_for(open_model(folder), even=True)

    def general(name: str) -> dict[str, tuple[str, Any]]:
        found = fields(bake(open_model(folder), recipe, tmp_path / name))
        return {key: value for key, value in found.items() if key.startswith("general.")}

    bare = general("a.gguf")
    assert bare["general.name"] == ("STRING", "My Model") and bare["general.license"] == ("STRING", "apache-2.0")
    assert not [key for key in bare if "base_model" in key or "languages" in key]
    card = {"license": "other", "license_name": "mine", "license_link": "https://a.b", "language": ["en", "de"],
            "base_model": ["org/One", "org/Two-7B"]}  # fmt: skip
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# Words")
    assert {key: value for key, value in general("b.gguf").items() if key not in bare or bare[key] != value} == {
        "general.license": ("STRING", "other"),
        "general.license.name": ("STRING", "mine"),
        "general.license.link": ("STRING", "https://a.b"),
        "general.languages": ("ARRAY STRING", ["en", "de"]),
        "general.base_model.count": ("UINT32", 2),
        "general.base_model.0.name": ("STRING", "One"),
        "general.base_model.0.repo_url": ("STRING", "https://huggingface.co/org/One"),
        "general.base_model.1.name": ("STRING", "Two-7B"),
        "general.base_model.1.repo_url": ("STRING", "https://huggingface.co/org/Two-7B"),
    }


# --- tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_sources_with_q_and_k_in_the_order_of_the_architecture(
    pico: Pico, tmp_path: Path, family: str
) -> None:
    """By gguf-py: q, k and their biases are interleaved for `llama` and `granite`, nothing is for `phi3`; the names are
    those of gguf-py's own table. Opened again, the model is the source's, and the factors are the recipe's."""
    model = model_of(pico, family)
    recipe = recipe_for(model, even=True)
    path = bake(model, recipe, tmp_path / "m.gguf")
    found, shape = tensors(path), model.shape
    architecture = gguf.MODEL_ARCH.PHI3 if family == "phi3" else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(architecture, shape.layers)
    expected: dict[str, Any] = {SHORT: recipe.tiers[0].factors, LONG: recipe.tiers[1].factors}
    for tensor in model.roles.values():
        role = tensor.role
        values = model.checkpoint.read(tensor.name)
        if family != "phi3" and role in ("q", "k", "q_bias", "k_bias"):
            values = interleaved(values, shape.heads if role[0] == "q" else shape.kv_heads)
        stem, _, suffix = tensor.name.rpartition(".")
        expected[f"{names.get_name(stem)}.{suffix}"] = values
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name][0] == "F32"
        np.testing.assert_array_equal(found[name][1].reshape(-1), as_f32(values).reshape(-1), err_msg=name)
    again = open_model(path)
    assert again.family.name == ("llama" if family == "mistral" else family)  # a GGUF does not say which
    for tensor in model.roles.values():
        np.testing.assert_array_equal(again.checkpoint.read(tensor.name), model.checkpoint.read(tensor.name))
    scaling = again.checkpoint.config["rope_scaling"]
    assert scaling["short_factor"] == as_f32(recipe.tiers[0].factors).tolist()
    assert scaling["long_factor"] == as_f32(recipe.tiers[1].factors).tolist()
    assert again.checkpoint.config["original_max_position_embeddings"] == WINDOW


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_model_has_one_embedding(tmp_path: Path, stored: bool) -> None:
    """No `output.weight`, even where the source stores the copy that some programs make."""
    folder = write_pico(tmp_path / "m", max_position_embeddings=WINDOW, tie_word_embeddings=True)
    if stored:
        all_tensors = load_file(folder / "model.safetensors")
        all_tensors["lm_head.weight"] = all_tensors["model.embed_tokens.weight"].copy()
        save_file(all_tensors, folder / "model.safetensors")
    model = open_model(folder)
    path = bake(model, recipe_for(model, even=True), tmp_path / "m.gguf")
    assert "output.weight" not in tensors(path) and open_model(path).shape.tied


def test_what_no_architecture_of_llama_cpp_computes_is_refused(pico: Pico, tmp_path: Path, cli: Cli) -> None:
    """Qwen3 (with the families that work), partial rotation in a Llama: exit code 4, nothing is written."""
    for model, words in (
        (pico("qwen3"), ("ignores rope factors for qwen3", "the recipe has 2 sets", "--static-long")),
        (pico("llama", partial_rotary_factor=0.5), ("8 of 16 channels rotate", "llama rotates whole heads")),
    ):
        recipe = write_recipe(recipe_for(model, even=True), tmp_path / "recipe", force=True)
        result = cli(*command(model.checkpoint.path, recipe, tmp_path / "m.gguf"))
        assert result.code == 4 and all(word in result.err for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe"]


@pytest.mark.parametrize("what", ["rope_theta", "rms_norm_eps", "window", "factors", "attention"])
def test_numbers_that_a_gguf_can_not_hold_are_refused(pico: Pico, tmp_path: Path, cli: Cli, what: str) -> None:
    """Metadata and factors are float32, lengths 31 bits: exit code 4 with the number, not infinity, zero or a crash. A
    recipe with such factors is refused where it is read."""
    changes = {"rope_theta": {"rope_theta": 1e39}, "rms_norm_eps": {"rms_norm_eps": 1e-50}}
    model = model_of(pico, "llama", **changes.get(what, {}))
    text = json.loads(recipe_for(model, even=True).to_json())
    last = text["tiers"][-1]
    last |= {"window": {"max_length": 2**31}, "factors": {"factors": [1e39] * 8}}.get(what, {})
    if what == "attention":
        text["tiers"][0]["attention_factor"] = last["attention_factor"] = 1e-50
    (tmp_path / "r.json").write_text(json.dumps(text))
    result = cli(*command(model.checkpoint.path, tmp_path / "r.json", tmp_path / "m.gguf"))
    expected = 3 if what in ("factors", "attention") else 4
    assert result.code == expected and len(result.err.splitlines()) == 1, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_values_beyond_the_type_are_refused_and_nothing_is_left(
    tmp_path: Path, kind: str, cli: Cli, plain: tuple[Path, Path]
) -> None:
    """F16 overflow is found while weights are written: exit code 4, the tensor's name, the old artifact stays."""
    folder = write_pico(tmp_path / "huge", max_position_embeddings=WINDOW)
    values = load_file(folder / "model.safetensors")
    values["model.layers.1.mlp.up_proj.weight"] *= np.float32(1e9)
    save_file(values, folder / "model.safetensors")
    output = tmp_path / "out" / "m.gguf"
    assert cli(*command(folder, plain[1], output, "--type", kind)).code == 4
    assert not output.parent.exists()
    assert cli(*command(plain[0], plain[1], output)).code == 0
    before = {path.name: path.read_bytes() for path in output.parent.iterdir()}
    result = cli(*command(folder, plain[1], output, "--type", kind, "--force"))
    assert result.code == 4 and "blk.1.ffn_up.weight holds values beyond" in result.err and "--type bf16" in result.err
    assert {path.name: path.read_bytes() for path in output.parent.iterdir()} == before
