# SPDX-License-Identifier: Apache-2.0
"""Damage by the kind of a file: from healthy bytes to damaged ones, the same for the same `rng`."""

from __future__ import annotations

import json
import random
import re
import struct
import tomllib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType
from support import gguf_files
from support.gguf_damage import walk

from fuzzing.trees import INJURIES, NUMBERS, STRINGS, TOML_VALUES, damage, dumps, place, toml
from lrconvert.targets.gguf.layout import Planned
from lrconvert.targets.gguf.layout import Raw as RawValue

Rng = random.Random
Damage = Callable[[Rng, bytes], bytes]

# --- any bytes -------------------------------------------------------------------------------------------

PIECES = (b"\0", b"\xff" * 9, b"\x80\x80\x80\x80\x10", b"../", b"-1", b"{", b"]", b'"', b"\xef\xbb\xbf",
          b"\xed\xa0\x80", b"NaN", b"\n", b"\x7f" * 8, b"\x00" * 64, b",,", b"=", b"1e999")  # fmt: skip


def raw(rng: Rng, data: bytes) -> bytes:
    """Bits, pieces, cuts: what disks and editors do."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = rng.randrange(len(made) + 1), rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(8)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            made[at:at] = rng.choice(PIECES)
        elif kind == 3:
            del made[at : at + length]
        elif kind == 4:
            other = rng.randrange(len(made) + 1)
            made[at : at + length] = made[other : other + length]
        elif kind == 5 and rng.random() < 0.5:
            del made[at:]
        elif kind == 6 and rng.random() < 0.1:
            made = bytearray(bytes(made).decode("utf-8", "replace").encode("utf-16"))
        elif kind == 7 and rng.random() < 0.1:
            made = bytearray(rng.choice((b"", b"\0" * 4096, b"version https://git-lfs.github.com/spec/v1\n", b" ")))
    return bytes(made)


def sometimes_raw(rng: Rng, made: bytes, share: float = 0.1) -> bytes:
    return raw(rng, made) if rng.random() < share else made


# --- texts -----------------------------------------------------------------------------------------------


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def json_file(rng: Rng, data: bytes) -> bytes:
    return sometimes_raw(rng, encoded(dumps(damage(rng, json.loads(data)))))


def json_lines(rng: Rng, data: bytes) -> bytes:
    """Lines of JSON objects, of which one is damaged, or their order."""
    lines = [line for line in data.decode().splitlines() if line]
    at = rng.randrange(len(lines))
    if rng.random() < 0.8:
        lines[at] = dumps(damage(rng, json.loads(lines[at])))
    else:
        rng.choice((lambda: lines.pop(at), lambda: lines.insert(at, rng.choice(lines)), lambda: rng.shuffle(lines)))()
    return sometimes_raw(rng, encoded("\n".join(lines) + "\n" * rng.randrange(2)))


def toml_file(rng: Rng, data: bytes) -> bytes:
    tree = tomllib.loads(data.decode())
    if rng.random() < 0.2 and (at := place(rng, tree)) is not None:
        at[0][at[1]] = rng.choice(TOML_VALUES)
    return sometimes_raw(rng, encoded(toml(damage(rng, tree))))


WORD = re.compile(r"[\w.+-]+|\S")


def text(rng: Rng, data: bytes) -> bytes:
    """Words exchanged for others, for numbers and for names; lines repeated, dropped, moved."""
    lines = data.decode("utf-8", "replace").splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines)) if lines else 0
        kind = rng.randrange(6)
        if kind <= 2 and lines and (words := list(WORD.finditer(lines[at]))):
            word = rng.choice(words)
            new = str(rng.choice(rng.choice((NUMBERS, STRINGS))))
            lines[at] = lines[at][: word.start()] + new + lines[at][word.end() :]
        elif kind == 3 and lines:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind == 4 and lines:
            del lines[at]
        elif kind == 5:
            lines.insert(at, str(rng.choice(STRINGS)))
    return sometimes_raw(rng, encoded("\n".join(lines)))


def table(rng: Rng, data: bytes) -> bytes:
    """Rows of numbers: cells of other values, rows of other lengths."""
    rows: Any = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(rng.choice((1, 2))):
        if (at := place(rng, rows)) is not None:
            if isinstance(at[0][at[1]], str) and rng.random() < 0.8:
                at[0][at[1]] = str(rng.choice(rng.choice((NUMBERS, STRINGS))))
            else:
                rng.choice(INJURIES[6:])(rng, rows, at)
    lines = (",".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows)
    return sometimes_raw(rng, encoded("\n".join(lines)))


# --- safetensors, arrays ---------------------------------------------------------------------------------


def safetensors(rng: Rng, data: bytes) -> bytes:
    """The header's structure, its length, or the data behind it."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(10)
    if kind < 7:
        tree = json.loads(header)
        if rng.random() < 0.6:
            _entry(rng, tree)
        else:
            tree = damage(rng, tree)
        header = encoded(dumps(tree))
        size = len(header)
    elif kind == 7:
        size = rng.choice((0, 1, size - 1, size + 1, 2**20, 100_000_001, 2**31, 2**40, 2**63, 2**64 - 1))
    elif kind == 8:
        body = body[: rng.randrange(len(body) + 1)] if rng.random() < 0.7 else body + bytes(rng.randrange(64))
    else:
        at = rng.randrange(max(1, len(body) - 4))
        body = body[:at] + struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38, -0.0))) + body[at + 4 :]
    return sometimes_raw(rng, size.to_bytes(8, "little") + header + body, 0.05)


