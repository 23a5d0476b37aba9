# SPDX-License-Identifier: Apache-2.0
"""The rotation, written a second time, from the papers: the reference shares no code with what it checks.

LongRoPE (arXiv 2402.13753), equation 3: position n of frequency index i turns by n·θ_i while n < n̂ and by
n·θ_i / λ_i from there on, with θ_i = θ^(−2i/d). The attention factor (YaRN, arXiv 2309.00071, equation 21;
LongRoPE's own value in its section 3) multiplies the rotated queries and keys. A sequence of n tokens uses
the factor set found for the shortest window that holds n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FactorSet:
    """λ (divisors, one per frequency index), n̂ and attention factor, for sequences up to `reach` tokens."""

    reach: int
    divisors: Sequence[float]
    unscaled_positions: int
    magnitude: float


@dataclass(frozen=True)
class Rotation:
    """What a model's attention layers do with positions. `width` channels of each head are rotated."""

    theta: float
    width: int
    sets: Sequence[FactorSet]

    def choose(self, tokens: int) -> FactorSet:
        """The set for a sequence of this many tokens."""
        fitting = [candidate for candidate in self.sets if candidate.reach >= tokens]
        return min(fitting, key=lambda candidate: candidate.reach) if fitting else self.sets[-1]

    def tables(
        self, positions: torch.Tensor, chosen: FactorSet, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [n, width/2] each; the angles in float64 whatever `dtype` is."""
        n = positions.to(torch.float64).cpu()
        columns_cos, columns_sin = [], []
        for index, divisor in enumerate(chosen.divisors):
            turn = n / self.theta ** (2 * index / self.width)
            turn = torch.where(n >= chosen.unscaled_positions, turn / divisor, turn)
            columns_cos.append(torch.cos(turn) * chosen.magnitude)
            columns_sin.append(torch.sin(turn) * chosen.magnitude)
        place = {"device": positions.device, "dtype": dtype}
        return torch.stack(columns_cos, dim=1).to(**place), torch.stack(columns_sin, dim=1).to(**place)

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn the pairs (j, j + width/2) of [heads, n, head_dim]; channels beyond `width` pass through."""
        half = self.width // 2
        first, second, rest = heads[..., :half], heads[..., half : self.width], heads[..., self.width :]
        return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)
