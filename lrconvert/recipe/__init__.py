# SPDX-License-Identifier: Apache-2.0
"""Recipes: what to bake. The file, and the ways to make one."""

from lrconvert.recipe.derive import derive_recipe, factor_set
from lrconvert.recipe.file import (
    MAX_RECIPE_BYTES,
    RECIPE_FILE,
    SCHEMA_VERSION,
    Method,
    Provenance,
    Recipe,
    check_output,
    find_recipe,
    json_schema,
    load_recipe,
    parse_recipe,
    read_bounded,
    recipe_folder,
    recipes_in,
    resolve,
    shipped_recipes,
    write_recipe,
)
from lrconvert.recipe.forms import form_of

__all__ = [
    "MAX_RECIPE_BYTES",
    "RECIPE_FILE",
    "SCHEMA_VERSION",
    "Method",
    "Provenance",
    "Recipe",
    "check_output",
    "derive_recipe",
    "factor_set",
    "find_recipe",
    "form_of",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "read_bounded",
    "recipe_folder",
    "recipes_in",
    "resolve",
    "shipped_recipes",
    "write_recipe",
]
