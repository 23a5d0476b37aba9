# SPDX-License-Identifier: Apache-2.0
"""A quantised weight: the tensors that store it, and the rows that they mean.

A format's decoder makes a `Weight` of a module's `Parts`. It looks at headers, and reads no more than a few bytes; what
doesn't fit together is an `InputError` that names the tensor. Values are read later, rows at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from lrconvert.checkpoint.base import TensorInfo
from lrconvert.checkpoint.blocks import Array, Block, row_blocks
from lrconvert.checkpoint.folder import FolderCheckpoint
from lrconvert.errors import InputError

FLOATS = ("F32", "BF16", "F16")
FP8 = ("F8_E4M3", "F8_E5M2")
EXPONENTS = ("U8", "F8_E8M0")  # a power of two, its exponent plus 127
BAND_ROWS = 1024  # of a weight that is stored with its rows side by side: so many are read at once

Loaded = tuple[Array, ...]


@dataclass(frozen=True)
class Weight:
    """How a weight [out, in] is read. `kind`: its format, in words. `parts`: the stored tensors, by full name.

    `load` reads what rows `start` to `stop` are made of, and `decode` makes rows of that, float32 [rows, in]; its
    `start` and `stop` count from the first row that was loaded. `banded`: rows lie side by side in the file, so many
    are loaded at once, and decoded in parts.
    """

    kind: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    load: Callable[[int, int], Loaded]
    decode: Callable[[Loaded, int, int], Array]
    banded: bool = False

    def blocks(self) -> Iterator[Block]:
        """The rows, in blocks that any thread may read."""
        rows, columns = self.shape
        if not self.banded:
            for start, stop in row_blocks(self.shape):
                yield Block(start, stop, partial(self._read, start, stop))
            return
        bands = _Bands(self)
        for band in range(0, rows, BAND_ROWS):
            for first, last in row_blocks((min(BAND_ROWS, rows - band), columns)):
                yield Block(band + first, band + last, partial(bands.read, band, first, last))

    def _read(self, start: int, stop: int) -> Array:
        return self.decode(self.load(start, stop), 0, stop - start)


class _Bands:
    """Reads blocks of a banded weight, and keeps the last two bands: threads are a block or two apart."""

    def __init__(self, weight: Weight) -> None:
        self._weight, self._lock = weight, threading.Lock()
        self._held: dict[int, Loaded] = {}

    def read(self, band: int, first: int, last: int) -> Array:
        with self._lock:
            if band not in self._held:
                loaded = self._weight.load(band, min(band + BAND_ROWS, self._weight.shape[0]))
                self._held = {**dict(list(self._held.items())[-1:]), band: loaded}
            loaded = self._held[band]
        return self._weight.decode(loaded, first, last)


@dataclass(frozen=True)
class Parts:
    """The stored tensors of one module, by what follows the module's name: "qweight", "weight_scale", …"""

    checkpoint: FolderCheckpoint
    module: str
    names: Mapping[str, str]
    used: list[str] = field(default_factory=list)

    def __contains__(self, part: str) -> bool:
        return part in self.names

    def info(self, part: str) -> TensorInfo:
        """A part that is needed. Raises `InputError` where it is missing."""
        if part not in self.names:
            beside = ", ".join(sorted(self.names))
            raise InputError(f"{self.module}.{part} is missing (beside it: {beside})")
        return self.checkpoint.tensors[self.names[part]]

    def take(self, part: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> TensorInfo:
        """A part of one of the dtypes and, where `shapes` are given, of one of these shapes. Raises `InputError`."""
        info = self.info(part)
        self.used.append(info.name)
        if info.dtype not in dtypes:
            raise InputError(f"{self._where(info)} is {info.dtype}; {' or '.join(dtypes)} is needed")
        if shapes and info.shape not in shapes:
            needed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise InputError(f"{self._where(info)} has shape {list(info.shape)}; {needed} is needed")
        return info

    def matrix(self, part: str, dtypes: Sequence[str]) -> tuple[int, int]:
        """The shape of a part that has two dimensions."""
        info = self.take(part, dtypes)
        if len(info.shape) != 2 or 0 in info.shape:
            raise InputError(f"{self._where(info)} has shape {list(info.shape)}; a matrix is needed")
        return info.shape[0], info.shape[1]

    def rows(self, part: str, start: int, stop: int) -> Array:
        return self._file(part).rows(self.names[part], start, stop)

    def columns(self, part: str, start: int, stop: int) -> Array:
        return self._file(part).columns(self.names[part], start, stop)

    def flat(self, part: str, first: int, count: int) -> Array:
        """Values of a tensor as they follow each other, whatever its shape."""
        return self._file(part).values(self.names[part], first, count)

    def octets(self, part: str, first: int, count: int) -> Array:
        """Bytes of a tensor, whatever its dtype."""
        width = self.info(part).nbytes // max(1, math.prod(self.info(part).shape))
        whole = self.flat(part, first // width, -(-(first + count) // width) - first // width)
        return whole.view(np.uint8)[first % width : first % width + count]

    def whole(self, part: str) -> Array:
        return self._file(part).read(self.names[part])

    def finite(self, part: str, values: Array) -> Array:
        """Scales as float32. Raises `InputError` where one of them isn't finite."""
        wide = EXPONENT[values.view(np.uint8)] if self.info(part).dtype in EXPONENTS else values.astype(np.float32)
        if not np.isfinite(wide).all():
            raise self.damaged(part, "holds values that are not finite")
        return wide

    def damaged(self, part: str, what: str) -> InputError:
        """For what is found only when values are read."""
        return InputError(f"{self.info(part).file}: {self.names[part]} {what}", remedy=DAMAGED)

    def weight(self, kind: str, shape: tuple[int, int], load: Any, decode: Any, *, banded: bool = False) -> Weight:
        """The weight that these parts mean."""
        return Weight(kind, shape, tuple(dict.fromkeys(self.used)), load, decode, banded)

    def _file(self, part: str) -> Any:
        return self.checkpoint.file_of(self.names[part])

    def _where(self, info: TensorInfo) -> str:
        return f"{info.file.name}: {info.name}"


DAMAGED = "The file is damaged, or belongs to another config.json: download the checkpoint again, or quantise it again"


# --- values ----------------------------------------------------------------------------------------------

# 2^(byte − 127); 255 is no number.
EXPONENT = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.nan).astype(np.float32)
# E2M1: sign, two bits of exponent, one of mantissa.
FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def float8(values: Array) -> Array:
    """float8 as float32, by a table: it is several times as fast as a cast."""
    table = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32)
    return table[values.view(np.uint8)]


def unpacked(words: Array, bits: int) -> Array:
    """Whole numbers of 2, 4 or 8 bits packed along the last dimension of `words`, the lowest bits first: uint8
    [..., 8 · bytes of a word · n / bits]."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    each = 8 // bits
    found = np.empty((*octets.shape, each), np.uint8)
    for place in range(each):
        np.bitwise_and(octets >> (place * bits), 2**bits - 1, out=found[..., place])
    return found.reshape(*octets.shape[:-1], -1)


def spread(values: Array, wide: int, columns: int) -> Array:
    """A value for every `wide` columns as one for each: [rows, groups] to [rows, columns]."""
    return values if values.shape[1] == 1 else np.repeat(values, wide, axis=1)[:, :columns]


def scaled(codes: Array, scales: Array, zeros: Array | None = None) -> Array:
    """(codes − zeros) · scales in float32: exact, but for the product's one rounding."""
    values = codes.astype(np.float32)
    if zeros is not None:
        values -= zeros.astype(np.float32)
    values *= scales
    return values