def _entry(rng: Rng, tree: dict[str, Any]) -> None:
    """One tensor's dtype, shape or place: also such as fit, and such as overlap."""
    names = [name for name in tree if name != "__metadata__"]
    one, other = tree[rng.choice(names)], tree[rng.choice(names)]
    kind = rng.randrange(6)
    if kind == 0:
        one["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "F4", ""))
    elif kind == 1:
        one["shape"] = rng.choice(
            ([], [0], [-1], one["shape"][::-1], [*one["shape"], 1], [2**40, 2**40], other["shape"])
        )
    elif kind == 2:
        one["data_offsets"] = list(other["data_offsets"])
    elif kind == 3:
        one["data_offsets"][rng.randrange(2)] += rng.choice((-8, -1, 1, 4, 2**31, 2**62))
    elif kind == 4:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    else:
        one["shape"], one["dtype"] = [dimension * 2 for dimension in one["shape"]], "F16"


def npy(rng: Rng, data: bytes) -> bytes:
    """The header of an array, which is a Python literal, or its data."""
    size = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + size].decode("latin-1"), data[10 + size :]
    kind = rng.randrange(5)
    if kind == 0:
        dtypes = ("<f4", "<i4", "|O", "<U8", "|V8", ">i8", "<c16", "<M8[s]", "|S5", "x", "<f2", "|b1", "<u8")
        header = header.replace("<i8", rng.choice(dtypes))
    elif kind == 1:
        shapes = ("()", "(2, 2)", "(0,)", "(-1,)", "(10**9,)", "(4294967296, 4294967296)", "None", "(True,)", "(1e3,)")
        header = re.sub(r"\([^)]*\)", rng.choice(shapes), header)
    elif kind == 2:
        header = header.replace("False", rng.choice(("True", "None", "__import__('os')", "0")))
    elif kind == 3:
        numbers = (-1, 0, 2**31, 2**63 - 1, -(2**63))
        at = 8 * rng.randrange(max(1, len(body) // 8))
        body = body[:at] + struct.pack("<q", rng.choice(numbers)) + body[at + 8 :]
    else:
        return raw(rng, data)
    made = header.encode("latin-1")
    return data[:8] + len(made).to_bytes(2, "little") + made + body


# --- GGUF ------------------------------------------------------------------------------------------------

COUNTS = (
    0,
    1,
    2,
    3,
    8,
    9,
    12,
    13,
    31,
    33,
    255,
    2**16,
    2**20,
    2**31,
    2**32 - 1,
    2**40,
    2**61,
    2**63,
    2**64 - 32,
    2**64 - 1,
)
KINDS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0,
         GGMLQuantizationType.I8, GGMLQuantizationType.I32, GGMLQuantizationType.F64, GGMLQuantizationType.BF16,
         GGMLQuantizationType.Q4_K, GGMLQuantizationType.IQ2_XXS)  # fmt: skip


def gguf_text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


def _gguf_value(rng: Rng) -> RawValue:
    """A value of any type, with its type in front."""
    kind, floats = rng.randrange(7), (0.0, 1.0, -1.0, 1e38, 1e-45, float("nan"), float("inf"))
    if kind == 0:
        return RawValue(struct.pack("<II", 4, rng.choice(COUNTS) % 2**32))
    if kind == 1:
        return RawValue(struct.pack("<If", 6, rng.choice(floats)))
    if kind == 2:
        return RawValue(struct.pack("<IQ", rng.choice((10, 11)), rng.choice(COUNTS)))
    if kind == 3:
        return RawValue(struct.pack("<I", 8) + gguf_text(encoded(str(rng.choice(STRINGS)))))
    if kind == 4:
        return RawValue(struct.pack("<IB", 7, rng.randrange(256)))
    if kind == 5:
        items = [rng.choice(floats) for _ in range(rng.randrange(9))]
        return RawValue(struct.pack(f"<IIQ{len(items)}f", 9, 6, len(items), *items))
    words = [encoded(str(rng.choice(STRINGS))) for _ in range(rng.randrange(5))]
    return RawValue(struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(gguf_text, words)))


