# SPDX-License-Identifier: Apache-2.0
"""What to bake instead of a recipe that a runtime can't express: what a refusal advises first."""

from __future__ import annotations

from dataclasses import replace

from lrconvert.engines.capability import Capability
from lrconvert.recipe import Recipe, form_of
from lrconvert.rope import RopeSpec

# How one is made that a runtime can express, by what made the recipe.
MAKE = {
    "searched": "search with `--for any`",
    "extended": "make a form of it with `extend --on` and `--for any`",
}


def ways_out(able: Capability, recipe: Recipe, spec: RopeSpec) -> list[str]:
    """What gives an artifact of which nothing is dropped, where `able` can't express `recipe`, resolved as `spec`: its
    shipped form, else the longest window beyond the original one that works, else another recipe. Empty where there is
    none of them."""
    if way := to_form(recipe):
        return [way]
    for count in range(len(spec.tiers) - 1, 0, -1):
        window = spec.tiers[count - 1].max_length
        cut = replace(spec, window=window, tiers=spec.tiers[:count])
        if window > spec.original_window and not able.fit(cut)[1]:
            return [f"stop at `--window {window}`, up to which nothing is dropped"]
    factor = spec.tiers[-1].attention_factor
    even = replace(spec, tiers=tuple(replace(tier, attention_factor=factor) for tier in spec.tiers))
    if recipe.provenance.kind == "derived" and not able.fit(even)[1]:
        return ["make one attention factor for both sets with `recipe derive --uniform`"]
    return [MAKE[recipe.provenance.kind]] if recipe.provenance.kind in MAKE else []


def to_form(recipe: Recipe) -> str | None:
    """The way to a recipe's shipped form, if it has one."""
    form = form_of(recipe)
    return None if form is None else f"use `--recipe {form}`, its form for every runtime"


def remedy(*ways: str) -> str:
    """The sentence that names several ways, the best first."""
    sentence = "; or ".join(ways)
    return sentence[:1].upper() + sentence[1:]
