# SPDX-License-Identifier: Apache-2.0
"""How far a stored tensor is from the model's: as a whole, and in its worst row. Read in blocks, whatever its size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lrconvert.checkpoint import Checkpoint
from lrconvert.checkpoint.blocks import Array
from lrconvert.parity.tolerances import row_error, weight_error

# A row of (nearly) nothing is off by what its neighbours' blocks and the smallest step of its type make of it: errors
# are parts of the row's norm, or of this part of a usual row's.
FLOOR = 0.05


@dataclass(frozen=True)
class Distance:
    """Parts of a norm: of the whole tensor, of the worst row (None for a vector), and which row that is. `exact`:
    nothing changed the tensor on its way, so that it has to be equal."""

    whole: float
    row: float | None = None
    index: int = 0
    exact: bool = False

    def reason(self, pair: Pair, *, exactly: bool) -> str | None:
        """What is wrong with this distance, in words; None where nothing is."""
        kind, bound, most = pair.kind, weight_error(pair.kind), row_error(pair.kind)
        what = f"{pair.own} differs from the model's"
        if exactly and self.exact and self.whole > 0:
            where = "" if self.row is None else f", row {self.index} the most"
            return f"{what} by {self.whole:.1e} of its norm{where}; nothing should have changed it"
        if not self.whole <= bound:
            return f"{what} by {self.whole:.1e} of its norm; {kind} allows {bound:.0e}"
        if self.row is not None and not self.row <= most:
            return f"{what} in row {self.index} by {self.row:.1e} of its norm; {kind} allows {most:.0e}"
        return None


@dataclass(frozen=True)
class Pair:
    """A tensor of an artifact, under its name there, and the model's. `offset`: what is added to both before they
    multiply anything; errors are parts of that sum."""

    stored: Checkpoint
    own: str
    model: Checkpoint
    name: str
    offset: float = 0.0

    @property
    def kind(self) -> str:
        return self.stored.tensors[self.own].dtype

    @property
    def values(self) -> int:
        return math.prod(self.stored.tensors[self.own].shape)

    def distance(self, *, rounded: bool) -> Distance:
        """`rounded`: the model's values are rounded to the stored type first, where that is a float type."""
        exact = self.name not in self.model.touched
        if exact and self._is_linked():
            return Distance(0.0, exact=True)
        squares, norms = [], []
        for ours, theirs in self._blocks():
            if rounded and theirs.dtype != ours.dtype:
                with np.errstate(over="ignore", invalid="ignore"):
                    theirs = theirs.astype(ours.dtype)
            off, norm = _squares(ours, theirs, self.offset)
            squares.append(off)
            norms.append(norm)
        return _measured(np.concatenate(squares), np.concatenate(norms), exact)

    def _is_linked(self) -> bool:
        """Whether both are the same bytes of one file."""
        ours, theirs = self.stored.tensors[self.own], self.model.tensors[self.name]
        same = (ours.name, ours.dtype, ours.shape) == (theirs.name, theirs.dtype, theirs.shape)
        try:
            return same and ours.file.samefile(theirs.file)
        except OSError:
            return False

    def _blocks(self) -> Iterator[tuple[Array, Array]]:
        ours, theirs = list(self.stored.blocks(self.own)), list(self.model.blocks(self.name))
        if [(b.start, b.stop) for b in ours] == [(b.start, b.stop) for b in theirs]:
            yield from ((own.read(), their.read()) for own, their in zip(ours, theirs, strict=True))
        else:
            yield self.stored.read(self.own), self.model.read(self.name)


def _squares(ours: Array, theirs: Array, offset: float) -> tuple[Array, Array]:
    """Squared norms of every row: of the difference, and of the model's with the offset. A vector is one row."""
    rows = (1, -1) if ours.ndim < 2 else (len(ours), -1)
    if ours.dtype == theirs.dtype and np.array_equal(_bits(ours), _bits(theirs)):
        # Equal bit by bit, NaN too. The norm only matters where another block differs; then this one's hardly does.
        return np.zeros(rows[0]), np.full(rows[0], np.nan)
    wide = theirs.astype(np.float64).reshape(rows)
    with np.errstate(invalid="ignore", over="ignore"):
        off = ours.astype(np.float64).reshape(rows) - wide
        whole = wide + offset if offset else wide
        return np.einsum("ij,ij->i", off, off), np.einsum("ij,ij->i", whole, whole)


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint8)


def _measured(squares: Array, norms: Array, exact: bool) -> Distance:
    if not np.any(squares):  # NaN counts as something
        return Distance(0.0, None if len(squares) == 1 else 0.0, exact=exact)
    measured = norms[np.isfinite(norms)]
    usual = float(measured.mean()) if len(measured) else 0.0
    norms = np.where(np.isnan(norms), usual, norms)
    whole = _part(float(squares.sum()), float(norms.sum()))
    if len(squares) == 1:
        return Distance(whole, exact=exact)
    least = FLOOR**2 * usual
    parts = [_part(float(square), max(float(norm), least)) for square, norm in zip(squares, norms, strict=True)]
    index = int(np.argmax(parts))
    return Distance(whole, parts[index], index, exact)


def _part(square: float, norm: float) -> float:
    part = math.sqrt(square / max(norm, 1e-300)) if math.isfinite(square) else math.inf
    return part if math.isfinite(part) else math.inf  # NaN would be less than nothing
