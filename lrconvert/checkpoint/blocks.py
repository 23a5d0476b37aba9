# SPDX-License-Identifier: Apache-2.0
"""A tensor in blocks of rows: how a checkpoint is read, so that no large tensor is held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK_VALUES = 2**18  # of a tensor, read at once: 1 MB in float32

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of a tensor. `read` makes the array, in any thread and as often as it is called."""

    start: int
    stop: int
    read: Callable[[], Array]

    @property
    def rows(self) -> int:
        return self.stop - self.start


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Start and stop of every block of a tensor, in order; at least one. A vector is one block, a scalar one row."""
    if len(shape) < 2:
        return iter([(0, shape[0] if shape else 1)])
    step = max(1, BLOCK_VALUES // max(1, int(np.prod(shape[1:], dtype=np.int64))))
    return ((start, min(start + step, shape[0])) for start in range(0, max(1, shape[0]), step))


def rows_of(blocks: Sequence[Block], start: int, stop: int) -> Array:
    """Rows `start` to `stop` of a tensor. A block that reaches beyond them is read whole."""
    needed = [block for block in blocks if block.start < stop and start < block.stop]
    pieces = [block.read()[max(0, start - block.start) : stop - block.start] for block in needed]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
