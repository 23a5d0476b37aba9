# SPDX-License-Identifier: Apache-2.0
"""The bytes of a GGUF file around its tensors: header, metadata, where each tensor lies (ggml/docs/gguf.md, version 3).

gguf-py's `GGUFWriter` is not used: re-baking copies a value unchanged from another file (49k tokens as one
block of bytes), and every offset has to be known before the first tensor is made.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from lrconvert.errors import UnsupportedError

VERSION = 3
ALIGNMENT = GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True)
class Raw:
    """A value with its type in front, as it stands in another file."""

    data: bytes


@dataclass(frozen=True)
class Scalar:
    """A number whose type is not the one that `pack` would choose."""

    kind: GGUFValueType
    value: int


Value = Any  # str, bool, int, float, a list of one of them, Scalar or Raw
_FORMATS = {
    GGUFValueType.UINT16: "<H",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
}


@dataclass(frozen=True)
class Planned:
    """A tensor to write; its shape as NumPy has it, the reverse of ggml's."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: quantised types make blocks of values within one."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * block_bytes

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


def padding(nbytes: int) -> int:
    """How many zero bytes follow `nbytes` up to the next multiple of the alignment."""
    return -nbytes % ALIGNMENT


def header_of(metadata: Mapping[str, Value], tensors: Sequence[Planned]) -> bytes:
    """Everything before the data of the first tensor; tensors follow in this order, each padded."""
    parts = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), len(metadata))]
    parts += [_text(key) + _packed(key, value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]
        parts.append(_text(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.kind, offset))
        offset += tensor.nbytes + padding(tensor.nbytes)
    header = b"".join(parts)
    return header + bytes(padding(len(header)))


def _packed(key: str, value: Value) -> bytes:
    """`pack`, for numbers that the format can hold; float32 makes zero of very small ones."""
    try:
        data = pack(value)
        if not isinstance(value, float) or not value or struct.unpack_from("<f", data, 4)[0]:
            return data
    except (struct.error, OverflowError):
        pass
    raise UnsupportedError(f"{key} is {value!r:.60}, which does not fit into the 32 bits of a GGUF")


def pack(value: Value) -> bytes:
    """A metadata value, its type in front: int as uint32, float as float32, lists of int as int32."""
    if isinstance(value, Raw):
        return value.data
    kind = _kind(value)
    if isinstance(value, Scalar):
        return struct.pack("<I", kind) + struct.pack(_FORMATS[kind], value.value)
    if not isinstance(value, list):
        return struct.pack("<I", kind) + _item(kind, value)
    inner = GGUFValueType.INT32 if _kind(value[0]) == GGUFValueType.UINT32 else _kind(value[0])
    if inner == GGUFValueType.STRING:
        items = b"".join(_text(item) for item in value)
    else:
        items = np.asarray(value, np.dtype(_FORMATS[inner])).tobytes()
    return struct.pack("<IIQ", GGUFValueType.ARRAY, inner, len(value)) + items


def _kind(value: Value) -> GGUFValueType:
    if isinstance(value, Scalar):
        return value.kind
    kinds = ((bool, GGUFValueType.BOOL), (int, GGUFValueType.UINT32), (float, GGUFValueType.FLOAT32),
             (str, GGUFValueType.STRING), (list, GGUFValueType.ARRAY))  # fmt: skip
    return next(kind for python, kind in kinds if isinstance(value, python))


def _item(kind: GGUFValueType, value: Any) -> bytes:
    return _text(value) if kind == GGUFValueType.STRING else struct.pack(_FORMATS[kind], value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def split_parts(tensors: Iterable[Planned], limit: int | None) -> list[list[Planned]]:
    """Tensors of each file, in order: no file's tensors take more than `limit` bytes, unless a single one does."""
    parts: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        padded = tensor.nbytes + padding(tensor.nbytes)
        if limit is not None and parts[-1] and size + padded > limit:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += padded
    return parts