@cache
def _gguf_contents(data: bytes) -> gguf_files_contents:
    path = Path(f"healthy-{len(data)}.tmp.gguf")
    path.write_bytes(data)
    found = gguf_files.contents(path)
    path.unlink()
    return found


gguf_files_contents = tuple[dict[str, Any], gguf_files.Tensors]


def _gguf_array(rng: Rng, value: RawValue) -> RawValue:
    """An array with other items: repeated, dropped, exchanged, or a length that lies."""
    if value.data[:4] != struct.pack("<I", 9) or len(value.data) < 17:
        return _gguf_value(rng)
    kind, count = struct.unpack_from("<IQ", value.data, 4)
    items, position = [], 16
    width = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind)
    for _ in range(count):
        if position >= len(value.data):  # its count lies already
            return _gguf_value(rng)
        size = width or 8 + struct.unpack_from("<Q", value.data, position)[0]
        items.append(value.data[position : position + size])
        position += size
    at, other = rng.randrange(len(items) or 1), rng.randrange(len(items) or 1)
    change = rng.randrange(6)
    if not items or change == 0:
        items = items[:at]
    elif change == 1:
        items[at] = items[other]
    elif change == 2:
        items[at], items[other] = items[other], items[at]
    elif change == 3:
        items.insert(at, items[other])
    elif change == 4:
        some = encoded(str(rng.choice(STRINGS)))
        items[at] = gguf_text(some) if width is None else rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * width
    else:
        return RawValue(value.data[:8] + struct.pack("<Q", rng.choice(COUNTS)) + b"".join(items))
    return RawValue(value.data[:8] + struct.pack("<Q", len(items)) + b"".join(items))


def gguf(rng: Rng, data: bytes) -> bytes:
    """Other contents of a file that stays sound, or numbers of its header that are not what is there."""
    if rng.random() < 0.35:
        return sometimes_raw(rng, _gguf_numbers(rng, data))
    before = _gguf_contents(data)
    metadata, tensors = before[0].copy(), before[1].copy()
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        key, name = rng.choice(list(metadata) or ["a"]), rng.choice(list(tensors) or ["a"])
        kind = rng.randrange(8)
        if kind <= 1:
            metadata[key] = _gguf_value(rng)
        elif kind == 2:
            metadata.pop(key, None)
        elif kind == 3 and metadata:
            metadata[str(rng.choice(STRINGS)).encode("utf-8", "replace").decode()] = metadata.pop(key)
        elif kind == 4 and metadata:
            metadata[key] = _gguf_array(rng, metadata[key])
        elif kind == 5 and metadata:
            metadata[key] = metadata[rng.choice(list(metadata))]
        elif kind == 6 and len(tensors) > 1:
            metadata, tensors = _gguf_tensor(rng, metadata, tensors, name)
        elif kind == 7 and tensors:
            ggml, shape, body = tensors[name]
            tensors[name] = ggml, shape, rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * len(body)
    path = Path("damaged.tmp.gguf")
    made = bytearray(gguf_files.write_gguf(path, metadata, tensors).read_bytes())
    path.unlink()
    return sometimes_raw(rng, bytes(made))


_walked = cache(walk)


def _gguf_numbers(rng: Rng, data: bytes) -> bytes:
    """Counts, lengths, types, dimensions and offsets of the header."""
    made = bytearray(data)
    fields, offsets, _ = _walked(data)
    for _ in range(rng.choice((1, 1, 2))):
        at, size = (
            rng.choice(fields[:40] if rng.random() < 0.3 else fields)
            if rng.random() < 0.7
            else (rng.choice(offsets), 8)
        )
        old = int.from_bytes(made[at : at + size], "little")
        new = rng.choice((*COUNTS, old + 1, old - 1, old + 32, old - 32, old * 2))
        made[at : at + size] = (new % 2**64).to_bytes(8, "little")[:size]
    return bytes(made)


