# SPDX-License-Identifier: Apache-2.0
"""Recipes for a model: the one that it carries, what an extension of it stands on, and an analytic recipe for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lrconvert import rope
from lrconvert.checkpoint import Model, open_checkpoint
from lrconvert.checkpoint.rope_config import FoundRope, read_rope
from lrconvert.errors import InputError, UsageError
from lrconvert.families import ModelShape, get_family, read_shape
from lrconvert.families.parts import language_config
from lrconvert.recipe.derive import derive_recipe
from lrconvert.recipe.file import SCHEMA_VERSION, Method, Provenance, Recipe
from lrconvert.rope import Tier

# How users ask for the other ground, on every command that extends a model.
FROM_PLAIN = "--from-plain"
SAME = 1e-6  # of factors: what float32, in which GGUF files keep them, leaves


def portable_name(reference: str | Path, path: Path) -> str:
    """What a recipe calls its model. A recipe travels: of a local path it keeps the name, and a Hub id as it is."""
    return path.resolve().name.removesuffix(".gguf") if Path(reference).exists() else str(reference)


def own_recipe(model: Model, window: int | None = None) -> tuple[Recipe, list[str]]:
    """The model's own rotation as a recipe, and notes on it: what is baked where no other recipe is named.

    `window` (tokens) says how far it serves where the config leaves that open. Raises `InputError` for a GGUF whose
    rope scaling means nothing, and what `Model.rotation` and `FoundRope.settled` raise.
    """
    if problems := model.checkpoint.rope_problems:
        raise InputError(
            f"{model.reference}: its rope scaling means nothing ({'; '.join(problems)})",
            remedy="Name the recipe that it should have with --recipe",
        )
    found, name = model.rotation, portable_name(model.reference, model.checkpoint.path)
    if found.question and window is not None:
        found = read_rope(model.checkpoint.config, model.shape, window=window)
    found = found.settled(model.reference)
    recipe = Recipe(
        schema_version=SCHEMA_VERSION,
        name=f"{Path(name).name}-own",
        family=model.family.name,
        base_model=name,
        original_window=found.original_window,
        rope_theta=model.shape.theta,
        rotary_dim=model.shape.rotary_dim,
        tiers=found.tiers,
        provenance=Provenance("published", source=f"{name} ({found.kind})", notes=found.notes),
    )
    plain = f"no recipe is named and {name} carries no scaling: the artifact serves {found.window} tokens, as it does"
    return recipe, [*found.notes, *([] if found.scaled else [plain])]


def replaced_note(model: Model, recipe: Recipe) -> list[str]:
    """A note where a recipe turns a scaled model otherwise than its own rotation does, within the window that it
    serves today; empty where they agree, and where there is nothing to replace."""
    if model.checkpoint.rope_problems or not (found := model.rotation).scaled:
        return []
    ends = sorted({tier.max_length for tier in (*found.tiers, *recipe.tiers)} | {found.window})
    within = [end for end in ends if end <= found.window]
    differ = [end for end in within if not _same(rope.serving(found.tiers, end), rope.serving(recipe.tiers, end))]
    if not differ:
        return []
    return [
        f"the recipe replaces the model's own {found.kind} scaling: sequences of up to {differ[-1]} tokens are "
        f"rotated otherwise than the model, which serves {found.window}, rotates them"
    ]


def check_window(model: Model, recipe: Recipe) -> None:
    """Raises `InputError` for a recipe that begins beyond the window that the model serves today."""
    serves = max(model.shape.window, 0 if model.checkpoint.rope_problems else model.rotation.window)
    if recipe.original_window > serves:
        raise InputError(
            f"recipe {recipe.name} is for another model: original window {recipe.original_window} in the recipe, "
            f"{serves} in the model"
        )


def fit_notes(model: Model, recipe: Recipe, *, tuned: bool = False) -> list[str]:
    """What to know before a recipe is baked into a model that it fits by its numbers. `tuned`: an adapter, with weights
    of its own, is merged."""
    notes = replaced_note(model, recipe)
    if recipe.provenance.weights and not tuned:
        notes.append(
            f"the factors of {recipe.name} were found for {recipe.provenance.weights}; evaluate them on these weights"
        )
    return notes


def _same(one: Tier, other: Tier) -> bool:
    """Whether two tiers rotate alike, to the rounding of what programs write."""
    values = [(*tier.factors, tier.attention_factor) for tier in (one, other)]
    return one.start_tokens == other.start_tokens and np.allclose(*values, rtol=SAME, atol=0.0)


@dataclass(frozen=True)
class Ground:
    """What an extension stands on: the rotation that a model has today, which stays as it is within its window.

    `kind`: the model's scaling, "default" for none. `notes`: what was assumed, in words.
    """

    kind: str
    tiers: tuple[Tier, ...]
    notes: tuple[str, ...] = ()

    @property
    def window(self) -> int:
        """Up to where the model serves, in tokens. A target has to be beyond."""
        return self.tiers[-1].max_length

    @property
    def last(self) -> Tier:
        """The factors that serve the window's end: new ones are multiplied with these."""
        return self.tiers[-1]

    def extended(self, new: Sequence[Tier]) -> tuple[Tier, ...]:
        """Tiers found on top of this ground, as a recipe holds them: total factors, λ_own · λ_new. Raises as
        `rope.compose`."""
        return rope.compose_tiers(self.tiers, new)

    def check_target(self, target: int) -> None:
        """Raises `UsageError` for a target, in tokens, that the model reaches already."""
        if target > self.window:
            return
        own = f"its own {self.kind} scaling" if self.kind != "default" else "no scaling"
        raise UsageError(
            f"--target {target} is within the window of {self.window} tokens that the model serves with {own}",
            remedy=f"Use more than {self.window}",
        )


