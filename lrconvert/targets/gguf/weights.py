# SPDX-License-Identifier: Apache-2.0
"""The tensors' bytes, block by block: copied where the type stays, else encoded, rows permuted where llama.cpp's
rotation wants them so.

Whole rows make a block, since a quantised type makes its own blocks within a row. The rows of q and k move within
their head, whatever type they have: whole heads are made at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType

from lrconvert.artifact.prefetch import Job
from lrconvert.checkpoint import Checkpoint
from lrconvert.checkpoint.base import Encoded
from lrconvert.checkpoint.blocks import Array, Block, rows_of
from lrconvert.targets.gguf.encode import Encoder
from lrconvert.targets.gguf.layout import Planned

# What is made at once of a tensor: bytes as they are written, small enough that they are still in the processor's
# cache when they are looked at, written and hashed; values where the type is quantised, which costs far more.
BLOCK_BYTES = 2 * 2**20
BLOCK_VALUES = 2**20

Make = Callable[[], memoryview]  # the bytes of some rows


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from. `heads`: the number of heads whose rows are interleaved; None: rows
    stay in their order. `values`: made here, not read. `experts`: the checkpoint's tensors that follow each other in
    it, `name` the first. `offset`: what is added to every value: files have norms' whole weights, where a family's
    count from one."""

    planned: Planned
    name: str  # the checkpoint's
    heads: int | None = None
    values: Array | None = None
    experts: tuple[str, ...] = ()
    expert: tuple[int, int] = (0, 1)  # which of how many experts' rows these are
    offset: float = 0.0


def jobs(checkpoint: Checkpoint, source: Source, encoder: Encoder) -> Iterator[Job]:
    """Functions that make the bytes of a tensor, in order."""
    if source.experts:
        each = replace(source.planned, shape=source.planned.shape[1:])
        for number, name in enumerate(source.experts):
            yield from jobs(checkpoint, Source(each, name, expert=(number, len(source.experts))), encoder)
        return
    for make, rows in _blocks(checkpoint, source, encoder):
        yield make, rows * source.planned.row_bytes


def _blocks(checkpoint: Checkpoint, source: Source, encoder: Encoder) -> Iterator[tuple[Make, int]]:
    """The tensor's blocks in order, each with its number of rows in the file to write."""
    planned, heads = source.planned, source.heads
    if source.values is not None:
        yield partial(_encoded, encoder, planned, partial(np.asarray, source.values)), planned.rows
        return
    stored = checkpoint.encoded(source.name)
    if stored is not None and stored.type == planned.kind.name and not (stored.interleaved and heads is None):
        heads = None if stored.interleaved else heads
        for start, stop in row_ranges(planned) if heads is None else [(0, planned.rows)]:
            yield partial(_copied, stored, planned, start, stop, heads), stop - start
        return
    blocks = checkpoint.blocks(source.name)
    if heads is None:
        for block in blocks:
            read = partial(_shifted, block.read, source.offset) if source.offset else block.read
            yield partial(_encoded, encoder, planned, read, source.expert), _rows(planned, block.rows)
        return
    every = list(blocks)
    for start, stop in _head_ranges(planned, heads):
        read = partial(_whole_heads, every, start, stop, planned.shape[0] // heads)
        yield partial(_encoded, encoder, planned, read), _rows(planned, stop - start)


def _rows(planned: Planned, count: int) -> int:
    """Rows along the last dimension; a vector is one."""
    return planned.rows * count // planned.shape[0]


def _encoded(
    encoder: Encoder, planned: Planned, read: Callable[[], Array], expert: tuple[int, int] = (0, 1)
) -> memoryview:
    return encoder.encode(read().reshape(-1, planned.shape[-1]), planned.kind, planned.name, *expert)


def _shifted(read: Callable[[], Array], offset: float) -> Array:
    return read().astype(np.float64) + offset


def _copied(stored: Encoded, planned: Planned, start: int, stop: int, heads: int | None) -> memoryview:
    """Rows as they are stored; a whole tensor is interleaved, of a vector the values."""
    raw = stored.read(start, stop)
    return (raw if heads is None else interleaved(raw.reshape(planned.shape[0], -1), heads)).reshape(-1).data


def _whole_heads(blocks: list[Block], start: int, stop: int, each: int) -> Array:
    """Rows of whole heads, `each` rows a head, in the order of the file to write."""
    return interleaved(rows_of(blocks, start, stop), (stop - start) // each)


def _head_ranges(planned: Planned, heads: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of blocks of whole heads, each of about the usual number of values."""
    rows, each = planned.shape[0], planned.shape[0] // heads
    width = planned.shape[-1] if len(planned.shape) > 1 else 1
    step = each * max(1, BLOCK_VALUES // (each * width))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


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
