# SPDX-License-Identifier: Apache-2.0
"""The rotation: inverse frequencies, factor sets, attention factors, angles. NumPy float64, no torch.

This is the only place where the formulas are written for production use (the reference in `reference/` writes
them a second time, from the papers). Conventions:

- `rotary_dim` d counts the rotated channels of a head, so a factor set has d/2 entries, one per
  *frequency index* i, fast frequencies first.
- A factor λ_i *divides* the inverse frequency: angle(n, i) = n·θ_i / λ_i, with θ_i = base^(−2i/d).
- *Start tokens* n̂: positions n < n̂ keep λ = 1 (LongRoPE, arXiv 2402.13753, section 3.2).
- The *attention factor* multiplies cos and sin, so attention logits grow by its square.

Angles are made in float64: in float32 they are off by 7.8e-3 rad at position 256k and 6.2e-2 rad at 2M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Le, MinLen
from numpy.typing import NDArray

from lrconvert.errors import InputError, UnsupportedError

Array = NDArray[np.float64]

# How values are read from files: nothing coerced, nothing unknown, nothing that is not a finite number.
STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def inverse_frequencies(rotary_dim: int, base: float) -> Array:
    """θ_i = base^(−2i/d) for i in 0 … d/2−1; shape [d/2]."""
    return base ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def longrope_attention_factor(ratio: float, original_window: int) -> float:
    """sqrt(1 + ln s / ln L0), 1 when s ≤ 1 (LongRoPE, section 3; the `longrope` rule of transformers)."""
    if ratio <= 1.0:
        return 1.0
    return math.sqrt(1.0 + math.log(ratio) / math.log(original_window))


def yarn_attention_factor(ratio: float, scale: float = 1.0) -> float:
    """0.1·scale·ln s + 1, 1 when s ≤ 1 (YaRN, arXiv 2309.00071, section 3.4)."""
    return 1.0 if ratio <= 1.0 else 0.1 * scale * math.log(ratio) + 1.0


def pi_factors(rotary_dim: int, ratio: float) -> Array:
    """Position Interpolation (arXiv 2306.15595): λ_i = s."""
    return np.full(rotary_dim // 2, float(ratio))


def ntk_factors(rotary_dim: int, ratio: float) -> Array:
    """NTK-aware: the base times s^(d/(d−2)), which is λ_i = s^(2i/(d−2)). λ_0 = 1 and the last one is s."""
    index = np.arange(rotary_dim // 2, dtype=np.float64)
    return float(ratio) ** (2.0 * index / max(rotary_dim - 2, 1))


def yarn_factors(
    rotary_dim: int,
    base: float,
    ratio: float,
    original_window: int,
    *,
    own: Sequence[float] | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Array:
    """YaRN's ramp over the turns a frequency makes in the original window (arXiv 2309.00071, section 3.2).

    Above `beta_fast` turns λ = 1, below `beta_slow` turns λ = s, between them the *inverse* frequencies
    are blended linearly in the frequency index. `truncate` rounds the ramp's ends outwards to whole
    indices, as the authors' code and transformers do. `own`: divisors that the frequencies have already, d/2 of them;
    the turns are then those of the divided frequencies.
    """
    turns = original_window * inverse_frequencies(rotary_dim, base) / (2 * math.pi)
    index_of = _index_of_turns(turns if own is None else turns / np.asarray(own), 2 * math.log(base) / rotary_dim)
    low, high = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # the same guard as transformers, against a division by zero
    index = np.arange(rotary_dim // 2, dtype=np.float64)
    interpolated = np.clip((index - low) / (high - low), 0.0, 1.0)
    return 1.0 / (interpolated / ratio + (1.0 - interpolated))


@dataclass(frozen=True)
class Yarn:
    """The parameters of a set that is a YaRN: s, L0, and the turns in L0 between which frequencies are blended."""

    ratio: float
    original_window: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def as_yarn(factors: Sequence[float], base: float, original_window: int) -> Yarn | None:
    """The YaRN that a set of d/2 factors is, to 1e-6 of each; None where it is none, or where the ramp doesn't end.

    The ramp of 1/λ shows where it begins and ends. Turns half an index inside of those give it again, whatever numbers
    the set was made with; the usual ones (32 and 1) are tried first.
    """
    values, width = np.asarray(factors, dtype=np.float64), 2 * len(factors)
    ratio = float(values[-1])
    if not ratio > 1.0:
        return None
    tried = [Yarn(ratio, original_window)]
    if (ends := _ends_of_ramp((1.0 - 1.0 / values) / (1.0 - 1.0 / ratio))) is not None:
        inside = (ends[0] + 0.5, ends[1] - 0.5)
        fast, slow = (original_window / (2 * math.pi) * base ** (-2.0 * index / width) for index in inside)
        tried.append(Yarn(ratio, original_window, fast, slow))
    for yarn in tried:
        made = yarn_factors(width, base, ratio, original_window, beta_fast=yarn.beta_fast, beta_slow=yarn.beta_slow)
        if np.allclose(made, values, rtol=1e-6, atol=0):
            return yarn
    return None


def _ends_of_ramp(ramp: Array) -> tuple[int, int] | None:
    """The last index of 0 and the first of 1 of a straight ramp; None where it doesn't rise."""
    inside = np.flatnonzero((ramp > 1e-6) & (ramp < 1.0 - 1e-6))
    if len(inside) == 0:
        first = int(np.argmax(ramp >= 1.0 - 1e-6))
        return first - 1, first
    if len(inside) == 1:
        low = int(inside[0]) - 1
        return low, low + round(1.0 / float(ramp[inside[0]]))
    slope, start = np.polyfit(inside, ramp[inside], 1).tolist()
    return (round(-start / slope), round((1.0 - start) / slope)) if slope > 1e-6 else None


