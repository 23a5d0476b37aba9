# SPDX-License-Identifier: Apache-2.0
"""MiniCPM against a definition of its own, and as a Llama with its multipliers in the weights.

transformers has no class for it. The definition follows what its published modeling code computes: a decoder like
Llama's with the embedding times scale_emb, what every layer adds times scale_depth / sqrt(layers), and hidden states
divided by hidden_size / dim_model_base before the head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, own_name, recipe_for
from support.float64 import EXACT, TOKENS, by_reference, in_float64
from support.gguf_pico import make_pico
from support.onnx_files import write_adapter
from support.pico import write_pico
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.artifact.manifest import Manifest
from lrconvert.checkpoint import Model, fold, open_model
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.checkpoint.fold import in_weights
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.evals.subject import Subject, computed
from lrconvert.parity import Options
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.transformers import WORKER
from lrconvert.targets import hf

pytestmark = pytest.mark.usefixtures("remembered")

torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")
transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")

Pico = Callable[..., Model]
KEYS = ("scale_emb", "scale_depth", "dim_model_base")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": None},  # there is no other head then
    {"tie_word_embeddings": False, "attention_bias": True, "num_hidden_layers": 3},
    {"num_key_value_heads": 1, "scale_emb": 2.5, "scale_depth": 1.4},
    {"num_key_value_heads": 4, "head_dim": None, "mup_denominator": 32},
    {"dim_model_base": 64, "scale_emb": 1},  # both ends alike
    dict.fromkeys(KEYS),  # all 1, so the head is divided by the hidden size
]


def defined(folder: Path) -> np.ndarray:
    """Logits by that definition, in NumPy's float64, token by token, from the folder's own files."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    w = {name: values.astype(np.float64) for name, values in load_file(folder / "model.safetensors").items()}
    layers, hidden, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    groups, each = config["num_key_value_heads"], config.get("head_dim") or hidden // heads
    depth = config.get("scale_depth", 1) / np.sqrt(layers)
    width = hidden / config.get("dim_model_base", 1)
    pairs = each // 2
    turn = np.exp(1j * np.outer(np.arange(len(TOKENS)), config["rope_theta"] ** (-np.arange(pairs) / pairs)))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def turned(x: np.ndarray) -> np.ndarray:  # [tokens, heads, each]
        spun = (x[..., :pairs] + 1j * x[..., pairs:]) * turn[:, None]
        return np.concatenate([spun.real, spun.imag], axis=-1)

    x = w["model.embed_tokens.weight"][TOKENS] * config.get("scale_emb", 1)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (linear(y, f"{at}.self_attn.{part}_proj").reshape(len(TOKENS), -1, each) for part in "qkv")
        q, k = turned(q), turned(k)
        mixed = np.empty_like(q)
        for head in range(heads):
            group = head // (heads // groups)
            scores = q[:, head] @ k[:, group].T / np.sqrt(each)
            scores[np.triu_indices(len(TOKENS), 1)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = share / share.sum(-1, keepdims=True) @ v[:, group]
        x = x + linear(mixed.reshape(len(TOKENS), -1), f"{at}.self_attn.o_proj") * depth
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (linear(y, f"{at}.mlp.{part}_proj") for part in ("gate", "up"))
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{at}.mlp.down_proj") * depth
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") / width @ head.T


def as_llama(model: Model) -> np.ndarray:
    """Logits of transformers' Llama on the folded weights, in float64 throughout."""
    made = in_weights(model, rounded=False)
    config = transformers.AutoConfig.for_model(**made.checkpoint.config)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    assert type(network).__name__ == "LlamaForCausalLM"
    names = {tensor.name for tensor in made.roles.values()}
    weights = {name: torch.from_numpy(made.checkpoint.read(name).astype(np.float64)) for name in names}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if made.shape.tied else set())
    network.tie_weights()
    network = in_float64(network.eval(), made.shape.theta, made.shape.rotary_dim)
    with torch.no_grad():
        return network(torch.as_tensor(TOKENS)[None]).logits[0].numpy()


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()))
def test_it_is_its_definition_and_a_llama_with_other_weights(
    pico_folder: Callable[..., Path], changes: dict[str, Any]
) -> None:
    """The reference, the reference on folded weights and transformers' Llama on them, against the definition."""
    folder = pico_folder("minicpm", **changes)
    model, wanted = open_model(folder), defined(folder)
    assert np.abs(by_reference(model) - wanted).max() <= EXACT
    made = in_weights(model, rounded=False)
    assert made.family.name == "llama" and made.shape.tied == (model.shape.tied and changes.get("scale_emb") == 1)
    assert np.abs(by_reference(made) - wanted).max() <= EXACT
    assert np.abs(as_llama(model) - wanted).max() <= EXACT


