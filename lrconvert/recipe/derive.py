# SPDX-License-Identifier: Apache-2.0
"""Analytic recipes: PI, NTK-aware and YaRN, at an extension ratio. No search needed."""

from __future__ import annotations

from pathlib import Path

from lrconvert import rope
from lrconvert.errors import UsageError
from lrconvert.recipe.file import SCHEMA_VERSION, Method, Provenance, Recipe
from lrconvert.rope import Tier


def factor_set(method: Method, rotary_dim: int, theta: float, ratio: float, window: int) -> rope.Array:
    """The factors of an analytic method at extension ratio `ratio` from the original `window`."""
    if method == "pi":
        return rope.pi_factors(rotary_dim, ratio)
    if method == "ntk":
        return rope.ntk_factors(rotary_dim, ratio)
    return rope.yarn_factors(rotary_dim, theta, ratio, window)


def derive_recipe(
    method: Method,
    ratio: float,
    *,
    family: str,
    rotary_dim: int,
    theta: float,
    original_window: int,
    base_model: str | None = None,
    name: str | None = None,
    attention_factor: float | None = None,
    uniform: bool = False,
) -> Recipe:
    """An analytic recipe: the unmodified model up to L0, `method` at ratio s up to s·L0.

    The attention factor is the method's own: 1 for PI and NTK-aware, 0.1 ln s + 1 for YaRN. `uniform` gives it to
    both tiers, which code with one factor for all (transformers' native, llama.cpp, vLLM) can express.
    """
    if not ratio > 1:
        raise UsageError(f"--factor is {ratio:g}; an extension needs a ratio above 1")
    own = rope.yarn_attention_factor(ratio) if method == "yarn" else 1.0
    factors = factor_set(method, rotary_dim, theta, ratio, original_window)
    chosen = own if attention_factor is None else attention_factor
    unmodified = Tier(original_window, (1.0,) * (rotary_dim // 2), attention_factor=chosen if uniform else 1.0)
    extended = Tier(round(original_window * ratio), tuple(factors.tolist()), attention_factor=chosen)
    return Recipe(
        schema_version=SCHEMA_VERSION,
        name=name or f"{Path(base_model or family).name}-{method}-{ratio:g}x",
        family=family,
        base_model=base_model,
        original_window=original_window,
        rope_theta=theta,
        rotary_dim=rotary_dim,
        tiers=(unmodified, extended),
        provenance=Provenance(kind="derived", method=method),
    )