def _index_of_turns(turns: Array, fall: float) -> Callable[[float], float]:
    """Where, among frequencies that make so many `turns` in a window (shape [d/2]), a number of turns lies: a fraction
    between two indices. Beyond the first and the last one, turns fall by the factor e^`fall` an index."""
    falling = np.minimum.accumulate(np.log(turns))  # divided by published sets they are not always monotone
    index = np.arange(len(turns), dtype=np.float64)

    def index_of(wanted: float) -> float:
        level = math.log(wanted)
        beyond = max(falling[-1] - level, 0.0) - max(level - falling[0], 0.0)
        return float(np.interp(-level, -falling, index)) + beyond / fall

    return index_of


def llama3_factors(
    rotary_dim: int,
    base: float,
    ratio: float,
    original_window: int,
    *,
    low_freq_factor: float,
    high_freq_factor: float,
) -> Array:
    """The `llama3` rule of Llama 3.1: wavelengths beyond L0/low are divided by s, a ramp up to L0/high."""
    turns = original_window * inverse_frequencies(rotary_dim, base) / (2 * math.pi)
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    kept = np.clip(smooth, 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / ratio + kept)


def dynamic_ntk_factors(rotary_dim: int, ratio: float, original_window: int, length: int) -> Array:
    """The `dynamic` rule at one length: NTK-aware with s' = s·n/L0 − (s−1), unscaled up to L0."""
    effective = max(ratio * length / original_window - (ratio - 1.0), 1.0)
    return ntk_factors(rotary_dim, effective)


# What a factor and an attention factor can be: published factors stay within 0.99 … 576, their attention factors are
# LongRoPE's formula, below 2. Beyond these bounds angles are zero, or have no digits left, or the products of float16
# and float32 overflow, and nothing says so.
FACTORS = (1e-3, 1e7)
ATTENTION = (1e-2, 1e2)