@pytest.mark.parametrize("name", ["embedding", "residual", "logits"])
def test_without_a_multiplier_it_is_far_off(pico_folder: Callable[..., Path], name: str) -> None:
    folder = pico_folder("minicpm")
    model = open_model(folder)
    dropped = replace(model, shape=replace(model.shape, multipliers=replace(model.shape.multipliers, **{name: 1.0})))
    assert np.abs(by_reference(dropped) - defined(folder)).max() > 1e6 * EXACT


def test_a_family_with_a_class_stays_as_it_is(pico: Pico) -> None:
    model = pico("granite")
    assert in_weights(model) is model


# --- folders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    interpreter = Interpreter(WORKER)
    yield Options(threads=1, interpreter=interpreter)
    interpreter.close()


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False}, {"dtype": "bf16"}),
        ({}, {"portable": True}),
        ({"attention_bias": True}, {"dtype": "f16", "portable": True}),
    ],
    ids=["tied", "bf16", "portable", "f16 portable"],
)
def test_a_folder_is_a_llama_that_says_so(
    pico: Pico, tmp_path: Path, changes: dict[str, Any], more: dict[str, Any], options: Options
) -> None:
    """Both codes are right on both sides of the window, the fold is exact in float64, and the manifest names it."""
    model = pico("minicpm", **changes)
    recipe = recipe_for(model, even=True)
    recipe = replace(recipe, tiers=tuple(replace(tier, attention_factor=1.3) for tier in recipe.tiers))
    artifact = own_name(tmp_path / "a")
    bake(hf.plan(model, recipe, artifact, hf.Options(**more)))
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    exact = {row.case: row.kl_mean for row in report.rows if row.code == "multipliers" and row.verdict == "pass"}
    assert set(exact) == {"folded multipliers at 64", "folded multipliers at 128"}
    assert max(value or 0 for value in exact.values()) < 1e-14
    config = json.loads((artifact / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["tie_word_embeddings"] is False and not set(KEYS) & set(config)
    manifest = Manifest.read(artifact)
    assert manifest.bake.written_as == "llama"
    (note,) = [note for note in manifest.notes if "written as a llama" in note]
    assert "embedding 12, o and down 0.636396103, head 1.25" in note
    assert ("untied" in note) == model.shape.tied
    assert open_model(artifact).family.name == "llama"


def test_shards_and_an_index_get_the_new_head(
    pico_folder: Callable[..., Path], tmp_path: Path, options: Options
) -> None:
    """Of a sharded model, with and without a stored copy of the tied head: one head in all files, the scaled one."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    for copied in (False, True):
        folder = write_pico(tmp_path / f"m{copied}", "minicpm", shards=3)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        if copied:
            embedding = index["weight_map"]["model.embed_tokens.weight"]
            other = next(file for file in sorted(set(index["weight_map"].values())) if file != embedding)
            tensors = load_file(folder / other)
            tensors["lm_head.weight"] = load_file(folder / embedding)["model.embed_tokens.weight"]
            save_file(tensors, folder / other, metadata={"format": "pt"})
            index["weight_map"]["lm_head.weight"] = other
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        model = open_model(folder)
        artifact = own_name(tmp_path / "a")
        bake(hf.plan(model, recipe_for(model, even=True), artifact))
        assert verify(artifact, options=options).passed
        heads = []
        for file in artifact.glob("*.safetensors"):
            with safe_open(file, "np") as opened:
                heads += [opened.get_tensor(name) for name in opened.keys() if name == "lm_head.weight"]  # noqa: SIM118
        assert len(heads) == 1
        stored = model.checkpoint.read("model.embed_tokens.weight")
        np.testing.assert_array_equal(heads[0], (stored.astype(np.float64) * 1.25).astype(np.float32))


@pytest.mark.parametrize("role", ["embedding", "o", "down", "lm_head"])
def test_a_fold_that_forgets_a_weight_is_caught(
    pico: Pico, tmp_path: Path, role: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artifact and reference would be wrong alike: the check of the fold itself sees it."""
    model = pico("minicpm")
    right = dict(fold.CARRIERS)
    monkeypatch.setattr(fold, "CARRIERS", {n: tuple(r for r in roles if r != role) for n, roles in right.items()})
    artifact = own_name(tmp_path / "a")
    bake(hf.plan(model, recipe_for(model, even=True), artifact))
    report = verify(artifact, options=replace(options, backends=("custom",)))
    assert {row.code for row in report.failed} == {"multipliers"}
    monkeypatch.setattr(fold, "CARRIERS", right)
    report = verify(artifact, options=replace(options, backends=("custom",)))
    assert "custom" in {row.code for row in report.failed}


@pytest.mark.parametrize("mutant", ["swapped sets", "no attention factor", "boundary one late"])
def test_mutants_of_the_rotation_are_caught_in_the_llama_too(
    pico: Pico, tmp_path: Path, mutant: str, options: Options
) -> None:
    model = pico("minicpm")
    recipe = recipe_for(model, even=True)
    wrong, artifact = RECIPE_MUTANTS[mutant](recipe), own_name(tmp_path / "a")
    assert wrong is not None
    bake(hf.plan(model, wrong, artifact))
    report = verify(artifact, against=model.reference, recipe=recipe, options=options)
    for code in ("native", "custom"):
        caught = [row for row in report.failed if row.code == code]
        assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > 100


def test_it_outlives_its_source(pico_folder: Callable[..., Path], tmp_path: Path, options: Options) -> None:
    """Its own weights are a llama's, whatever family the recipe names."""
    import shutil

    source = Path(shutil.copytree(pico_folder("minicpm"), tmp_path / "m"))
    model, artifact = open_model(source), own_name(tmp_path / "a")
    bake(hf.plan(model, recipe_for(model, even=True), artifact))
    shutil.rmtree(source)
    _, spec = computed(Subject.of(str(artifact)))  # what an evaluation computes
    assert spec.family == "llama" and [tier.max_length for tier in spec.tiers] == [64, 128]
    report = verify(artifact, options=options)
    assert report.passed and any("own weights" in note for note in report.notes)


def test_an_adapter_is_merged_before_the_fold(pico: Pico, tmp_path: Path, options: Options) -> None:
    """Of a projection that carries a multiplier: its product is multiplied too, and weights are rounded once."""
    model = pico("minicpm")
    name = "model.layers.1.self_attn.o_proj"
    adapter = open_adapter(str(write_adapter(tmp_path / "adapter", {name: (64, 64)})))
    artifact = own_name(tmp_path / "a")
    bake(hf.plan(model, recipe_for(model, even=True), artifact, adapter=adapter))
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    whole = merged(model, adapter, rounded=False).checkpoint.read(f"{name}.weight").astype(np.float64)
    found = open_model(artifact).checkpoint.read(f"{name}.weight")
    np.testing.assert_allclose(found, whole * model.shape.multipliers.residual, rtol=1e-6, atol=1e-7)


def test_a_record_of_another_family_is_refused(pico: Pico, tmp_path: Path) -> None:
    from lrconvert.artifact.record import BakeRecord
    from lrconvert.parity.expected import expected

    model = pico("minicpm")
    spec = model.resolve(recipe_for(model, even=True))
    with pytest.raises(InputError, match="written as 'phi3', which minicpm never is"):
        expected(model, spec, BakeRecord(128, written_as="phi3"), tmp_path)


# --- what else reads it ----------------------------------------------------------------------------------


def test_the_search_computes_the_model(pico: Pico) -> None:
    """Losses in memory are the reference's."""
    from lrconvert.runtimes.base import scores_of
    from lrconvert.training.loaded import LoadedModel

    model = pico("minicpm")
    wanted = scores_of(by_reference(model)[:-1], TOKENS[1:]).losses
    found = LoadedModel(model, device="cpu").losses(TOKENS[None])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_fine_tuning_is_refused_with_the_way_out(pico: Pico) -> None:
    from lrconvert.training.tuning import TuneOptions, load_trainable

    with pytest.raises(UnsupportedError) as refused:
        load_trainable(pico("minicpm"), TuneOptions())
    assert "minicpm has no class in transformers" in str(refused.value) and "lrconvert hf" in str(refused.value)


def test_sparse_attention_is_remarked_on(pico_folder: Callable[..., Path]) -> None:
    model = open_model(pico_folder("minicpm", sparse_config={"kernel_size": 32, "dense_len": 8192}))
    assert any("sparse attention (InfLLM) is not converted" in note for note in model.notes)
    assert not any("sparse" in note for note in open_model(pico_folder("minicpm")).notes)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"scale_depth": 0}, 3, "scale_depth is 0; a positive number is needed"),
        ({"dim_model_base": 0.0}, 3, "dim_model_base is 0.0; a positive number is needed"),
        ({"use_mup": True, "embedding_multiplier": 2.0}, 4, "use_mup True, embedding_multiplier 2.0"),
        ({"kv_lora_rank": 256}, 4, "kv_lora_rank 256"),
    ],
)
def test_the_command_line_refuses_by_name(
    tmp_path: Path, cli: Callable[..., Result], changes: dict[str, Any], code: int, message: str
) -> None:
    folder = write_pico(tmp_path / "m", "minicpm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    result = cli("gguf", folder, "-o", tmp_path / "o.gguf")
    assert result.code == code and message in result.err


def test_a_gguf_that_leaves_scales_out_is_refused(tmp_path: Path) -> None:
    """llama.cpp takes others than 1 then, and not the same ones in every version."""
    made = make_pico(tmp_path / "m.gguf", "minicpm", edit=lambda w: w.add_float32("minicpm.logit_scale", 9.0))
    with pytest.raises(InputError) as caught:
        open_model(made.path)
    assert "missing metadata: minicpm.embedding_scale, minicpm.residual_scale" in str(caught.value)
