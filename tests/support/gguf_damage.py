# SPDX-License-Identifier: Apache-2.0
"""GGUF files and what can be wrong with them, as strategies for hypothesis: damage to bytes, and other contents."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from conftest import recipe_for
from gguf import GGMLQuantizationType as Ggml
from hypothesis import strategies as st
from support.gguf_files import LONG, SHORT, STATIC, Tensors, bake, contents, converter_gguf, write_gguf
from support.pico import write_pico

from lrconvert.artifact.manifest import manifest_path
from lrconvert.checkpoint import open_model
from lrconvert.recipe import write_recipe
from lrconvert.targets.gguf.layout import Planned, Raw

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip


Field = tuple[int, int]  # where it is, and its size
Contents = tuple[dict[str, Any], Tensors]
Damage = tuple[Any, ...]  # a function and its arguments but the first, the file

# --- files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A healthy file to damage. `whole`: every file of it, the damaged one first by name; `fields`: where its header
    has a number, with its size; `tensors`: where the header has a tensor's offset."""

    path: Path
    data: bytes
    recipe: Path
    output: Path
    before: dict[str, bytes]
    contents: Contents
    fields: tuple[Field, ...]
    offsets: tuple[int, ...]
    header: int

    def restore(self) -> None:
        for name, data in self.before.items():
            path = self.output.parent / name
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)


def walk(data: bytes) -> tuple[list[tuple[int, int]], list[int], int]:
    """Where a sound header has its numbers (offset and size), which of them are offsets of tensors, and its end."""
    found, offsets, position = [(0, 4), (4, 4), (8, 8), (16, 8)], [], 24
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(size: int) -> int:
        nonlocal position
        found.append((position, size))
        position += size
        return int.from_bytes(data[position - size : position], "little")

    def text() -> None:
        nonlocal position
        length = number(8)
        position += length

    def value(kind: int) -> None:
        nonlocal position
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = number(4), number(8)
            for _ in range(count):
                value(inner)
        else:
            number(sizes[kind])

    tensors, keys = struct.unpack_from("<QQ", data, 8)
    for _ in range(keys):
        text()
        value(number(4))
    for _ in range(tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4)
        offsets.append(position)
        number(8)
    return found, offsets, position


def vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_token_list([f"t{index}" for index in range(40)])
    writer.add_token_scores([0.5] * 40)
    writer.add_array("custom.flags", [True, False])


def make_base(name: str, folder: Path) -> Base:
    family = {"qwen2": "qwen2", "split": "phi3"}.get(name, "llama")
    more = {"original_max_position_embeddings": 256} if family == "phi3" else {}
    model = open_model(write_pico(folder / "model", family, **(SMALL | more)))
    recipe = recipe_for(model, even=True)
    file = folder / "source.gguf"
    if name == "qwen2":
        path = converter_gguf(file, model, kind=Ggml.Q8_0, edit=vocabulary)
    elif name == "split":
        path = converter_gguf(file, model, kind=Ggml.F16, edit=vocabulary, split_every=5)
    else:
        path = bake(model, recipe, file, static=name == "static")
        manifest_path(path).unlink()
    out = folder / "out"
    bake(model, recipe, out / "m.gguf", type="q8_0")
    before = {place.name: place.read_bytes() for place in out.iterdir()}
    data = path.read_bytes()
    fields, offsets, header = walk(data)
    written = write_recipe(recipe, folder / "recipe")
    return Base(path, data, written, out / "m.gguf", before, contents(path), tuple(fields), tuple(offsets), header)


# --- damage ----------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 9, 12, 13, 24, 32, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32]),
    st.sampled_from([2**40, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 32, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)


def _field(data: bytearray, at: Field, value: int) -> None:
    data[at[0] : sum(at)] = value.to_bytes(8, "little")[: at[1]]


def _nudge(data: bytearray, at: Field, by: int) -> None:
    _field(data, at, (int.from_bytes(data[at[0] : sum(at)], "little") + by) % 2**64)


def _swap(data: bytearray, at: Field) -> None:
    data[at[0] : sum(at)] = data[at[0] : sum(at)][::-1]


def _flip(data: bytearray, bit: int) -> None:
    if bit // 8 < len(data):
        data[bit // 8] ^= 1 << bit % 8


def _copy(data: bytearray, start: int, length: int, target: int) -> None:
    data[target : target + length] = data[start : start + length]


def _insert(data: bytearray, at: int, junk: bytes) -> None:
    data[at:at] = junk


def _remove(data: bytearray, at: int, length: int) -> None:
    del data[at : at + length]


def damages(base: Base) -> st.SearchStrategy[list[Damage]]:
    """One to three injuries: to numbers of the header (counts, sizes, types, offsets), to bits, to what lies where."""
    field, first = st.sampled_from(base.fields), st.sampled_from(base.fields[:4])
    place, anywhere = st.integers(0, base.header - 1), st.integers(0, len(base.data) - 1)
    offset, length = st.sampled_from(base.offsets), st.integers(1, 64)

    def injury(function: Callable[..., None], *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Damage]:
        return st.tuples(st.just(function), *arguments)

    kinds = [
        injury(_field, field, NUMBERS),
        injury(_field, first, NUMBERS),
        injury(_nudge, field, st.sampled_from([-32, -8, -1, 1, 8, 32, 64])),
        injury(_swap, field),  # as in a big-endian file
        injury(_copy, offset, st.just(8), offset),  # two tensors in one place
        injury(_flip, st.integers(0, 8 * base.header - 1)),
        injury(_flip, st.integers(0, 8 * len(base.data) - 1)),
        injury(_copy, place, length, place),
        injury(_insert, place, st.binary(min_size=1, max_size=40)),
        injury(_remove, place, length),
        injury(_remove, anywhere, st.just(len(base.data))),  # truncated
    ]
    return st.lists(st.one_of(kinds), min_size=1, max_size=3)


def damaged(base: Base, injuries: list[Damage]) -> None:
    data = bytearray(base.data)
    for injure, *arguments in injuries:
        injure(data, *arguments)
    base.path.write_bytes(data)


# --- other contents --------------------------------------------------------------------------------------

KINDS = [Ggml.F64, Ggml.F32, Ggml.F16, Ggml.BF16, Ggml.Q8_0, Ggml.Q4_0, Ggml.Q4_K, Ggml.IQ1_S, Ggml.I8, Ggml.I32]


def raw(kind: int, layout: str, value: Any) -> Raw:
    return Raw(struct.pack("<I", kind) + struct.pack(layout, value))


def raw_array(kind: int, layout: str, values: list[Any]) -> Raw:
    return Raw(struct.pack("<IIQ", 9, kind, len(values)) + b"".join(struct.pack(layout, value) for value in values))


UINT32, FLOATS = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1)), st.floats(width=32)
TEXT = st.one_of(st.sampled_from([b"", b"none", b"yarn", b"longrope", b"linear", b"llama", b"qwen2", b"model"]),
                 st.binary(max_size=12))  # fmt: skip
