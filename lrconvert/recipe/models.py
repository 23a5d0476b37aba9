# SPDX-License-Identifier: Apache-2.0
"""Recipes for a model: what of it a recipe keeps, and an analytic recipe for it."""

from __future__ import annotations

from pathlib import Path

from lrconvert.checkpoint import open_checkpoint
from lrconvert.checkpoint.rope_config import FoundRope, read_rope
from lrconvert.families import get_family, read_shape
from lrconvert.recipe.derive import derive_recipe
from lrconvert.recipe.file import Method, Recipe


def portable_name(reference: str | Path, path: Path) -> str:
    """What a recipe calls its model. A recipe travels: of a local path it keeps the name, and a Hub id as it is."""
    return path.resolve().name.removesuffix(".gguf") if Path(reference).exists() else str(reference)


def scaled_note(reference: str | Path, found: FoundRope, what: str) -> str:
    """A note for `what` (a search, a recipe) that starts from the plain rotation of a model with a scaled one."""
    return (
        f"{reference} already carries {found.kind} scaling; the {what} starts from the plain rotation and its "
        f"original window, {found.original_window}"
    )


def derive_for(
    model: str | Path,
    method: Method,
    factor: float,
    *,
    attention_factor: float | None = None,
    uniform: bool = False,
    original_window: int | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> tuple[Recipe, list[str]]:
    """An analytic recipe for a folder, a GGUF file or a Hub id, and notes on what was assumed.

    `factor` is the extension ratio; `derive_recipe` says what the other values do. Raises `UsageError` for a ratio of 1
    or less, `InputError` and `UnsupportedError` for a model that can't be read.
    """
    checkpoint = open_checkpoint(str(model), revision=revision)
    family = get_family(checkpoint.config.get("model_type"))
    shape = read_shape(checkpoint.config, family)
    found = read_rope(checkpoint.config, shape)
    recipe = derive_recipe(
        method,
        factor,
        family=family.name,
        rotary_dim=shape.rotary_dim,
        theta=shape.theta,
        original_window=original_window or found.original_window,
        base_model=portable_name(model, checkpoint.path),
        name=name,
        attention_factor=attention_factor,
        uniform=uniform,
    )
    return recipe, [scaled_note(model, found, "recipe")] if found.scaled else []
