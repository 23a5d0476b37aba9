# SPDX-License-Identifier: Apache-2.0
"""A merged view against peft's own merge, features that aren't merged refused by name, hostile adapters."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf-modules-"))

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.pico import write_pico

from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.adapter import CONFIG, EMBEDDING, LM_HEAD, MergedCheckpoint, merged, open_adapter
from lrconvert.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from lrconvert.checkpoint.adapter_config import NEUTRAL, read_adapter_config
from lrconvert.errors import EnvironmentFailure, InputError, LrconvertError, UnsupportedError

Q0 = "model.layers.0.self_attn.q_proj"
# What float32 sums of r products may differ by between two BLAS, relative to the largest weight. Measured
# here: not one bit for LoRA, 2e-7 for DoRA (its row norms); a scale that is 1 % off moves 5e-3 and more.
ROUNDING = 1e-6


# --- making and merging with peft ------------------------------------------------------------------------


def torch_and_peft() -> tuple[Any, Any, Any]:
    torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")
    return torch, pytest.importorskip("transformers"), pytest.importorskip("peft", reason="needs peft")


def load(folder: Path, dtype: str = "float32") -> Any:
    torch, transformers, _ = torch_and_peft()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def make_adapter(base: Path, path: Path, *, bf16: bool = False, **config: Any) -> Path:
    """An adapter that peft creates and saves, every trained value random."""
    torch, _, peft = torch_and_peft()
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(load(base), peft.LoraConfig(init_lora_weights=False, **(settings | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    if bf16:
        tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(path / ADAPTER_WEIGHTS).items()}
        save_file(tensors, path / ADAPTER_WEIGHTS)
    return path


def with_peft(base: Path, adapter: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    """What `merge_and_unload` leaves, widened to float32."""
    _, _, peft = torch_and_peft()
    model = peft.PeftModel.from_pretrained(load(base, dtype), adapter).merge_and_unload()
    return {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}


def with_ours(base: Path, adapter: Path, **options: Any) -> Model:
    return merged(open_model(base), open_adapter(adapter), **options)


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """Every tensor of a model, widened; the head of a tied one too, as transformers lists it."""
    found = {name: model.checkpoint.read(name).astype(np.float32) for name in model.checkpoint.tensors}
    return found if not model.shape.tied else {LM_HEAD: found[EMBEDDING], **found}


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference, relative to the largest weight of its tensor."""
    assert set(ours) == set(theirs)
    return max(float(np.abs(ours[n] - theirs[n]).max() / np.abs(theirs[n]).max()) for n in ours)


