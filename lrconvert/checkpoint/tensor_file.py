# SPDX-License-Identifier: Apache-2.0
"""A safetensors file read without mapping it.

Pages of a mapping count as our memory, up to the size of the file, and a file that shrinks under a mapping
kills the process; plain reads do neither. The safetensors library checks the header.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.checkpoint.base import FLOAT_DTYPES, TensorInfo, numpy_dtype
from lrconvert.checkpoint.blocks import Array, Block, row_blocks
from lrconvert.errors import InputError

SUFFIX = ".safetensors"
# What quantisers store, as safetensors spells it, beside floats and what ml_dtypes has.
_INTEGERS = {"U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
_SMALL_FLOATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


def stored_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a stored one. Raises `KeyError` for those that nobody reads."""
    if name in _SMALL_FLOATS:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _SMALL_FLOATS[name]))
    return np.dtype(_INTEGERS[name]) if name in _INTEGERS else numpy_dtype(name)


class TensorFile:
    """The tensors of one file, in the order in which they lie there. Raises `InputError` if it isn't whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        header, data = _checked_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}  # words, as safetensors demands
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            self.tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, stop - start)
            self._offsets[name] = data + start

    def blocks(self, name: str) -> Iterator[Block]:
        """One tensor by rows; its dtype has to be one of `FLOAT_DTYPES`."""
        ranges = row_blocks(self.tensors[name].shape)
        return (Block(start, stop, partial(self.rows, name, start, stop)) for start, stop in ranges)

    def read(self, name: str) -> Array:
        """One tensor whole, of a dtype that `stored_dtype` knows."""
        shape = self.tensors[name].shape
        return self.values(name, 0, int(np.prod(shape, dtype=np.int64))).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows along the first dimension."""
        inner = self.tensors[name].shape[1:]
        width = int(np.prod(inner, dtype=np.int64))
        return self.values(name, start * width, (stop - start) * width).reshape(stop - start, *inner)

    def columns(self, name: str, start: int, stop: int) -> Array:
        """Columns of a matrix: a piece of every row, so ask for many at once."""
        (rows, width), dtype = self.tensors[name].shape, stored_dtype(self.tensors[name].dtype)
        if stop - start == width:
            return self.rows(name, 0, rows)
        found = np.empty((rows, stop - start), dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                for row in range(rows):
                    file.seek(self._offsets[name] + (row * width + start) * dtype.itemsize)
                    if file.readinto(found[row].view(np.uint8).data) != found[row].nbytes:
                        raise InputError(f"{self.path}: shrank while {name} was read")
        except OSError as error:
            raise InputError(f"{self.path}: can't be read ({error.strerror or error})") from error
        return found

    def values(self, name: str, first: int, count: int) -> Array:
        """Values of a tensor as they follow each other in the file."""
        dtype = stored_dtype(self.tensors[name].dtype)
        try:
            values = np.fromfile(self.path, dtype, count, offset=self._offsets[name] + first * dtype.itemsize)
        except OSError as error:
            raise InputError(f"{self.path}: can't be read ({error.strerror or error})") from error
        if values.size != count:
            raise InputError(f"{self.path}: shrank while {name} was read")
        return values


def _checked_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors asks for by name)
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path}: not a file")
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from error
    return header, 8 + size


def other_dtypes(tensors: dict[str, TensorInfo]) -> list[str]:
    """A problem for every tensor that isn't of a float dtype."""
    return [
        f"{info.name} is {info.dtype}; one of {', '.join(FLOAT_DTYPES)} is needed"
        for info in tensors.values()
        if info.dtype not in FLOAT_DTYPES
    ]