def ground_of(
    reference: str | Path,
    found: FoundRope,
    shape: ModelShape,
    *,
    from_plain: bool = False,
    window: int | None = None,
) -> Ground:
    """What an extension of the model stands on.

    By default that is the rotation it has, up to the window it has. `from_plain`: the unscaled rotation, up to the
    window from before its scaling. `window` (tokens) overrides where it ends. Raises as `FoundRope.settled`.
    """
    ones = (1.0,) * (shape.rotary_dim // 2)
    found = found if from_plain else found.settled(reference)
    if not found.scaled:
        return Ground("default", (Tier(window or found.window, ones),), found.notes)
    if from_plain:
        start = window or found.original_window
        note = (
            f"{reference} carries {found.kind} scaling and serves {found.window} tokens with it. That is replaced, as "
            f"{FROM_PLAIN} asks: the extension starts from the plain rotation and {start} tokens"
        )
        return Ground("default", (Tier(start, ones),), (note,))
    tiers = found.tiers if window is None else _ending_at(found.tiers, window)
    end = tiers[-1].max_length
    note = (
        f"{reference} carries {found.kind} scaling: up to {end} tokens it stays as it is, beyond them the new factors "
        f"multiply its own ({FROM_PLAIN} starts from the plain rotation instead)"
    )
    return Ground(found.kind, tiers, (*found.notes, note))


def _ending_at(tiers: Sequence[Tier], window: int) -> tuple[Tier, ...]:
    """The tiers up to a window: cut there, or the last one stretched to it."""
    head = [tier for tier in tiers if tier.max_length < window]
    return (*head, replace(rope.serving(tiers, window), max_length=window))


def derive_for(
    model: str | Path,
    method: Method,
    factor: float | None = None,
    *,
    target: int | None = None,
    attention_factor: float | None = None,
    uniform: bool = False,
    original_window: int | None = None,
    from_plain: bool = False,
    name: str | None = None,
    revision: str | None = None,
) -> tuple[Recipe, list[str]]:
    """An analytic recipe for a folder, a GGUF file or a Hub id, and notes on what was assumed.

    Either `factor`, the extension ratio, or `target`, the window to reach in tokens, is needed. `from_plain` and
    `original_window` say what it stands on (`ground_of`); `derive_recipe` says what the other values do. Raises
    `UsageError` for a target that the model reaches already, `InputError` and `UnsupportedError` for a model that can't
    be read.
    """
    if (factor is None) == (target is None):
        raise UsageError("either --factor or --target is needed", remedy="--target 128k, or --factor 4")
    checkpoint = open_checkpoint(str(model), revision=revision)
    config = language_config(checkpoint.config)
    family = get_family(config.get("model_type"))
    shape = read_shape(config, family)
    found = read_rope(config, shape)
    if found.question and original_window is not None:
        found = read_rope(config, shape, window=original_window)
    ground = ground_of(model, found, shape, from_plain=from_plain, window=original_window)
    if target is not None:
        ground.check_target(target)
        factor = target / ground.window
    assert factor is not None
    scaled = ground.kind != "default"
    recipe = derive_recipe(
        method,
        factor,
        family=family.name,
        rotary_dim=shape.rotary_dim,
        theta=shape.theta,
        original_window=ground.window,
        own=ground.tiers,
        base_model=portable_name(model, checkpoint.path),
        name=name,
        attention_factor=attention_factor,
        uniform=uniform,
        notes=[f"stands on the model's own {ground.kind} scaling, up to {ground.window} tokens"] if scaled else [],
    )
    notes = list(ground.notes)
    if scaled and recipe.tiers[0] != ground.tiers[0]:
        notes.append(
            f"--uniform: within {ground.window} tokens the attention factor is "
            f"{recipe.tiers[0].attention_factor:.6g} instead of the model's {ground.tiers[0].attention_factor:.6g}"
        )
    return recipe, notes