@dataclass(frozen=True)
class Tier:
    """One factor set and the longest sequence it serves.

    `factors` are divisors, d/2 of them; `start_tokens` is n̂; `attention_factor` multiplies cos and sin.
    The annotations are the constraints of the recipe file, which `recipe/file.py` reads.
    """

    __pydantic_config__: ClassVar = STRICT

    max_length: Annotated[int, Ge(1)]
    factors: Annotated[tuple[Annotated[float, Ge(FACTORS[0]), Le(FACTORS[1])], ...], MinLen(1)]
    start_tokens: Annotated[int, Ge(0)] = 0
    attention_factor: Annotated[float, Ge(ATTENTION[0]), Le(ATTENTION[1])] = 1.0

    def angles(self, positions: NDArray[np.integer], base: float) -> Array:
        """Angle of every position (shape [n]) and frequency index: float64, shape [n, d/2]."""
        plain = inverse_frequencies(2 * len(self.factors), base)
        scaled = plain / np.asarray(self.factors, dtype=np.float64)
        position = positions.astype(np.float64)[:, None]
        return position * np.where(position < self.start_tokens, plain, scaled)

    def cos_sin(self, positions: NDArray[np.integer], base: float) -> tuple[Array, Array]:
        """cos and sin of `angles`, times the attention factor; float64, shape [n, d/2] each."""
        angles = self.angles(positions, base)
        return np.cos(angles) * self.attention_factor, np.sin(angles) * self.attention_factor


def compose(own: Tier, new: Tier) -> Tier:
    """`new` on top of `own`: a factor set found for a model that is already scaled by another one.

    λ_total,i = λ_own,i · λ_new,i, because a factor divides the inverse frequency: the new set divides what the own one
    left. Attention factors multiply as well: both scale cos and sin. The window is `new`'s.

    Start tokens are unscaled in both sets only where n̂ is the same, and a tier has one n̂. So two numbers compose only
    if one of the sets scales nothing (all λ = 1); then the other set's n̂ holds.

    Raises `UnsupportedError` for two different n̂, `InputError` for sets of different sizes.
    """
    if len(own.factors) != len(new.factors):
        raise InputError(f"a set of {len(new.factors)} factors can't be applied on top of one of {len(own.factors)}")
    starts = {tier.start_tokens for tier in (own, new) if any(factor != 1.0 for factor in tier.factors)}
    if len(starts) > 1:
        raise UnsupportedError(
            f"a set with {new.start_tokens} start tokens can't be applied on top of one "
            f"with {own.start_tokens}: the result would "
            "have two numbers of start tokens",
            remedy=f"Use {own.start_tokens} in the new set too",
        )
    return Tier(
        new.max_length,
        tuple(before * factor for before, factor in zip(own.factors, new.factors, strict=True)),
        starts.pop() if starts else 0,
        own.attention_factor * new.attention_factor,
    )


def compose_tiers(own: Sequence[Tier], new: Sequence[Tier]) -> tuple[Tier, ...]:
    """`compose` at every length at which either set changes; the result reaches as far as `new`.

    Both are ordered by `max_length`; beyond `own`'s last tier that one still holds. Raises as `compose`.
    """
    lengths = sorted({tier.max_length for tier in (*own, *new) if tier.max_length <= new[-1].max_length})
    pairs = ((serving(own, length), serving(new, length)) for length in lengths)
    composed = (compose(before, after) for before, after in pairs)
    return tuple(replace(tier, max_length=length) for tier, length in zip(composed, lengths, strict=True))


def serving(tiers: Sequence[Tier], length: int) -> Tier:
    """The tier for a sequence of `length` tokens: the first that reaches it, else the last one."""
    return next((tier for tier in tiers if tier.max_length >= length), tiers[-1])


@dataclass(frozen=True)
class RopeSpec:
    """A recipe resolved against a checkpoint: all that a target, the reference or a test has to know.

    `tiers` are ordered by `max_length`; the last one serves `window`. A sequence of n tokens is rotated,
    all of it, with the first tier whose `max_length` ≥ n.
    """

    family: str
    rotary_dim: int
    base: float
    original_window: int
    window: int
    tiers: tuple[Tier, ...]

    def tier_for(self, length: int) -> Tier:
        """The tier that serves a sequence of `length` tokens; the last one beyond the window."""
        return serving(self.tiers, length)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Lengths after which the tier changes; empty for a single tier."""
        return tuple(tier.max_length for tier in self.tiers[:-1])

    @property
    def ratio(self) -> float:
        """The extension ratio s = window / L0."""
        return self.window / self.original_window