VALUES = st.one_of(
    st.builds(raw, st.just(4), st.just("<I"), UINT32),
    st.builds(raw, st.just(10), st.just("<Q"), NUMBERS),
    st.builds(raw, st.just(11), st.just("<q"), st.integers(-(2**63), 2**63 - 1)),
    st.builds(raw, st.just(6), st.just("<f"), FLOATS),
    st.builds(raw, st.just(12), st.just("<d"), st.floats()),
    st.builds(raw, st.just(7), st.just("<B"), st.integers(0, 255)),
    st.builds(lambda text: Raw(struct.pack("<IQ", 8, len(text)) + text), TEXT),
    st.builds(raw_array, st.just(4), st.just("<I"), st.lists(UINT32, max_size=4)),
    st.builds(raw_array, st.just(6), st.just("<f"), st.lists(FLOATS, max_size=4)),
    st.builds(raw_array, st.just(8), st.just("<Q"), st.lists(st.just(0), max_size=4)),
)


def _state(inside: Contents, key: str, value: Raw) -> None:
    inside[0][key] = value


def _forget(inside: Contents, key: str) -> None:
    inside[0].pop(key, None)


def _lose(inside: Contents, name: str) -> None:
    if len(inside[1]) > 1:
        inside[1].pop(name, None)


def _retype(inside: Contents, name: str, kind: Ggml, byte: int) -> None:
    """Another type, where rows of this length can have it, and bytes that are all the same."""
    shape = inside[1][name][1] if name in inside[1] else (8,)
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
        inside[1][name] = (kind, shape, bytes([byte]) * Planned(name, kind, shape).nbytes)


def _reshape(inside: Contents, name: str, shape: tuple[int, ...]) -> None:
    inside[1][name] = (Ggml.F32, shape, bytes(Planned(name, Ggml.F32, shape).nbytes))


def changes(base: Base) -> st.SearchStrategy[list[Damage]]:
    """One to three changes to a file that stays sound: values of other types and sizes, tensors of other types and
    shapes, keys and tensors gone, factors where none were."""
    metadata, inside = contents(base.path)
    prefix = next(key for key in metadata if key.endswith(".block_count")).removesuffix("block_count")
    more = [f"{prefix}rope.{key}" for key in ("scaling.type", "scaling.factor", "scaling.attn_factor", "scale_linear",
            "scaling.original_context_length", "dimension_count", "freq_base")]  # fmt: skip
    more += [
        f"{prefix}attention.sliding_window",
        f"{prefix}expert_count",
        "general.alignment",
        "split.count",
        "split.no",
    ]
    key = st.sampled_from([*metadata, *more, "llama.block_count", "lrconvert.recipe"])
    name = st.sampled_from([*inside, SHORT, LONG, STATIC, "blk.0.attn_q.bias", "blk.1.ffn_up.weight"])
    shape = st.lists(st.sampled_from([1, 2, 8, 16, 32, 40]), min_size=1, max_size=4).map(tuple)
    kinds = [
        st.tuples(st.just(_state), key, VALUES),
        st.tuples(st.just(_state), key, VALUES),
        st.tuples(st.just(_forget), key),
        st.tuples(st.just(_lose), name),
        st.tuples(st.just(_retype), name, st.sampled_from(KINDS), st.integers(0, 255)),
        st.tuples(st.just(_reshape), name, shape),
    ]
    return st.lists(st.one_of(kinds), min_size=1, max_size=3)


def changed(base: Base, injuries: list[Damage]) -> None:
    inside = base.contents[0].copy(), base.contents[1].copy()
    for injure, *arguments in injuries:
        injure(inside, *arguments)
    write_gguf(base.path, *inside)
