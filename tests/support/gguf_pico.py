# SPDX-License-Identifier: Apache-2.0
"""Pico models as GGUF files written by gguf-py, with any rope and vocabulary; the check that a bad file is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Ggml
from gguf.quants import quantize

from lrconvert.checkpoint import open_model
from lrconvert.errors import InputError, LrconvertError
from lrconvert.families import Family, expected_tensors, get_family, read_shape
from lrconvert.families.base import GGUF_INTERLEAVED

SHORT, LONG, STATIC = "rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"
HEAD_DIM, ROTARY = 16, {"phi3": 12}
HALF = HEAD_DIM // 2

Edit = Callable[[gguf.GGUFWriter], None]


def pico_config(family: Family, *, tied: bool = False, **overrides: Any) -> dict[str, Any]:
    """Two layers, grouped heads (none of whose counts equals another size), q and k that aren't square."""
    config: dict[str, Any] = {
        "model_type": family.name,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": HEAD_DIM,
        "vocab_size": 40,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
    }
    if family.name in ROTARY:
        config["partial_rotary_factor"] = ROTARY[family.name] / HEAD_DIM
    return config | overrides


@dataclass
class Pico:
    """A GGUF file and what went into it."""

    path: Path
    config: dict[str, Any]
    weights: dict[str, np.ndarray[Any, Any]]  # Hugging Face name to float32 values, in Hugging Face's order
    parts: list[Path] = field(default_factory=list)


def interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of q and k rows: the inverse of what the reader does."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def make_pico(
    path: Path,
    name: str = "llama",
    *,
    kind: Ggml = Ggml.F32,
    edit: Edit | None = None,
    drop: tuple[str, ...] = (),
    split_every: int = 0,
    **overrides: Any,
) -> Pico:
    """Write a pico model of a family. `drop` leaves out metadata keys or tensors by their GGUF names."""
    family = get_family(name)
    config = pico_config(family, **overrides)
    shape = read_shape(config, family)
    rows = {row.role: row for row in family.rows}
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, family.gguf_architecture, split_max_tensors=split_every)
    a = family.gguf_architecture
    numbers = {
        f"{a}.block_count": shape.layers,
        f"{a}.context_length": shape.window,
        f"{a}.embedding_length": shape.hidden,
        f"{a}.feed_forward_length": shape.ffn,
        f"{a}.attention.head_count": shape.heads,
        f"{a}.attention.head_count_kv": shape.kv_heads,
        f"{a}.attention.key_length": shape.head_dim,
        f"{a}.attention.value_length": shape.head_dim,
        f"{a}.rope.dimension_count": shape.rotary_dim,
        f"{a}.vocab_size": shape.vocab,
    }
    floats = {
        f"{a}.attention.layer_norm_rms_epsilon": shape.norm_eps,
        f"{a}.rope.freq_base": shape.theta,
    }
    if shape.experts is not None:
        numbers[f"{a}.expert_count"] = shape.experts.count
        numbers[f"{a}.expert_used_count"] = shape.experts.used
        numbers[f"{a}.expert_feed_forward_length"] = shape.experts.ffn
    for key, value in numbers.items():
        if key not in drop:
            writer.add_uint32(key, value)
    for key, value in floats.items():
        if key not in drop:
            writer.add_float32(key, value)
    weights, stacked = {}, dict[str, list[Any]]()
    for tensor in expected_tensors(family, shape):
        if not tensor.required:
            continue
        values = rng.standard_normal(tensor.shape, np.float32)
        weights[tensor.name] = values
        row = rows[tensor.role]
        stored = values
        if tensor.expert is not None:  # one tensor for all of a layer, when the last of them is made
            together = stacked.setdefault(row.gguf.replace("{layer}", str(tensor.layer)), [])
            together.append(values)
            if len(together) < shape.symbols["experts"]:
                continue
            stored = np.stack(together)
        if a in GGUF_INTERLEAVED and row.role in ("q", "q_bias", "k", "k_bias"):
            stored = interleaved(values, shape.heads if row.role.startswith("q") else shape.kv_heads)
        gguf_name = row.gguf.replace("{layer}", str(tensor.layer))
        if gguf_name in drop:
            continue
        if values.ndim == 1 or kind == Ggml.F32:
            writer.add_tensor(gguf_name, stored)
        elif kind == Ggml.F16:
            writer.add_tensor(gguf_name, stored.astype(np.float16))
        else:
            writer.add_tensor(gguf_name, quantize(stored, kind), raw_dtype=kind)
    if edit:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf")) if split_every else [path]
    return Pico(parts[0], config, weights, parts)


# --- what a file may hold -------------------------------------------------------------------------------


def rope_edit(
    *,
    arch: str = "llama",
    kind: str | None = None,
    original: int | None = None,
    attention: float | None = None,
    ratio: float | None = None,
    short: Any = None,
    long: Any = None,
    static: Any = None,
    more: dict[str, float] | None = None,
) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        if kind is not None:
            writer.add_string(f"{arch}.rope.scaling.type", kind)
        if original is not None:
            writer.add_uint32(f"{arch}.rope.scaling.original_context_length", original)
        for key, value in {"attn_factor": attention, "factor": ratio, **(more or {})}.items():
            if value is not None:
                writer.add_float32(f"{arch}.rope.scaling.{key}", value)
        for name, values in ((SHORT, short), (LONG, long), (STATIC, static)):
            if values is not None:
                writer.add_tensor(name, np.asarray(values, getattr(values, "dtype", np.float32)))

    return edit


def byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def bpe_vocabulary(
    pre: str | None = "smollm", *, merges: list[str] | None = None, flags: dict[str, bool] | None = None
) -> Edit:
    """A byte-level vocabulary: all bytes, a few merges, control and user-defined tokens."""
    merges = ["1 2", "Ġ Ġ", "ĠĠ Ġ", "h e", "l l", "he ll", "hell o"] if merges is None else merges
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*byte_alphabet(), *merged, "<|start|>", "<|end|>", "<tool>"]

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - 3) + [3, 3, 4])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(len(tokens) - 3)
        writer.add_eos_token_id(len(tokens) - 2)
        for name, value in (flags or {}).items():
            getattr(writer, f"add_{name}")(value)

    return edit


def spm_vocabulary(*, prefix: bool | None = None) -> Edit:
    """A SentencePiece vocabulary with byte fallback."""
    words = ["▁", "h", "e", "l", "o", "▁h", "he", "ll", "▁he", "llo", "▁hello", "hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "[INST]"]

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * 259 + [-float(n) for n in range(len(words))] + [0.0])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words) + [4])
        if prefix is not None:
            writer.add_add_space_prefix(prefix)

    return edit


# --- refusals --------------------------------------------------------------------------------------------


def refused(path: Path, *messages: str, error: type[LrconvertError] = InputError) -> LrconvertError:
    """The file is refused with one line that holds every message, in bounded memory."""
    tracemalloc.start()
    try:
        with pytest.raises(error) as caught:
            open_model(path)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text or path.parent.name in text
    for message in messages:
        assert message in text
    return caught.value
