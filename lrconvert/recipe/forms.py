# SPDX-License-Identifier: Apache-2.0
"""The forms of shipped recipes that every runtime can express: two sets, one attention factor, no start tokens."""

from __future__ import annotations

from lrconvert.recipe.file import Recipe, load_recipe, shipped_recipes

FORM = "-any"  # what a form's name adds to its recipe's


def form_of(recipe: Recipe) -> str | None:
    """The shipped name of a shipped recipe's form; None for a recipe that has none.

    A recipe is the shipped one by its name and its sets: another one of that name has no form.
    """
    shipped, form = shipped_recipes(), recipe.name + FORM
    if form not in shipped or recipe.name not in shipped or load_recipe(recipe.name).tiers != recipe.tiers:
        return None
    return form