def _gguf_tensor(rng: Rng, metadata: Any, tensors: Any, name: str) -> tuple[Any, Any]:
    """A tensor gone, of another name, type or shape."""
    ggml, shape, body = tensors.pop(name)
    kind = rng.randrange(4)
    if kind == 1:
        tensors[str(rng.choice(STRINGS)).encode("utf-8", "replace").decode()[:60]] = ggml, shape, body
    elif kind == 2:
        wanted = rng.choice(KINDS)
        wanted = wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16
        tensors[name] = wanted, shape, bytes([rng.randrange(256)]) * Planned(name, wanted, shape).nbytes
    elif kind == 3:
        wanted = rng.choice(((1,), (32,), (shape[-1],), (*shape, 1), shape[::-1], (32, 64)))
        tensors[name] = GGMLQuantizationType.F32, wanted, bytes(Planned(name, GGMLQuantizationType.F32, wanted).nbytes)
    return metadata, tensors


# --- protocol buffers ------------------------------------------------------------------------------------


def onnx(rng: Rng, data: bytes) -> bytes:
    """A graph whose fields are others, gone, twice, exchanged: whatever its schema allows."""
    from onnx import ModelProto

    model = ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _field(rng, model)
    return sometimes_raw(rng, model.SerializeToString(), 0.15)


def _found(rng: Rng, message: Any) -> tuple[Any, Any, Any] | None:
    """A message, from the top or inside another, one of its fields, and what that holds."""
    while fields := message.ListFields():
        descriptor, held = rng.choice(fields)
        inner = _one(rng, held)
        if not hasattr(inner, "ListFields") or not inner.ListFields() or rng.random() < 0.15:
            return message, descriptor, held
        message = inner
    return None


def _is_repeated(held: Any) -> bool:
    return not isinstance(held, str | bytes) and hasattr(held, "__len__")


def _one(rng: Rng, held: Any) -> Any:
    return held[rng.randrange(len(held))] if _is_repeated(held) else held


def _field(rng: Rng, model: Any) -> None:
    """One field, gone, twice, of another value."""
    if (found := _found(rng, model)) is None:
        return
    message, descriptor, held = found
    repeated, inner, kind = _is_repeated(held), _one(rng, held), rng.randrange(6)
    if kind == 0:
        message.ClearField(descriptor.name)
    elif kind == 1 and repeated:
        del held[rng.randrange(len(held))]
    elif kind == 2 and repeated:
        held.append(inner)
    elif hasattr(inner, "ListFields"):
        other = _one(rng, held)
        inner.CopyFrom(other) if other is not inner else inner.Clear()
    elif repeated:
        held[rng.randrange(len(held))] = _scalar(rng, descriptor, inner)
    else:
        setattr(message, descriptor.name, _scalar(rng, descriptor, inner))


def _scalar(rng: Rng, descriptor: Any, old: Any) -> Any:
    if isinstance(old, str):
        new = str(rng.choice(STRINGS)).encode("utf-8", "replace").decode()
        return rng.choice((new, old + "_", "", str(rng.choice((-1, 0, 1, 2**40, 2**63, "9" * 30)))))
    if isinstance(old, bytes):
        return rng.choice((b"", old[:-1], old + b"\0", old[: len(old) // 2], b"\xff" * len(old)))
    if isinstance(old, float):
        return rng.choice((0.0, -1.0, 3e38, float("nan"), float("inf")))
    if descriptor.enum_type is not None:
        return rng.choice(list(descriptor.enum_type.values_by_number))
    narrow = descriptor.cpp_type in (descriptor.CPPTYPE_INT32, descriptor.CPPTYPE_UINT32)
    most = 2**31 - 1 if narrow else 2**63 - 1
    return rng.choice(
        (0, 1, 2, old + 1 if abs(old) < most else 0, 16, 99, 2**20, most, *(() if old < 0 else (old // 2,)))
    )


FORMATS: dict[str, Damage] = {
    "json": json_file,
    "lines": json_lines,
    "toml": toml_file,
    "text": text,
    "table": table,
    "safetensors": safetensors,
    "npy": npy,
    "gguf": gguf,
    "onnx": onnx,
    "bytes": raw,
    "protobuf": partial(raw),
}
