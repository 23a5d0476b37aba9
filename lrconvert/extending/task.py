# SPDX-License-Identifier: Apache-2.0
"""What a stage of an extension works on: the model, the texts, the recipe of the stage before it, its own folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lrconvert.artifact.again import check_not_merged
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.adapter import CONFIG, choose_adapter, merged, open_adapter
from lrconvert.checkpoint.base import read_json
from lrconvert.checkpoint.tokenizer import Encode, tokenizer_of
from lrconvert.engines.capability import CUSTOM_HF, Capability
from lrconvert.errors import InputError
from lrconvert.evals.texts import Text
from lrconvert.progress import Progress, Step, silent
from lrconvert.recipe import Recipe, load_recipe, recipe_folder, write_recipe
from lrconvert.rope import Tier
from lrconvert.training.devices import is_leading
from lrconvert.training.projections import projections_of
from lrconvert.writing import replace_file

ADAPTER, JOURNAL = "adapter", "journal.jsonl"


@dataclass(frozen=True)
class Ground:
    """A finished recipe that an extension begins with: its sets as the runtime can express them, and its adapter."""

    recipe: Recipe
    adapter: Path | None
    dropped: tuple[str, ...] = ()  # what the runtime can't express, in words

    @property
    def window(self) -> int:
        return self.recipe.tiers[-1].max_length

    @property
    def rank(self) -> int | None:
        """Of the adapter: training goes on with pairs of this rank."""
        return None if self.adapter is None else read_json(self.adapter / CONFIG).get("r")

    @property
    def projections(self) -> str | None:
        """What its adapter trains, of those that a plan names; None for none of these."""
        modules = [] if self.adapter is None else read_json(self.adapter / CONFIG).get("target_modules")
        return projections_of(modules) if isinstance(modules, list) else None

    @classmethod
    def of(cls, reference: str, model: Model, able: Capability) -> Ground:
        """Raises `InputError` for a recipe of another model, or an adapter that is not there."""
        recipe = load_recipe(reference)
        spec = model.resolve(recipe)
        if recipe.original_window != model.rotation.original_window:
            raise InputError(
                f"{reference} is for an original window of {recipe.original_window}; {model.reference} has "
                f"{model.rotation.original_window}"
            )
        fitted, dropped = replace(able, once=False, first_only=False).fit(spec)
        chosen = choose_adapter(None, recipe.adapter, recipe_folder(reference))
        if chosen is not None and not Path(chosen).is_dir():
            raise InputError(f"{reference}: its adapter, {chosen}, is not beside it", remedy="Download it first")
        if chosen is not None:
            check_not_merged(model, open_adapter(chosen), of_recipe=True)
        return cls(replace(recipe, tiers=fitted.tiers), None if chosen is None else Path(chosen), tuple(dropped))


@dataclass(frozen=True)
class Task:
    """What a stage works on.

    `before` is the recipe file of the stage before it, `folder` its own. `texts` are for searching and training,
    `held_out` for evaluation alone. `machine` has device, dtype, attention, context_parallel and shard_weights. `on` is
    the recipe that the first stage begins with, as its runtime can express it, where that is not the model as it is.
    """

    name: str
    model: Model
    reference: str
    texts: tuple[Text, ...]
    held_out: tuple[Text, ...]
    before: Path
    folder: Path
    seed: int = 0
    able: Capability = CUSTOM_HF  # what the recipe is for: sets that it can't express are not made
    machine: dict[str, Any] = field(default_factory=dict)
    progress: Progress = silent
    on: Ground | None = None

    @property
    def leading(self) -> bool:
        """Whether this is the process that writes: under torchrun one of them."""
        return is_leading()

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.before)

    @property
    def adapter(self) -> Path | None:
        """The adapter so far."""
        chosen = choose_adapter(None, self.recipe.adapter, recipe_folder(self.before))
        return None if chosen is None else Path(chosen)

    def trained(self) -> Model:
        """The model with the adapter so far merged."""
        return self.model if self.adapter is None else merged(self.model, open_adapter(self.adapter))

    @property
    def one_attention(self) -> float | None:
        """The attention factor of every set, where the recipe's runtime has one for all; else None."""
        return None if self.able.attention == "per tier" else self.recipe.tiers[-1].attention_factor

    def with_tier(self, tier: Tier) -> Recipe:
        """The recipe with a tier added; of a runtime that knows two, the original window's and this one."""
        tiers = self.recipe.tiers
        if self.able.tiers is not None and tier.max_length > tiers[0].max_length:
            return replace(self.recipe, tiers=(tiers[0], tier))
        return with_tier(self.recipe, tier)

    @property
    def encode(self) -> Encode:
        return tokenizer_of(self.model.checkpoint.path)

    @property
    def loading(self) -> dict[str, Any]:
        """`machine` as `LoadedModel` calls it."""
        names = {"context_parallel": "team", "shard_weights": "sharded"}
        return {names.get(key, key): value for key, value in self.machine.items() if value is not None}

    def say(self, what: str, done: float = 0, total: float = 0, left: float | None = None) -> None:
        """How far the stage is; `left`: seconds."""
        if self.leading:
            self.progress(Step(self.name, what, int(done), int(total) or None, left=left))

    def write(self, recipe: Recipe, adapter: Path | None) -> None:
        """The stage's own recipe file; it names the adapter by a path relative to its folder."""
        if self.leading:
            relative = None if adapter is None else _relative(adapter, self.folder)
            write_recipe(replace(recipe, adapter=relative), self.folder, force=True)

    def kept(self, name: str) -> dict[str, Any]:
        """What an interrupted stage kept in a file of its folder; nothing where that is damaged."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}

    def keep(self, name: str, values: Any) -> None:
        """What the stage has so far, in a file of its folder: whole or not at all."""
        if self.leading:
            replace_file(self.folder / name, json.dumps(values, indent=1) + "\n")


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def with_tier(recipe: Recipe, tier: Tier) -> Recipe:
    """The recipe with a tier added, or put in the place of the one for its window."""
    others = [old for old in recipe.tiers if old.max_length != tier.max_length]
    return replace(recipe, tiers=tuple(sorted([*others, tier], key=lambda tier: tier.max_length)))
