# SPDX-License-Identifier: Apache-2.0
"""GGUF files damaged on purpose: each is refused in one line that says where, in no more memory than a good one takes.

test_hostile_gguf.py damages them by the thousand.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.cases import case
from support.gguf_pico import bpe_vocabulary, make_pico, refused

from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.errors import InputError, LrconvertError, UnsupportedError

# --- headers and tensors ---------------------------------------------------------------------------------


def raw_header(*, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, keys: int = 0, order: str = "<") -> bytes:
    return magic + struct.pack(f"{order}IQQ", version, tensors, keys)


def raw_tensor(name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    """`dimensions` in ggml's order, the fastest first."""
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dimensions))
    return head + struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset)


def raw_key(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


PADDING = bytes(4096)
BAD_HEADERS = {
    "GGUF alone": (b"GGUF", "4 bytes; a GGUF header alone takes 24"),
    "version 1": (raw_header(version=1) + PADDING, "GGUF version 1; version 3 is needed"),
    "version 2": (raw_header(version=2) + PADDING, "GGUF version 2; version 3 is needed"),
    "version 4": (raw_header(version=4) + PADDING, "GGUF version 4; version 3 is needed"),
    "big-endian": (raw_header(order=">") + PADDING, "a big-endian GGUF file; only little-endian ones are read"),
    "2^60 tensors": (raw_header(tensors=2**60) + PADDING, f"declares {2**60} tensors"),
    "2^60 keys": (raw_header(keys=2**60) + PADDING, f"and {2**60} metadata keys"),
    "more tensors than bytes": (raw_header(tensors=1000, keys=1) + PADDING, "can't hold them"),
    "name of 4 GiB": (raw_header(keys=1) + struct.pack("<Q", 2**32) + PADDING, "a name of 4294967296 bytes"),
    "empty name": (raw_header(keys=1) + struct.pack("<Q", 0) + PADDING, "has a name of 0 bytes"),
    "name past the end": (
        raw_header(keys=1) + struct.pack("<Q", 5000) + PADDING,
        "truncated: metadata key 0 needs 5000 bytes at 32, the file has 4128",
    ),
    "name not UTF-8": (raw_header(keys=1) + struct.pack("<Q", 1) + b"\xff" + PADDING, "which is not printable UTF-8"),
    "name that is no line": (raw_header(keys=1) + raw_key("a\n\x1b[2Jb", 4, PADDING), "the name 'a\\n\\x1b[2Jb'"),
    "string of 4 GiB": (
        raw_header(keys=1) + raw_key("a", 8, struct.pack("<Q", 2**32)) + PADDING,
        "truncated: a needs 4294967296 bytes",
    ),
    "2^61 strings": (
        raw_header(keys=1) + raw_key("a", 9, struct.pack("<IQ", 8, 2**61)) + PADDING,
        "truncated: a needs",
    ),
    "2^61 numbers": (
        raw_header(keys=1) + raw_key("a", 9, struct.pack("<IQ", 12, 2**61)) + PADDING,
        "truncated: a needs",
    ),
    "array of arrays": (
        raw_header(keys=1) + raw_key("a", 9, struct.pack("<IQ", 9, 1)) + PADDING,
        "a is an array of the type 9; scalars and strings are read",
    ),
    "unknown value type": (
        raw_header(keys=1) + raw_key("a", 13, b"") + PADDING,
        "a has the value type 13; 0 to 12 are known",
    ),
    "key twice": (raw_header(keys=2) + raw_key("a", 0, b"1") * 2 + PADDING, "the metadata key a appears twice"),
    "no tensors": (raw_header() + PADDING, "holds no tensors"),
    "alignment": (
        raw_header(keys=1, tensors=1)
        + raw_key("general.alignment", 4, struct.pack("<I", 24))
        + raw_tensor("t", (1,), 0, 0)
        + PADDING,
        "general.alignment is 24; a power of two is needed",
    ),
}


def test_a_bad_header_is_refused(tmp_path: Path) -> None:
    """Whatever a header promises, no more is read or allocated than the file holds."""
    for name, (content, message) in BAD_HEADERS.items():
        (tmp_path / "bad.gguf").write_bytes(content)
        with case(name):
            refused(tmp_path / "bad.gguf", message)


BAD_TENSORS = {
    "past the end": ([("t", (64, 64), 0, 0)], "t ends at byte"),
    "far past the end": ([("t", (4,), 0, 2**63)], "t ends at byte"),
    "2^120 elements": ([("t", (2**60, 2**60), 0, 0)], "t ends at byte"),
    "empty": ([("t", (4, 0), 0, 0)], "t is empty: its shape is [0, 4]"),
    "five dimensions": ([("t", (1,) * 5, 0, 0)], "t has 5 dimensions; 1 to 4 are allowed"),
    "half a block": ([("t", (33, 2), 8, 0)], "t has rows of 33; Q8_0 needs a multiple of 32"),
    "unknown type": ([("t", (4,), 4, 0)], "t has the type 4, which this gguf-py doesn't know"),
    "unaligned": ([("t", (4,), 0, 8)], "t starts at 8, not a multiple of the alignment 32"),
    "twice": ([("t", (4,), 0, 0), ("t", (4,), 0, 32)], "t appears twice"),
    "overlapping": ([("a", (16,), 0, 0), ("b", (16,), 0, 32)], "b overlaps a"),
    "all listed": ([("a", (4,), 0, 8), ("b", (4,), 0, 8)], "; b starts at 8"),
}


def test_a_bad_tensor_is_refused(tmp_path: Path) -> None:
    """Tensors outside the file, on each other's bytes, or of shapes and types that can't be."""
    for name, (tensors, message) in BAD_TENSORS.items():
        content = raw_header(tensors=len(tensors)) + b"".join(raw_tensor(*tensor) for tensor in tensors) + PADDING
        (tmp_path / "bad.gguf").write_bytes(content)
        with case(name):
            refused(tmp_path / "bad.gguf", message)


def test_more_array_items_than_any_vocabulary_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the file does hold them: gigabytes of empty strings would take hours."""
    pico = make_pico(tmp_path / "m.gguf", edit=bpe_vocabulary())
    monkeypatch.setattr("lrconvert.checkpoint.gguf_header.MAX_ITEMS", 300)
    refused(pico.path, "tokenizer.ggml.token_type brings the items of all arrays to 532; at most 300 are read")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    """Cut anywhere, header or tensors, down to the last byte."""
    content = make_pico(tmp_path / "m.gguf", edit=bpe_vocabulary()).path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, 3000, 97), len(content) // 2, len(content) - 1]:
        cut.write_bytes(content[:length])
        with case(length):
            refused(cut)


def test_random_damage_never_gets_past_our_errors(tmp_path: Path) -> None:
    """Bytes changed at random in the header: read, or refused with an error of ours, never anything else."""
    content = make_pico(tmp_path / "m.gguf", edit=bpe_vocabulary()).path.read_bytes()
    rng = random.Random(3)
    outcomes = {"read": 0, "refused": 0}
    damaged = tmp_path / "damaged.gguf"
    for _ in range(300):
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(4, 4200)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        damaged.write_bytes(data)
        try:
            open_model(damaged).checkpoint.side_files()
            outcomes["read"] += 1
        except LrconvertError as error:
            assert error.exit_code in (3, 4), error
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30, outcomes  # both happen, or nothing was tested


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    """An error of ours, no crash: the file is not mapped."""
    pico = make_pico(tmp_path / "m.gguf")
    checkpoint = GgufCheckpoint(pico.path)
    os.truncate(pico.path, pico.path.stat().st_size - 64)
    with pytest.raises(InputError, match="shrank while"):
        for tensor in checkpoint.tensors:
            checkpoint.read(tensor)


def test_all_missing_metadata_is_listed_at_once(tmp_path: Path) -> None:
    """Every required key, by the name it has in the file."""
    keys = (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    )
    missing = tuple(f"llama.{key}" for key in keys)
    pico = make_pico(tmp_path / "m.gguf", drop=missing)
    refused(pico.path, f"missing metadata: {', '.join(missing)}")


def test_metadata_of_another_type_is_refused(tmp_path: Path) -> None:
    """The key, what was found and what is needed."""
    for kind, value in (("string", "two"), ("uint64", 2**62), ("bool", True), ("uint32", 0)):

        def edit(writer: gguf.GGUFWriter, kind: str = kind, value: Any = value) -> None:
            getattr(writer, f"add_{kind}")("llama.block_count", value)

        with case(kind, value):
            path = make_pico(tmp_path / "m.gguf", drop=("llama.block_count",), edit=edit).path
            refused(path, f"llama.block_count is {value!r}; an integer")


def test_unknown_and_missing_tensors_are_listed_together(tmp_path: Path) -> None:
    """By their names in the file where no family knows them, even where the name is one of Hugging Face's."""

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.1.attn_sinks.weight", np.ones(4, np.float32))
        writer.add_tensor("model.norm.weight", np.ones(64, np.float32))
        writer.add_tensor("blk.7.ffn_up.weight", np.ones((4, 4), np.float32))

    pico = make_pico(tmp_path / "m.gguf", edit=edit, drop=("blk.1.attn_q.weight", "output_norm.weight"))
    refused(
        pico.path,
        "missing tensors: model.layers.1.self_attn.q_proj.weight, model.norm.weight",
        "tensors that llama does not have: blk.1.attn_sinks.weight (in GGUF), model.norm.weight (in GGUF), "
        "model.layers.7.mlp.up_proj.weight",
    )


def test_an_interleaved_family_rotates_whole_heads(tmp_path: Path) -> None:
    """Llama has no partial rotation: llama.cpp refuses such a file too."""
    pico = make_pico(tmp_path / "m.gguf", partial_rotary_factor=0.5)
    refused(pico.path, "rope.dimension_count is 8; llama rotates all 16 channels")


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Against what the metadata promises, in Hugging Face's order of dimensions."""

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.1.ffn_up.weight", np.ones((64, 96), np.float32))

    pico = make_pico(tmp_path / "m.gguf", edit=edit, drop=("blk.1.ffn_up.weight",))
    refused(pico.path, "model.layers.1.mlp.up_proj.weight has shape [64, 96]; the config needs [96, 64]")


def test_unsupported_types_are_named(tmp_path: Path) -> None:
    """Other architectures, mixtures of experts, layers that differ, adapters, types without dequantisation."""
    writer = gguf.GGUFWriter(tmp_path / "arch.gguf", "mamba")
    writer.add_tensor("t", np.ones(4, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    known = "Architectures: gemma3, glm4, granite, llama, minicpm, mistral3, olmo2, phi3, phimoe, qwen2"
    refused(tmp_path / "arch.gguf", f"'mamba', which lrconvert doesn't read. {known}", error=UnsupportedError)
    experts = make_pico(tmp_path / "moe.gguf", edit=lambda writer: writer.add_expert_count(8))
    refused(experts.path, "a mixture of experts", error=UnsupportedError)
    layers = make_pico(
        tmp_path / "layers.gguf",
        drop=("llama.attention.head_count",),
        edit=lambda writer: writer.add_head_count([6, 3]),
    )
    refused(layers.path, "llama.attention.head_count differs from layer to layer", error=UnsupportedError)
    adapter = make_pico(tmp_path / "lora.gguf", edit=lambda writer: writer.add_type("adapter"))
    refused(adapter.path, "general.type is 'adapter'; a whole model is needed")

    def integers(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output_norm.weight", np.ones(64, np.int32))

    pico = make_pico(tmp_path / "int.gguf", drop=("output_norm.weight",), edit=integers)
    refused(pico.path, "gguf-py can't dequantise: I32 (as in output_norm.weight)", error=UnsupportedError)


def test_head_counts_that_are_the_same_in_all_layers_are_one_number(tmp_path: Path) -> None:
    """Some converters write an array where one number would do."""
    pico = make_pico(
        tmp_path / "m.gguf",
        drop=("llama.attention.head_count",),
        edit=lambda writer: writer.add_head_count([6, 6]),
    )
    assert open_model(pico.path).shape.heads == 6
