# SPDX-License-Identifier: Apache-2.0
"""Write the forms of shipped recipes whose sets need no training: two sets, one attention factor, no start tokens.

    python tools/recipe_forms.py

A form has its recipe's factors, as the search target `any` fits them. (Forms with an adapter were trained with their
two sets; the READMEs of these say how.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lrconvert.data import RECIPES
from lrconvert.engines.capability import ANY
from lrconvert.recipe import Recipe, load_recipe, write_recipe
from lrconvert.recipe.forms import FORM
from lrconvert.rope import RopeSpec

FITTED = ("demo-8x", "smollm2-135m-64k")


def fitted(recipe: Recipe) -> Recipe:
    """The form of a recipe. It stands on the same search, and a note has what was dropped."""
    last = recipe.tiers[-1].max_length
    spec = RopeSpec(recipe.family, recipe.rotary_dim, recipe.rope_theta, recipe.original_window, last, recipe.tiers)
    form, dropped = ANY.fit(spec)
    notes = (f"{recipe.name} in a form for every runtime", *dropped)
    return replace(
        recipe,
        name=recipe.name + FORM,
        tiers=form.tiers,
        provenance=replace(recipe.provenance, notes=(*recipe.provenance.notes, *notes)),
        evaluation=None,
    )


def write(name: str) -> Path:
    """The form of a shipped recipe; its file."""
    return write_recipe(fitted(load_recipe(name)), RECIPES / (name + FORM), force=True)


if __name__ == "__main__":
    for each in FITTED:
        print(write(each))
