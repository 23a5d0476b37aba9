# SPDX-License-Identifier: Apache-2.0
"""The rotation, written a second time, from the papers: the reference shares no code with what it checks.

LongRoPE (arXiv 2402.13753), equation 3: position n of frequency index i turns by n·θ_i while n < n̂ and by
n·θ_i / λ_i from there on, with θ_i = θ^(−2i/d). The attention factor (YaRN, arXiv 2309.00071, equation 21;
LongRoPE's own value in its section 3) multiplies the rotated queries and keys. A sequence of n tokens uses
the factor set found for the shortest window that holds n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    """What a model's attention layers do with positions. `width` channels of each head are rotated.

    `angles` makes them exactly ("float64"), or rounds as one of `ROUNDED` does: what a right program then answers is
    still off by that much.
    """

    theta: float
    width: int
    sets: Sequence[FactorSet]
    angles: str = "float64"

    def plain(self, theta: float) -> Rotation:
        """The unscaled rotation of another θ, for sequences of any length: of layers that no recipe rotates."""
        return replace(self, theta=theta, sets=(FactorSet(0, (1.0,) * (self.width // 2), 0, 1.0),))

    def choose(self, tokens: int) -> FactorSet:
        """The set for a sequence of this many tokens."""
        fitting = [candidate for candidate in self.sets if candidate.reach >= tokens]
        return min(fitting, key=lambda candidate: candidate.reach) if fitting else self.sets[-1]

    def tables(
        self, positions: torch.Tensor, chosen: FactorSet, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [n, width/2] each; in float64 whatever `dtype` is, of angles as `self.angles` makes them."""
        n = positions.to(torch.float64).cpu()
        turns = self._exact(n, chosen) if self.angles == "float64" else ROUNDED[self.angles](self, n, chosen)
        place = {"device": positions.device, "dtype": dtype}
        return (
            (torch.cos(turns) * chosen.magnitude).to(**place),
            (torch.sin(turns) * chosen.magnitude).to(**place),
        )

    def _exact(self, n: torch.Tensor, chosen: FactorSet) -> torch.Tensor:
        """Angles [n, width/2] of positions n, float64."""
        columns = []
        for index, divisor in enumerate(chosen.divisors):
            turn = n / self.theta ** (2 * index / self.width)
            columns.append(torch.where(n >= chosen.unscaled_positions, turn / divisor, turn))
        return torch.stack(columns, dim=1)

    def rotate(
        self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, neighbours: bool = False
    ) -> torch.Tensor:
        """Turn pairs of channels of [heads, n, head_dim]: j and j + width/2, or `neighbours` 2j and 2j + 1. Channels
        beyond `width` pass through."""
        half = self.width // 2
        turned, rest = heads[..., : self.width], heads[..., self.width :]
        first, second = (
            (turned[..., ::2], turned[..., 1::2]) if neighbours else (turned[..., :half], turned[..., half:])
        )
        pair = (first * cos - second * sin, first * sin + second * cos)
        made = torch.stack(pair, dim=-1).flatten(-2) if neighbours else torch.cat(pair, dim=-1)
        return torch.cat([made, rest], dim=-1)


# --- angles as programs round them -----------------------------------------------------------------------


def _product(rotation: Rotation, n: torch.Tensor, chosen: FactorSet) -> torch.Tensor:
    """1 / (λ_i · θ^(2i/d)) in float32, times the position in float32: PyTorch's models and what follows them."""
    exponents = torch.arange(0, rotation.width, 2, dtype=torch.float32) / rotation.width
    plain = torch.tensor(rotation.theta, dtype=torch.float32) ** exponents
    scaled = torch.tensor(list(chosen.divisors), dtype=torch.float32) * plain
    turns = n.float()[:, None] * (1.0 / scaled)
    return _unscaled_start(n, turns, n.float()[:, None] * (1.0 / plain), chosen)


def _powers(rotation: Rotation, n: torch.Tensor, chosen: FactorSet) -> torch.Tensor:
    """The position times θ^(−2/d), again and again, each product rounded to float32 and divided by λ_i: ggml. The error
    of that one number grows with the index."""
    exponent = torch.tensor(-2.0 / rotation.width, dtype=torch.float32).item()
    step = torch.tensor(rotation.theta**exponent, dtype=torch.float32)
    plain = [n.float()]
    for _ in range(len(chosen.divisors) - 1):
        plain.append(plain[-1] * step)
    turns = torch.stack(plain, dim=1)
    return _unscaled_start(n, turns / torch.tensor(list(chosen.divisors), dtype=torch.float32), turns, chosen)


def _unscaled_start(n: torch.Tensor, scaled: torch.Tensor, plain: torch.Tensor, chosen: FactorSet) -> torch.Tensor:
    """Angles in float64 for cos and sin, which programs compute to the last bit of float32."""
    return torch.where((n >= chosen.unscaled_positions)[:, None], scaled, plain).double()


# Of a rotation, positions [n] in float64 and a set: angles [n, width/2]. tests/parity/test_noise.py holds them against
# the programs themselves.
ROUNDED: Mapping[str, Callable[[Rotation, torch.Tensor, FactorSet], torch.Tensor]] = {
    "product": _product,
    "powers": _powers,
}
