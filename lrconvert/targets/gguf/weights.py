# SPDX-License-Identifier: Apache-2.0
"""The tensors' bytes, block by block: copied where the type stays, else encoded, rows permuted where llama.cpp's
rotation wants them so.

Whole rows make a block, since a quantised type makes its own blocks within a row. The rows of q and k move within
their head, whatever type they have; those tensors are made in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from lrconvert.artifact.prefetch import Job
from lrconvert.checkpoint import Checkpoint
from lrconvert.checkpoint.base import CheckpointView
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.checkpoint.gguf_header import GgufTensor
from lrconvert.checkpoint.tensor_file import TensorFile
from lrconvert.errors import InputError
from lrconvert.targets.gguf.encode import Encoder
from lrconvert.targets.gguf.layout import Planned

# What is made at once of a tensor: bytes as they are written, small enough that they are still in the processor's
# cache when they are looked at, written and hashed; values where the type is quantised, which costs far more.
BLOCK_BYTES = 2 * 2**20
BLOCK_VALUES = 2**20

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from. `heads`: its rows have to be interleaved, as those of so many heads; None: they
    stay in their order. `values`: made here, not read."""

    planned: Planned
    name: str  # the checkpoint's
    heads: int | None = None
    values: Array | None = None


def jobs(checkpoint: Checkpoint, source: Source, encoder: Encoder) -> Iterator[Job]:
    """Functions that make the bytes of a tensor, in order."""
    planned = source.planned
    for make, rows in _Reader(checkpoint).blocks(source):
        yield partial(_encoded, encoder, planned, make), rows * planned.row_bytes


def _encoded(encoder: Encoder, planned: Planned, make: Callable[[], Array | bytes]) -> memoryview:
    rows = make()
    if isinstance(rows, bytes):
        return memoryview(rows)
    return encoder.encode(rows.reshape(-1, planned.shape[-1]), planned.kind, planned.name)


class _Reader:
    """Knows how to read blocks of rows of any checkpoint. What it gives is bytes where they are right already."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[Path, TensorFile] = {}

    def blocks(self, source: Source) -> Iterator[tuple[Callable[[], Array | bytes], int]]:
        """The tensor's blocks in order, each with its number of rows."""
        planned = source.planned
        if source.values is not None:
            yield partial(np.asarray, source.values), planned.rows
            return
        base = self._base(source.name)
        if isinstance(base, GgufCheckpoint):
            yield from self._from_gguf(base, source)
        elif source.heads is not None or base is None or base.format != "safetensors" or len(planned.shape) == 1:
            yield partial(self._whole, source), planned.rows
        else:
            file = self._file(base.tensors[source.name].file)
            for start, stop in row_ranges(planned):
                yield partial(file.rows, source.name, start, stop), stop - start

    def _base(self, name: str) -> Checkpoint | None:
        """The checkpoint whose file holds this tensor as it is; None where a view changes it."""
        checkpoint = self.checkpoint
        while isinstance(checkpoint, CheckpointView):
            if name in checkpoint.touched:
                return None
            checkpoint = checkpoint.base
        return checkpoint

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]

    def _whole(self, source: Source) -> Array:
        """A tensor whole, in the order of the file to write."""
        values = self._merged(source.name)
        return values if source.heads is None else interleaved(values, source.heads)

    def _merged(self, name: str) -> Array:
        checkpoint, base = self.checkpoint, self._base(name)
        if base is not None and base.format == "safetensors":
            return self._file(base.tensors[name].file).read(name)
        if base is None and isinstance(checkpoint, CheckpointView) and name in checkpoint.touched:
            return np.concatenate([part() for part in checkpoint.parts(name)])  # wider than what is stored
        return checkpoint.read(name)

    def _from_gguf(self, base: GgufCheckpoint, source: Source) -> Iterator[tuple[Callable[[], Array | bytes], int]]:
        """Rows of the file keep their order, unless only one of the two architectures permutes them."""
        planned, stored = source.planned, base.stored_as(source.name)
        permute = source.heads if base.permuted_heads(source.name) is None else None
        same = stored.type == planned.kind
        ranges = [(0, planned.rows)] if permute is not None else row_ranges(planned)
        for start, stop in ranges:
            yield partial(_gguf_rows, base, stored, start, stop, same, permute), stop - start


def _gguf_rows(
    base: GgufCheckpoint, stored: GgufTensor, start: int, stop: int, same: bool, heads: int | None
) -> Array | bytes:
    if not same:
        values = base.rows(stored, start, stop)
        return values if heads is None else interleaved(values.reshape(stored.shape), heads)
    raw = read_rows(stored, start, stop)
    if heads is None:
        return raw
    # Whole tensors only; a bias has one row, and its values move.
    return interleaved(np.frombuffer(raw, np.uint8).reshape(stored.shape[0], -1), heads).tobytes()


def read_rows(stored: GgufTensor, start: int, stop: int) -> bytes:
    """Rows of a tensor as the bytes that stand in its file."""
    width = stored.nbytes // int(np.prod(stored.shape[:-1], dtype=np.int64))
    with stored.file.open("rb") as file:
        file.seek(stored.offset + start * width)
        data = file.read((stop - start) * width)
    if len(data) != (stop - start) * width:
        raise InputError(f"{stored.file}: shrank while {stored.name} was read")
    return data


def row_ranges(planned: Planned) -> Iterator[tuple[int, int]]:
    """Starts and ends of the blocks of a tensor."""
    by_values = BLOCK_VALUES // planned.shape[-1]
    step = max(1, BLOCK_BYTES // planned.row_bytes if is_plain(planned.kind) else by_values)
    return ((start, min(start + step, planned.rows)) for start in range(0, planned.rows, step))


def is_plain(kind: GGMLQuantizationType) -> bool:
    """Whether a type stores every value by itself."""
    return kind.name in ("F32", "F16", "BF16", "F64")


def interleaved(values: Array, heads: int) -> Array:
    """Rows of q or k in the order of llama.cpp's `llama` architecture: channel i and i + d/2 side by side."""
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
