# SPDX-License-Identifier: Apache-2.0
"""What a search may find: factor sets on a grid, within bounds, monotone; and the analytic sets it starts from.

Two spaces (docs/search.md):

- `longrope` (arXiv 2402.13753, section 4.1): λ_i in [1, 1.25·s] in steps of 0.01, non-decreasing in i; start tokens
  from a fixed set.
- `longrope2` (arXiv 2502.20082): from a critical index on λ_i in [s, 2s], non-decreasing; below it NTK-like,
  λ_i = λ_c^(i/c). The critical index itself is searched, downwards from the theoretical one, the first whose period is
  longer than the original window.

`Space.make` makes every candidate: it projects any factors into the space.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lrconvert import rope
from lrconvert.errors import UsageError
from lrconvert.rope import Array, Tier

Kind = Literal["longrope", "longrope2"]
GRID = 100  # steps a unit of λ has
HEADROOM = 1.25  # how far beyond s a factor may go in the space of LongRoPE
# The paper's set without 1: position 0 has angle 0 under every factor, so n̂ = 1 computes what n̂ = 0 does.
START_TOKENS = (0, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
ATTENTION_DIGITS = 3  # a searched attention factor has steps of 0.001
PAPER_SEEDS = ("pi", "ntk", "yarn")
ALL_SEEDS = (*PAPER_SEEDS, "ntk2")
# Attention factors for a short set: from a little below 1 to those of long sets at 64x.
SHORT_ATTENTION = (0.95, 1.25)


@dataclass(frozen=True)
class Candidate:
    """One factor set to try. `steps` are the factors in hundredths, so that equal sets are equal values.

    `critical` is the critical index in the space of LongRoPE2, where it is part of what is searched.
    """

    steps: tuple[int, ...]
    start_tokens: int = 0
    attention_factor: float = 1.0
    critical: int | None = None

    @property
    def factors(self) -> tuple[float, ...]:
        """λ_i, fast frequencies first."""
        return tuple(step / GRID for step in self.steps)

    def tier(self, max_length: int) -> Tier:
        return Tier(max_length, self.factors, self.start_tokens, self.attention_factor)

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"factors": list(self.factors), "start_tokens": self.start_tokens}
        values["attention_factor"] = self.attention_factor
        return values if self.critical is None else {**values, "critical": self.critical}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Candidate:
        steps = tuple(round(factor * GRID) for factor in values["factors"])
        return cls(steps, values["start_tokens"], values["attention_factor"], values.get("critical"))


@dataclass(frozen=True)
class Space:
    """The candidates for one model and one window. `attention` is the lowest and the highest attention factor: equal
    ones fix it.

    Raises `UsageError` for LongRoPE2's space at a window that is no extension.
    """

    rotary_dim: int
    base: float
    original_window: int
    target: int
    attention: tuple[float, float]
    kind: Kind = "longrope"
    start_tokens: tuple[int, ...] = START_TOKENS

    def __post_init__(self) -> None:
        if self.kind == "longrope2" and self.target <= self.original_window:
            raise UsageError(
                f"the space of LongRoPE2 is for windows beyond the original one, {self.original_window}; "
                f"{self.target} is not",
                remedy="Search the short set with --space longrope",
            )

    @property
    def size(self) -> int:
        """Frequency indices, d/2."""
        return self.rotary_dim // 2

    @property
    def ratio(self) -> float:
        """s; 1 for windows up to the original one."""
        return max(self.target / self.original_window, 1.0)

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest factor in hundredths (in `longrope2`: from the critical index on)."""
        if self.kind == "longrope2":
            return math.ceil(self.ratio * GRID - 1e-9), math.floor(2 * self.ratio * GRID + 1e-9)
        return GRID, math.floor(HEADROOM * self.ratio * GRID + 1e-9)

    @property
    def theoretical_critical(self) -> int:
        """The first index whose period is longer than the original window: ceil(d/2 · log_θ(L0 / 2π))."""
        index = math.ceil(self.size * math.log(self.original_window / (2 * math.pi)) / math.log(self.base))
        return min(max(index, 1), self.size - 1)

    @property
    def critical_range(self) -> tuple[int, int]:
        """Critical indices that are searched. Real ones lie below the theoretical one (LongRoPE2, section 3.1):
        slow frequencies are seen too seldom in training to be learnt well; a quarter of the indices is room enough."""
        high = self.theoretical_critical
        return max(1, high - self.size // 4), high

    @property
    def usable_start_tokens(self) -> tuple[int, ...]:
        """The numbers of start tokens that leave most of the window scaled."""
        return tuple(count for count in self.start_tokens if count <= self.target // 4) or (0,)

    # --- making candidates -------------------------------------------------------------------------------

    def make(
        self,
        factors: Sequence[float] | Array,
        start_tokens: int = 0,
        attention: float | None = None,
        critical: int | None = None,
    ) -> Candidate:
        """The closest candidate of the space: rounded to the grid, clipped, sorted."""
        low, high = self.bounds
        # Clipped before it is rounded: a factor may come in too large for an integer.
        clipped = np.clip(np.asarray(factors, dtype=np.float64) * GRID, 0, high)
        steps = np.sort(np.clip(np.rint(clipped).astype(np.int64), low, high))
        start = min(self.usable_start_tokens, key=lambda count: abs(count - start_tokens))
        if self.kind == "longrope2":
            least, most = self.critical_range
            critical = min(max(most if critical is None else critical, least), most)
            below = (steps[critical] / GRID) ** (np.arange(critical) / critical) * GRID
            steps[:critical] = np.rint(below).astype(np.int64)
        else:
            critical = None
        return Candidate(tuple(steps.tolist()), start, self._attention(attention), critical)

    def _attention(self, wanted: float | None) -> float:
        low, high = self.attention
        if low == high or wanted is None:
            return low if low == high else round(min(max(1.0, low), high), ATTENTION_DIGITS)
        return min(max(round(wanted, ATTENTION_DIGITS), low), high)

    def problems(self, candidate: Candidate) -> list[str]:
        """The constraints that a candidate breaks, in words. Independent of how candidates are made."""
        found = []
        steps, (low, high) = candidate.steps, self.bounds
        free = steps if candidate.critical is None else steps[candidate.critical :]
        if len(steps) != self.size:
            found.append(f"{len(steps)} factors; needed {self.size}")
        if any(later < earlier for earlier, later in itertools.pairwise(steps)):
            found.append("factors are not monotone")
        if any(not low <= step <= high for step in free):
            found.append(f"factors {min(free) / GRID} … {max(free) / GRID}; needed {low / GRID} … {high / GRID}")
        if any(step < GRID for step in steps):
            found.append("factors below 1")
        if candidate.start_tokens not in self.usable_start_tokens:
            found.append(f"start tokens {candidate.start_tokens}; needed one of {self.usable_start_tokens}")
        if not self.attention[0] <= candidate.attention_factor <= self.attention[1]:
            found.append(f"attention factor {candidate.attention_factor}; needed within {self.attention}")
        if (candidate.critical is not None) != (self.kind == "longrope2"):
            found.append(f"critical index {candidate.critical} in the space {self.kind}")
        elif candidate.critical is not None and not self._ntk_like(steps, candidate.critical):
            found.append(f"not NTK-like below the critical index {candidate.critical}")
        return found

    def _ntk_like(self, steps: tuple[int, ...], critical: int) -> bool:
        low, high = self.critical_range
        exact = [GRID * (steps[critical] / GRID) ** (index / critical) for index in range(critical)]
        near = all(abs(have - want) <= 0.5 + 1e-9 for have, want in zip(steps, exact, strict=False))
        return low <= critical <= high and near

    def seeds(self, names: Sequence[str] = ALL_SEEDS) -> list[tuple[str, Candidate]]:
        """Analytic sets, projected into the space, each once; for a short set, the unmodified model.

        `ntk2` is NTK-aware with its base scaled for 2s, the best of them on real models beyond the original window.
        """
        dim, ratio = self.rotary_dim, self.ratio
        made = {
            "pi": lambda: rope.pi_factors(dim, ratio),
            "ntk": lambda: rope.ntk_factors(dim, ratio),
            "yarn": lambda: rope.yarn_factors(dim, self.base, ratio, self.original_window),
            "ntk2": lambda: rope.ntk_factors(dim, 2 * ratio),
        }
        if self.target <= self.original_window:
            made, names = {"unmodified": lambda: np.ones(self.size)}, ("unmodified",)
        found: list[tuple[str, Candidate]] = []
        for name in names:
            candidate = self.make(made[name]())
            if candidate not in (other for _, other in found):
                found.append((name, candidate))
        return found

    def to_json(self) -> dict[str, Any]:
        """For the journal: what makes two spaces the same."""
        return {
            "kind": self.kind,
            "target": self.target,
            "bounds": [bound / GRID for bound in self.bounds],
            "attention": list(self.attention),
            "start_tokens": list(self.usable_start_tokens),
        }


def space_for(
    rotary_dim: int,
    base: float,
    original_window: int,
    target: int,
    *,
    kind: Kind = "longrope",
    attention: tuple[float, float] | None = None,
    start_tokens: tuple[int, ...] | None = None,
) -> Space:
    """The space of one tier. By default LongRoPE's formula fixes the attention factor beyond the original window, and
    up to it both are searched: it is what a short set gains most by. `start_tokens` are the numbers to try."""
    ratio = max(target / original_window, 1.0)
    if attention is None:
        formula = rope.longrope_attention_factor(ratio, original_window)
        attention = (formula, formula) if ratio > 1 else SHORT_ATTENTION
    chosen: Kind = kind if ratio > 1 else "longrope"
    return Space(rotary_dim, base, original_window, target, attention, chosen, start_tokens or START_TOKENS)
