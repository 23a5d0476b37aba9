# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: metadata and where each tensor lies. Trusts nothing in the file.

gguf-py's `GGUFReader` is not used here: it builds several NumPy views per token (2 s for the 49k tokens of
SmolLM2, against 0.05 s below) and believes every count and length, so a few hostile bytes keep it busy for ever.
What is read here is bounded by `MAX_HEADER_BYTES` and by the file's size; arrays are skipped, not decoded,
until `GgufHeader.array` asks for one.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from lrconvert.errors import InputError

VERSION = 3
MAX_HEADER_BYTES = 256 * 2**20  # the largest vocabularies with merges take about 40 MB
MAX_KEYS = MAX_TENSORS = 65_536
MAX_ITEMS = 2**22  # of all arrays together; large vocabularies with scores, types and merges have 1.5 million
MAX_NAME_BYTES = 65_535  # the specification's limit for keys; tensor names are shorter still
MAX_DIMENSIONS = 4

_STRING, _ARRAY = 8, 9
# struct formats by GGUF value type: u8 i8 u16 i16 u32 i32 f32 bool … u64 i64 f64
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufArray:
    """An array in the metadata, left where it is."""

    kind: int  # GGUF value type of its items
    count: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file names and stores it."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # in the order of Hugging Face and NumPy: ggml's, reversed
    file: Path
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of one file."""

    path: Path
    metadata: dict[str, Any]  # scalars and strings as Python values, arrays as `GgufArray`
    tensors: dict[str, GgufTensor]
    spans: dict[str, tuple[int, int]]  # first and last byte (exclusive) of every value, its type in front

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def raw(self, key: str) -> bytes:
        """A value with its type in front, as it stands in the file."""
        start, stop = self.spans[key]
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise InputError(f"{self.path}: shrank while it was read ({key})")
        return data

    def array(self, key: str) -> list[Any] | None:
        """The items of an array, None where the key is missing; `InputError` for another type."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, GgufArray):
            raise InputError(f"{self.path}: {key} is {value!r:.60}; an array is needed")
        with self.path.open("rb") as file:
            file.seek(value.offset)
            data = file.read(value.nbytes)
        if len(data) != value.nbytes:
            raise InputError(f"{self.path}: shrank while it was read ({key})")
        if value.kind != _STRING:
            return np.frombuffer(data, np.dtype("<" + _SCALARS[value.kind])).tolist()
        items, position = [], 0
        for index in range(value.count):
            (length,) = struct.unpack_from("<Q", data, position)
            position += 8 + length
            try:
                items.append(data[position - length : position].decode())
            except UnicodeDecodeError as error:
                raise InputError(f"{self.path}: {key}[{index}] is not UTF-8") from error
        return items


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of one file. Raises `InputError` for anything that isn't a whole GGUF v3."""
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error


class _Cursor:
    """Walks the header from its start; holds what it has passed, in chunks, and no more."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.buffer = bytearray()
        self.position = 0
        self.items = 0  # of all arrays so far
        self.where = "the header"  # for messages: what is being read

    def need(self, count: int) -> None:
        """Make `count` bytes from the position on available, or say why they aren't."""
        end = self.position + count
        if end <= len(self.buffer):
            return
        if end > self.size:
            raise InputError(
                f"{self.path}: truncated: {self.where} needs {count} bytes at {self.position}, the file has {self.size}"
            )
        if end > MAX_HEADER_BYTES:
            raise InputError(f"{self.path}: {self.where} goes beyond the {MAX_HEADER_BYTES} bytes a header may take")
        self.buffer += self.file.read(max(end - len(self.buffer), len(self.buffer), 2**20))
        if end > len(self.buffer):
            raise InputError(f"{self.path}: shrank while it was read ({self.where})")

    def take(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(layout)
        self.need(size)
        values = struct.unpack_from(layout, self.buffer, self.position)
        self.position += size
        return values

    def skip(self, count: int) -> None:
        self.need(count)
        self.position += count

    def name(self) -> str:
        (length,) = self.take("<Q")
        if not 1 <= length <= MAX_NAME_BYTES:
            raise InputError(
                f"{self.path}: {self.where} has a name of {length} bytes; 1 to {MAX_NAME_BYTES} are allowed"
            )
        self.skip(length)
        name = self.buffer[self.position - length : self.position].decode(errors="replace")
        if not name.isprintable() or "\ufffd" in name:  # names go into messages as they are
            raise InputError(f"{self.path}: {self.where} has the name {name!r:.60}, which is not printable UTF-8")
        return name

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take("<" + _SCALARS[kind])[0]
        if kind == _STRING:
            (length,) = self.take("<Q")
            self.skip(length)
            return self.buffer[self.position - length : self.position].decode(errors="replace")
        if kind == _ARRAY:
            return self.array()
        raise InputError(f"{self.path}: {self.where} has the value type {kind}; 0 to 12 are known")

    def array(self) -> GgufArray:
        kind, count = self.take("<IQ")
        start = self.position
        if kind in _SCALARS or kind == _STRING:
            # Before anything is counted or allocated; a string takes at least the eight bytes of its length.
            self.need(count * (8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])))
            self.items += count
            if self.items > MAX_ITEMS:
                raise InputError(
                    f"{self.path}: {self.where} brings the items of all arrays to {self.items}; "
                    f"at most {MAX_ITEMS} are read"
                )
        if kind in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                (length,) = self.take("<Q")
                self.skip(length)
        else:
            raise InputError(f"{self.path}: {self.where} is an array of the type {kind}; scalars and strings are read")
        return GgufArray(kind, count, start, self.position - start)