def edit_config(adapter: Path, copy: Path, **changes: Any) -> Path:
    shutil.copytree(adapter, copy)
    config = json.loads((adapter / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps({**config, **changes}))
    return copy


def scaled(adapter: Path, copy: Path, by: float = 1.01) -> Path:
    """The adapter with every α multiplied: the control."""
    config = json.loads((adapter / CONFIG).read_text())
    patterns = {key: by * alpha for key, alpha in config["alpha_pattern"].items()}
    return edit_config(adapter, copy, lora_alpha=by * config["lora_alpha"], alpha_pattern=patterns)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"target_modules": ALL}),
    "rslora": ("llama", {}, {"use_rslora": True}),
    "dora": ("llama", {}, {"use_dora": True, "target_modules": ALL}),
    "dora rslora": ("llama", {}, {"use_dora": True, "use_rslora": True}),
    "patterns": (
        "llama",
        {},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "q_proj": 3, "down_pro": 100, ".*down_proj": 7.5},
        },
    ),
    "rslora patterns": (
        "llama",
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    ),
    "lm_head untied": ("llama", {}, {"modules_to_save": ["lm_head"]}),
    "embedding untied": ("llama", {}, {"modules_to_save": ["embed_tokens"]}),
    "norm names every norm": ("llama", {}, {"modules_to_save": ["norm"]}),
    "a whole block saved": ("llama", {}, {"modules_to_save": ["layers.1.mlp"], "target_modules": ["q_proj"]}),
    "lora on lm_head": ("llama", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "lora on the embedding": ("llama", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "rslora on the embedding": ("llama", {}, {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "tied": ("llama", TIED, {}),
    "tied, lm_head saved": ("llama", TIED, {"modules_to_save": ["lm_head"]}),
    "tied, embedding saved": ("llama", TIED, {"modules_to_save": ["embed_tokens"]}),
    "tied, both saved": ("llama", TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, tie ensured": ("llama", TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "fan_in_fan_out": ("llama", {}, {"fan_in_fan_out": True}),
    "some layers": ("llama", {}, {"layers_to_transform": [1]}),
    "mica": ("llama", {}, {"init_lora_weights": "mica"}),
    "orthogonal": ("llama", {}, {"init_lora_weights": "orthogonal"}),
    "phi3 fused": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "phi3 fused dora": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    "qwen2 with biases": ("qwen2", {}, {"target_modules": ALL}),
    "qwen2 saved biases": ("qwen2", {}, {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]}),
    "qwen3": ("qwen3", {}, {"target_modules": ALL, "modules_to_save": ["q_norm"]}),
    "mistral tied": ("mistral", {}, {"target_modules": ALL}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_merge_is_what_peft_computes(case: str, pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    """In float32, every tensor, to rounding; and the same comparison sees a scale that is 1 % off."""
    family, changes, config = CASES[case]
    base = pico_folder(family, **changes)
    init = config.get("init_lora_weights")
    adapter = make_adapter(base, tmp_path / "adapter", **{k: v for k, v in config.items() if k != "init_lora_weights"})
    if init:  # how the factors began is no concern of the merge
        adapter = edit_config(adapter, tmp_path / "init", init_lora_weights=init)
    theirs = with_peft(base, adapter)
    assert distance(tensors_of(with_ours(base, adapter)), theirs) < ROUNDING
    wrong = tensors_of(with_ours(base, scaled(adapter, tmp_path / "wrong")))
    assert distance(wrong, theirs) > 1000 * ROUNDING
    before = tensors_of(open_model(base))
    assert any(not np.array_equal(before[name], theirs[name]) for name in before)


@pytest.mark.filterwarnings("ignore")
def test_lora_is_pefts_bit_for_bit_on_this_machine(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Not one bit of a float32 merge differs. Holds where both BLAS sum in order, as all x86 ones we met do."""
    base = pico_folder("llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=ALL)
    ours, theirs = tensors_of(with_ours(base, adapter)), with_peft(base, adapter)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", [{"target_modules": ALL}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.filterwarnings("ignore")
def test_a_bf16_base_is_rounded_once(config: dict[str, Any], bf16: bool, tmp_path: Path) -> None:
    """Merged in float32 and rounded at the end: peft's elements. Maxima hide a wrong scale here; counts don't."""
    base = bf16_pico(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", bf16=bf16, **config)
    theirs = with_peft(base, adapter, "bfloat16")
    model = with_ours(base, adapter)
    assert {info.dtype for info in model.checkpoint.tensors.values()} == {"BF16"}
    assert model.checkpoint.read(Q0 + ".weight").dtype == ml_dtypes.bfloat16
    assert share_of_different(tensors_of(model), theirs) == 0
    wrong = with_ours(base, scaled(adapter, tmp_path / "wrong"))
    assert share_of_different(tensors_of(wrong), theirs) > 0.05


def bf16_pico(folder: Path, **options: Any) -> Path:
    write_pico(folder, **{"torch_dtype": "bfloat16", **options})
    for path in folder.glob("*.safetensors"):
        tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def share_of_different(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Of the elements of adapted tensors."""
    name = Q0 + ".weight"
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[n], theirs[n]) for n in ours if n.endswith("layernorm.weight"))
    return float((ours[name] != theirs[name]).mean())


@pytest.mark.filterwarnings("ignore")
def test_unrounded_reading_is_for_a_dtype_of_the_writer(tmp_path: Path) -> None:
    """The changed tensors in float32, the others as they are; rounding them gives the rounded view."""
    base = bf16_pico(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    wide, rounded = with_ours(base, adapter, rounded=False), with_ours(base, adapter)
    assert isinstance(wide.checkpoint, MergedCheckpoint)
    for name in wide.checkpoint.tensors:
        array = wide.checkpoint.read(name)
        assert (array.dtype == np.float32) == (name in wide.checkpoint.touched)
        np.testing.assert_array_equal(array.astype(ml_dtypes.bfloat16), rounded.checkpoint.read(name))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_one_end_of_a_tie_is_adapted_alone(
    config: dict[str, Any], pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """What was trained is peft's forward pass. (Its merge_and_unload adapts the shared tensor, so both ends or
    one end twice, and computes something else: the control.)"""
    torch, _, peft = torch_and_peft()
    base = pico_folder("llama", **TIED)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(load(base), adapter).eval()
        trained = model(tokens).logits
        merge = model.merge_and_unload()(tokens).logits
        ours = load(as_folder(with_ours(base, adapter), tmp_path / "ours"))(tokens).logits
    scale = float(trained.abs().max())
    assert float((ours - trained).abs().max()) < 1e-5 * scale
    if "modules_to_save" not in config:
        assert float((merge - trained).abs().max()) > 1e-2 * scale


def as_folder(model: Model, folder: Path) -> Path:
    """A merged model as plain files."""
    folder.mkdir()
    save_file({n: model.checkpoint.read(n) for n in model.checkpoint.tensors}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(model.checkpoint.config))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_broken_tie_is_in_config_notes_and_tensors(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = pico_folder("llama", **TIED)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    model = with_ours(base, adapter)
    assert model.checkpoint.config["tie_word_embeddings"] is False and not model.shape.tied
    assert ("lm_head", None) in model.roles
    assert [note for note in model.notes if "tie_word_embeddings is false" in note]
    kept = with_ours(base, make_adapter(base, tmp_path / "plain"))
    assert kept.shape.tied and LM_HEAD not in kept.checkpoint.tensors and not kept.notes


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_differs_from_a_tied_embedding_is_what_an_adapter_starts_from(tmp_path: Path) -> None:
    """What the file holds counts: the adapter's embedding replaces the embedding, and the head stays."""
    base = write_pico(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    other = np.ones_like(tensors[EMBEDDING])
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    save_file({**tensors, LM_HEAD: other}, base / "model.safetensors", metadata={"format": "pt"})
    model = with_ours(base, adapter)
    assert not model.shape.tied
    np.testing.assert_array_equal(model.checkpoint.read(LM_HEAD), other)


@pytest.mark.filterwarnings("ignore")
def test_embeddings_saved_without_modules_to_save_keep_the_tie(tmp_path: Path) -> None:
    """peft's save_embedding_layers: the shared tensor itself is replaced."""
    base = write_pico(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    fresh = np.random.default_rng(1).standard_normal((101, 64)).astype(np.float32)
    prefix = "base_model.model."
    for extra in ([EMBEDDING], [EMBEDDING, LM_HEAD]):
        save_file({**tensors, **{prefix + name: fresh for name in extra}}, adapter / ADAPTER_WEIGHTS)
        model = with_ours(base, adapter)
        assert model.shape.tied
        np.testing.assert_array_equal(model.checkpoint.read(EMBEDDING), fresh)
        if len(extra) == 1:
            assert distance(tensors_of(model), with_peft(base, adapter)) < ROUNDING
    save_file({**tensors, prefix + LM_HEAD: fresh}, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(InputError, match=r"lm_head\.weight \[101, 64\].*tied in the model"):
        with_ours(base, adapter)


def test_a_gguf_base_merges_on_its_dequantised_weights(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Names are Hugging Face names there, rows in their order; tensors keep the dtype that reading gives."""
    gguf = pytest.importorskip("gguf")
    base = open_model(pico_folder("llama"))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    shape = base.shape
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.window)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.theta)
    writer.add_key_length(shape.head_dim)
    writer.add_vocab_size(shape.vocab)
    for row in base.family.rows:
        for layer in range(shape.layers) if "{layer}" in row.hf else [0]:
            name = row.hf.replace("{layer}", str(layer))
            if name not in base.checkpoint.tensors:
                continue
            array = base.checkpoint.read(name)
            if row.role in ("q", "k"):
                heads = shape.heads if row.role == "q" else shape.kv_heads
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            wide = array if array.ndim == 1 or row.role != "gate" else array.astype(np.float16)
            writer.add_tensor(row.gguf.replace("{layer}", str(layer)), np.ascontiguousarray(wide))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = write_adapter(tmp_path / "adapter", {Q0: (64, 64), "model.layers.1.mlp.gate_proj": (96, 64)})
    ours = tensors_of(with_ours(tmp_path / "m.gguf", adapter))
    plain = tensors_of(with_ours(pico_folder("llama"), adapter))
    np.testing.assert_array_equal(ours[Q0 + ".weight"], plain[Q0 + ".weight"])
    assert distance(ours, plain) < 2**-10
    wide = with_ours(tmp_path / "m.gguf", adapter, rounded=False).checkpoint
    assert wide.read("model.layers.1.mlp.gate_proj.weight").dtype == np.float32


# --- adapters by hand ------------------------------------------------------------------------------------

MINIMAL: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}


def write_adapter(
    path: Path,
    modules: dict[str, tuple[int, int]] | None = None,
    *,
    tensors: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """An adapter in PEFT layout without peft: pairs for modules of a shape, or these tensors."""
    rng = np.random.default_rng(3)
    found = dict(tensors or {})
    for module, (rows, columns) in ({Q0: (64, 64)} if modules is None and tensors is None else modules or {}).items():
        found[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((4, columns)).astype(np.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((rows, 4)).astype(np.float32)
    path.mkdir(parents=True, exist_ok=True)
    save_file(found, path / ADAPTER_WEIGHTS)
    config = {**MINIMAL, **changes}
    (path / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return path


REFUSED: dict[str, Any] = {
    "peft_type": "LOHA",
    "bias": "lora_only",
    "lora_bias": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 1], [0, 2]],
    "use_qalora": True,
    "alora_invocation_tokens": [5, 6],
    "kasa_config": {"beta": 1e-4},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "velora_config": {"scale": 1.0},
    "monteclora_config": {"num_samples": 8},
    "megatron_config": {"hidden_size": 64},
    "task_type": "SEQ_CLS",
    "init_lora_weights": "pissa",
    "a_feature_of_tomorrow": {},
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_feature_that_is_not_merged_is_refused_by_name(key: str, pico: Callable[..., Model], tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", **{key: REFUSED[key]})
    with pytest.raises(UnsupportedError, match=key) as caught:
        merged(pico(), open_adapter(path))
    assert str(REFUSED[key])[:8].strip("[{'") in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "value", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PISSA", "new", 1, []]
)
def test_an_initialisation_that_alters_the_base_is_refused(value: Any, tmp_path: Path) -> None:
    """Saved without conversion, its factors belong to a base that nobody stored."""
    with pytest.raises(UnsupportedError, match="init_lora_weights") as caught:
        open_adapter(write_adapter(tmp_path / "adapter", init_lora_weights=value))
    known = isinstance(value, str) and value != "new"
    assert ("path_initial_model_for_weight_conversion" in str(caught.value)) == known


def test_all_refusals_come_together(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        open_adapter(write_adapter(tmp_path / "adapter", use_qalora=True, bias="all", new_thing=3))
    for needle in ("use_qalora True", "bias 'all'", "new_thing 3"):
        assert needle in str(caught.value)


def test_the_table_knows_every_field_of_peft() -> None:
    """And lets its defaults pass: what peft saves without any feature is merged."""
    peft = pytest.importorskip("peft", reason="needs peft")
    fields = peft.LoraConfig().to_dict()
    assert set(fields) - set(NEUTRAL) == set()
    assert set(NEUTRAL) - set(fields) <= {"runtime_config"}


def test_values_that_switch_a_feature_off_pass(tmp_path: Path) -> None:
    """Off in every spelling that peft takes for off, of known and unknown keys."""
    off = {
        "alora_invocation_tokens": [], "layer_replication": [], "use_bdlora": False,
        "new_thing": None, "new_switch": False, "runtime_config": {"x": 1}, "lora_dropout": 0.5, "revision": "main",
        "eva_config": {"rho": 2.0}, "corda_config": {}, "loftq_config": {"loftq_bits": 4}, "bias": "none",
        "init_lora_weights": "gaussian", "r": ..., "lora_alpha": ...,
    }  # fmt: skip
    assert open_adapter(write_adapter(tmp_path / "adapter", **off)).config.rank == 8


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"r": 0}, "r is 0; an integer from 1"),
        ({"r": True}, "r is True"),
        ({"r": 4.0}, "r is 4.0"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'; a number is needed"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"use_dora": 1}, "use_dora is 1; true or false"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern q_proj is -1"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern '(' is not a regular expression"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; a list"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
    ],
)
def test_a_value_that_is_none_is_named(changes: dict[str, Any], needle: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_adapter(write_adapter(tmp_path / "adapter", **changes))
    assert needle in str(caught.value)


@pytest.mark.parametrize("pattern", ["(a+)+", ".*.*.*.*.*", "(x|y)*z", "a{2}{3}" + "b*c*d*", "x" * 2000])
def test_a_pattern_that_could_run_for_ever_is_not_run(pattern: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", alpha_pattern={pattern: 2})
    with pytest.raises((UnsupportedError, InputError), match=r"regular expression"):
        open_adapter(path)


def test_patterns_match_as_in_peft(tmp_path: Path) -> None:
    """A suffix of whole name parts, or a regular expression of one; the first in the file wins."""
    other_module = pytest.importorskip("peft.utils.other", reason="needs peft")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "lm_head", "model.xq_proj"]
    patterns = [
        "q_proj",
        "layers.0.self_attn.q_proj",
        r".*\.1\d\..*",
        "^lm_head",
        "model.layers.0",
        "lm_hea",
        "a|lm_head",
    ]
    for first in patterns:
        for second in patterns:
            values = dict.fromkeys([first, second], 0) | {first: 1, second: 2}
            config = read_adapter_config(write_adapter(tmp_path / "adapter", rank_pattern=values) / CONFIG)
            for name in names:
                key = other_module.get_pattern_key(list(values), name)
                assert config.rank_of(name) == values.get(key, 4), (name, values)


# --- adapters for another base ---------------------------------------------------------------------------


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_an_adapter_for_another_base_lists_all_with_shapes(pico: Callable[..., Model], tmp_path: Path) -> None:
    """One error: tensors without a base tensor, halves of pairs, other shapes, other ranks."""
    layer = "base_model.model.model.layers"
    tensors = {
        f"{layer}.0.self_attn.q_proj.lora_A.weight": zeros(4, 128),
        f"{layer}.0.self_attn.q_proj.lora_B.weight": zeros(128, 4),
        f"{layer}.7.self_attn.q_proj.lora_A.weight": zeros(4, 64),
        f"{layer}.0.self_attn.k_proj.lora_A.weight": zeros(4, 64),
        f"{layer}.0.self_attn.o_proj.lora_A.weight": zeros(8, 64),
        f"{layer}.0.self_attn.o_proj.lora_B.weight": zeros(64, 8),
        f"{layer}.0.self_attn.v_proj.lora_B.bias": zeros(32),
        f"{layer}.0.mlp.up_proj.lora_embedding_A": zeros(4, 96),
        f"{layer}.1.input_layernorm.lora_A.weight": zeros(4, 64),
        "base_model.model.score.weight": zeros(2, 64),
        "base_model.model.model.norm.weight": zeros(65),
        "base_model.model.model.embed_tokens.lora_A.weight": zeros(4, 64),
    }
    path = write_adapter(tmp_path / "adapter", tensors=tensors)
    with pytest.raises(InputError) as caught:
        merged(pico(), open_adapter(path))
    text = str(caught.value)
    assert caught.value.exit_code == 3
    for needle in (
        "q_proj.lora_A.weight [4, 128]: [4, 64] is needed for model.layers.0.self_attn.q_proj.weight [64, 64]",
        "q_proj.lora_B.weight [128, 4]: [64, 4] is needed",
        "layers.7.self_attn.q_proj.lora_A.weight [4, 64]: the model has no model.layers.7.self_attn.q_proj.weight",
        "k_proj.lora_A.weight: one of A and B is missing",
        "o_proj.lora_A.weight [8, 64]: [4, 64] is needed",
        "v_proj.lora_B.bias [32]: the model has no",
        "up_proj.lora_embedding_A [4, 96]: no such part",
        "input_layernorm.lora_A.weight [4, 64]",
        "score.weight [2, 64]: the model has no score.weight",
        "norm.weight [65]: [64] is needed for model.norm.weight [64]",
        "embed_tokens.lora_A.weight [4, 64]: model.embed_tokens.weight takes lora_embedding_A and _B",
    ):
        assert needle in text


@pytest.mark.parametrize(
    ("extra", "changes", "needle"),
    [
        ({f"{Q0}.lora_magnitude_vector": zeros(64)}, {}, "a lora_magnitude_vector without use_dora"),
        ({}, {"use_dora": True}, "no lora_magnitude_vector with use_dora"),
        ({f"{Q0}.lora_magnitude_vector": zeros(65)}, {"use_dora": True}, "lora_magnitude_vector [65]: [64] is needed"),
        ({f"{Q0}.weight": zeros(64, 64)}, {}, "both replaced and adapted"),
        ({f"base_model.model.{Q0}.weight": zeros(64, 64)}, {}, "both replaced and adapted"),
        ({f"{Q0}.lora_A.weight": zeros(4, 64)}, {}, "are the same tensor"),
        ({"x.y": np.zeros(3, np.int64)}, {}, "x.y is I64; one of F64, F32"),
    ],
)
def test_tensors_that_contradict_each_other(
    extra: dict[str, Any], changes: dict[str, Any], needle: str, pico: Callable[..., Model], tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "adapter", {Q0: (64, 64)}, tensors=extra, **changes)
    with pytest.raises(InputError) as caught:
        merged(pico(), open_adapter(path))
    assert needle in str(caught.value)


def test_dora_on_an_embedding_is_refused_by_name(pico: Callable[..., Model], tmp_path: Path) -> None:
    module = "model.embed_tokens"
    tensors = {
        f"{module}.lora_embedding_A": zeros(4, 101),
        f"{module}.lora_embedding_B": zeros(64, 4),
        f"{module}.lora_magnitude_vector": zeros(101),
    }
    with pytest.raises(UnsupportedError, match="use_dora on an embedding"):
        merged(pico(), open_adapter(write_adapter(tmp_path / "adapter", tensors=tensors, use_dora=True)))


@pytest.mark.parametrize(("named", "noted"), [(None, False), ("org/other", True), ("elsewhere/{}", False)])
def test_another_name_of_the_base_is_a_note(
    named: str | None, noted: bool, pico: Callable[..., Model], tmp_path: Path
) -> None:
    model = pico()
    name = named and named.format(Path(model.reference).name)
    adapter = open_adapter(write_adapter(tmp_path / "adapter", base_model_name_or_path=name))
    assert bool([note for note in merged(model, adapter).notes if "was trained on org/other" in note]) == noted


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_values_that_are_not_finite_are_refused_when_they_are_read(
    value: float, pico: Callable[..., Model], tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "adapter")
    tensors = load_file(path / ADAPTER_WEIGHTS)
    tensors[f"base_model.model.{Q0}.lora_A.weight"][2, 3] = value
    save_file(tensors, path / ADAPTER_WEIGHTS)
    model = merged(pico(), open_adapter(path))
    with pytest.raises(InputError, match=rf"{Q0}\.weight: holds values that are not finite"):
        model.checkpoint.read(Q0 + ".weight")


def test_what_float16_can_not_hold_is_refused(tmp_path: Path) -> None:
    base = write_pico(tmp_path / "base")
    tensors = {name: array.astype(np.float16) for name, array in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", lora_alpha=1e6)
    with pytest.raises(UnsupportedError, match=rf"{Q0}\.weight: beyond float16's range.*--dtype bf16"):
        with_ours(base, adapter).checkpoint.read(Q0 + ".weight")


# --- files -----------------------------------------------------------------------------------------------


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter")
    (path / ADAPTER_WEIGHTS).rename(path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors.*pickle.*never opened"):
        open_adapter(path)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    """A folder without a config, a file, nothing at all, an empty file, a cut one, a pipe, no tensors."""
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        open_adapter(tmp_path)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        open_adapter("demo")
    with pytest.raises(InputError, match="no such folder"):
        open_adapter(tmp_path / "none")
    with pytest.raises((InputError, EnvironmentFailure), match="no such folder"):
        open_adapter("some-org/some-adapter")
    path = write_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        open_adapter(path / ADAPTER_WEIGHTS)
    whole = (path / ADAPTER_WEIGHTS).read_bytes()
    for data in (b"", whole[:-1], whole[: len(whole) // 2], b"\xff" * 64):
        (path / ADAPTER_WEIGHTS).write_bytes(data)
        with pytest.raises(InputError, match="not a complete safetensors file"):
            open_adapter(path)
    with pytest.raises(InputError, match="holds no tensors"):
        open_adapter(write_adapter(path, tensors={}))
    (path / ADAPTER_WEIGHTS).unlink()
    os.mkfifo(path / ADAPTER_WEIGHTS)
    with pytest.raises(InputError):
        open_adapter(path)


def test_a_file_that_shrinks_after_opening_is_noticed(pico: Callable[..., Model], tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter")
    model = merged(pico(), open_adapter(path))
    with (path / ADAPTER_WEIGHTS).open("r+b") as file:
        file.truncate(200)
    with pytest.raises(InputError, match="shrank while"):
        model.checkpoint.read(Q0 + ".weight")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["q_proj", ".*", "("]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


# Any key but the names of `write_adapter`'s own parameters, which are no keys of the file.
config_keys = st.text(max_size=12).filter(lambda key: key not in inspect.signature(write_adapter).parameters)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(sorted(NEUTRAL)) | config_keys, json_values, max_size=4))
def test_any_config_is_merged_or_refused(
    changes: dict[str, Any], pico: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Never an error that isn't ours, never a traceback."""
    path = write_adapter(tmp_path_factory.mktemp("adapter"), **changes)
    try:
        model = merged(pico(), open_adapter(path))
        model.checkpoint.read(Q0 + ".weight")
    except LrconvertError as error:
        assert error.exit_code in (3, 4)
    finally:
        shutil.rmtree(path)


MODULES = [Q0, "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head", "model.norm", "score", ""]
PARTS = [
    "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "weight", "bias",
    "base_layer.weight", "lora_B.bias", "lora_A.default.weight", "modules_to_save.weight",
]  # fmt: skip
SHAPES = [(), (0,), (4,), (64,), (101,), (4, 64), (64, 4), (4, 96), (4, 101), (101, 4), (64, 64), (64, 96), (101, 64)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.dictionaries(
        st.tuples(st.sampled_from(["base_model.model.", ""]), st.sampled_from(MODULES), st.sampled_from(PARTS)),
        st.sampled_from(SHAPES),
        max_size=6,
    ),
    tied=st.booleans(),
    dora=st.booleans(),
)
def test_any_tensors_are_merged_or_refused(
    layout: dict[tuple[str, str, str], tuple[int, ...]],
    tied: bool,
    dora: bool,
    pico: Callable[..., Model],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Never an error that isn't ours; and what is merged can be read whole, in the base's shapes."""
    tensors = {
        prefix + module + "." + part: np.ones(shape, np.float32) for (prefix, module, part), shape in layout.items()
    }
    path = write_adapter(
        tmp_path_factory.mktemp("adapter"), tensors=tensors, use_dora=dora, modules_to_save=["lm_head"]
    )
    try:
        model = merged(pico("llama", tie_word_embeddings=tied), open_adapter(path))
        for name, info in model.checkpoint.tensors.items():
            assert model.checkpoint.read(name).shape == info.shape
    except LrconvertError as error:
        assert error.exit_code in (3, 4)
    finally:
        shutil.rmtree(path)
