# SPDX-License-Identifier: Apache-2.0
"""Analytic recipes: PI, NTK-aware and YaRN, at an extension ratio. No search needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrconvert import rope
from lrconvert.errors import UsageError
from lrconvert.recipe.file import SCHEMA_VERSION, Method, Provenance, Recipe
from lrconvert.rope import Tier


def factor_set(
    method: Method, rotary_dim: int, theta: float, ratio: float, window: int, own: Sequence[float] | None = None
) -> rope.Array:
    """The factors of an analytic method at extension ratio `ratio` from `window` tokens, shape [d/2].

    `own`: divisors that the model's frequencies have already; None for none. They are not in the result.
    """
    if method == "pi":
        return rope.pi_factors(rotary_dim, ratio)
    if method == "ntk":
        return rope.ntk_factors(rotary_dim, ratio)
    return rope.yarn_factors(rotary_dim, theta, ratio, window, own=own)


def derive_recipe(
    method: Method,
    ratio: float,
    *,
    family: str,
    rotary_dim: int,
    theta: float,
    original_window: int,
    own: Sequence[Tier] = (),
    base_model: str | None = None,
    name: str | None = None,
    attention_factor: float | None = None,
    uniform: bool = False,
    notes: Sequence[str] = (),
) -> Recipe:
    """An analytic recipe: what the model does up to its window W, and `method` at ratio s on top of that up to s·W.

    `own` are the tiers of a model that is scaled already: W is where they end, they stay as they are, and beyond W the
    factors of the last one are multiplied with the method's. Without them W is `original_window`, and nothing is
    scaled within it.

    The attention factor is the method's own: 1 for PI and NTK-aware, 0.1 ln s + 1 for YaRN. `uniform` gives it to all
    tiers, which code with one factor for all (transformers' native, llama.cpp, vLLM) can express. It multiplies that
    of `own`.
    """
    if not ratio > 1:
        raise UsageError(f"--factor is {ratio:g}; an extension needs a ratio above 1")
    ground = tuple(own) or (Tier(original_window, (1.0,) * (rotary_dim // 2)),)
    last, window = ground[-1], ground[-1].max_length
    usual = rope.yarn_attention_factor(ratio) if method == "yarn" else 1.0
    chosen = usual if attention_factor is None else attention_factor
    factors = factor_set(method, rotary_dim, theta, ratio, window, last.factors)
    unchanged = Tier(window, (1.0,) * len(last.factors), attention_factor=chosen if uniform else 1.0)
    extended = Tier(round(window * ratio), tuple(factors.tolist()), last.start_tokens, chosen)
    return Recipe(
        schema_version=SCHEMA_VERSION,
        name=name or f"{Path(base_model or family).name}-{method}-{ratio:g}x",
        family=family,
        base_model=base_model,
        original_window=ground[0].max_length,
        rope_theta=theta,
        rotary_dim=rotary_dim,
        tiers=rope.compose_tiers(ground, (unchanged, extended)),
        provenance=Provenance(kind="derived", method=method, notes=tuple(notes)),
    )