def _read(path: Path, file: BinaryIO) -> GgufHeader:
    cursor = _Cursor(path, file)
    if cursor.size < 24:
        raise InputError(f"{path}: {cursor.size} bytes; a GGUF header alone takes 24")
    magic, version = cursor.take("<4sI")
    if magic != b"GGUF":
        raise InputError(f"{path}: not a GGUF file (it starts with {magic!r})")
    if version != VERSION:
        if int.from_bytes(version.to_bytes(4, "little"), "big") <= 0xFFFF:
            raise InputError(
                f"{path}: a big-endian GGUF file; only little-endian ones are read",
                remedy="`gguf-convert-endian FILE little` (from gguf-py) rewrites it",
            )
        raise InputError(
            f"{path}: GGUF version {version}; version {VERSION} is needed",
            remedy="Convert the model again with a llama.cpp of 2024 or later" if version in (1, 2) else None,
        )
    tensor_count, key_count = cursor.take("<QQ")
    # The smallest entries: a one-byte name, a type and a byte; a one-byte name, one dimension, type and offset.
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS or 14 * key_count + 33 * tensor_count > cursor.size:
        raise InputError(
            f"{path}: declares {tensor_count} tensors and {key_count} metadata keys; a file of {cursor.size} bytes "
            f"can't hold them, or they are more than {MAX_TENSORS}"
        )
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(key_count):
        cursor.where = f"metadata key {index}"
        key = cursor.name()
        cursor.where = key
        if key in metadata:
            raise InputError(f"{path}: the metadata key {key} appears twice")
        begin = cursor.position
        metadata[key] = cursor.value(cursor.take("<I")[0])
        spans[key] = (begin, cursor.position)
    entries = []
    for index in range(tensor_count):
        cursor.where = f"tensor {index}"
        name = cursor.name()
        cursor.where = f"tensor {name}"
        (dimensions,) = cursor.take("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise InputError(f"{path}: {name} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        shape = cursor.take(f"<{dimensions}Q")[::-1]
        entries.append((name, shape, *cursor.take("<IQ")))
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{path}: general.alignment is {alignment!r:.60}; a power of two is needed")
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(path, metadata, _place(path, cursor.size, start, alignment, entries), spans)


def _place(
    path: Path, size: int, start: int, alignment: int, entries: list[tuple[str, tuple[int, ...], int, int]]
) -> dict[str, GgufTensor]:
    """The tensors, checked: known types, whole blocks, inside the file, on no other's bytes."""
    tensors: dict[str, GgufTensor] = {}
    problems = []
    for name, shape, kind, offset in entries:
        try:
            quantisation = GGMLQuantizationType(kind)
        except ValueError:
            problems.append(f"{name} has the type {kind}, which this gguf-py doesn't know")
            continue
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
        elements = math.prod(shape)
        nbytes = elements // block * block_bytes
        if not elements:
            problems.append(f"{name} is empty: its shape is {list(shape)}")
        elif shape[-1] % block:
            problems.append(f"{name} has rows of {shape[-1]}; {quantisation.name} needs a multiple of {block}")
        elif offset % alignment:
            problems.append(f"{name} starts at {offset}, not a multiple of the alignment {alignment}")
        elif start + offset + nbytes > size:
            problems.append(f"{name} ends at byte {start + offset + nbytes}, the file at {size}: truncated?")
        elif name in tensors:
            problems.append(f"{name} appears twice")
        tensors[name] = GgufTensor(name, quantisation, shape, path, start + offset, nbytes)
    if not problems:
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        problems = [
            f"{later.name} overlaps {earlier.name}"
            for earlier, later in itertools.pairwise(ordered)
            if earlier.offset + earlier.nbytes > later.offset
        ]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise InputError.collect(path, shown)
    return tensors
