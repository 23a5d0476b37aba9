# SPDX-License-Identifier: Apache-2.0
"""Mistakes that converters make, on purpose. A check that lets one of them through is worthless.

A mutant is a recipe, or a model, with one mistake. A test bakes an artifact from the mutant and verifies it
against the original: every one must fail, in every format and every runtime. None where the mistake does
not exist for a recipe (no start tokens to drop).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.base import CheckpointView
from lrconvert.checkpoint.blocks import Array, Block
from lrconvert.families.layers import FULL
from lrconvert.families.query_scale import QueryScale
from lrconvert.recipe import Recipe
from lrconvert.rope import Tier


def _tiers(recipe: Recipe, change: Callable[[Tier], Tier]) -> Recipe:
    return replace(recipe, tiers=tuple(change(tier) for tier in recipe.tiers))


def swapped_sets(recipe: Recipe) -> Recipe | None:
    """Short and long exchanged."""
    first, last = recipe.tiers[0], recipe.tiers[-1]
    if first.factors == last.factors:
        return None
    return replace(
        recipe,
        tiers=(
            replace(first, factors=last.factors),
            *recipe.tiers[1:-1],
            replace(last, factors=first.factors),
        ),
    )


def no_attention_factor(recipe: Recipe) -> Recipe | None:
    if all(tier.attention_factor == 1.0 for tier in recipe.tiers):
        return None
    return _tiers(recipe, lambda tier: replace(tier, attention_factor=1.0))


def late_boundary(recipe: Recipe) -> Recipe | None:
    """`>` where `≥` belongs: the switch comes one token late."""
    if len(recipe.tiers) == 1:
        return None
    head = [replace(tier, max_length=tier.max_length + 1) for tier in recipe.tiers[:-1]]
    return replace(recipe, tiers=(*head, recipe.tiers[-1]))


def early_boundary(recipe: Recipe) -> Recipe | None:
    """The switch comes one token early."""
    if len(recipe.tiers) == 1:
        return None
    head = [replace(tier, max_length=tier.max_length - 1) for tier in recipe.tiers[:-1]]
    return replace(recipe, original_window=recipe.original_window - 1, tiers=(*head, recipe.tiers[-1]))


def factors_as_multipliers(recipe: Recipe) -> Recipe | None:
    if all(set(tier.factors) == {1.0} for tier in recipe.tiers):
        return None
    return _tiers(recipe, lambda tier: replace(tier, factors=tuple(1 / value for value in tier.factors)))


def no_start_tokens(recipe: Recipe) -> Recipe | None:
    """n̂ dropped. (n̂ = 1 is n̂ = 0: position 0 has angle 0 in any set.)"""
    if all(tier.start_tokens <= 1 for tier in recipe.tiers):
        return None
    return _tiers(recipe, lambda tier: replace(tier, start_tokens=0))


RECIPE_MUTANTS: dict[str, Callable[[Recipe], Recipe | None]] = {
    "swapped sets": swapped_sets,
    "no attention factor": no_attention_factor,
    "boundary one late": late_boundary,
    "boundary one early": early_boundary,
    "factors as multipliers": factors_as_multipliers,
    "no start tokens": no_start_tokens,
}


class InterleavedCheckpoint(CheckpointView):
    """A checkpoint whose q and k rows are in llama.cpp's order: what a forgotten permutation leaves."""

    def __init__(self, model: Model) -> None:
        shape = model.shape
        heads = {"q": [shape.heads], "k": [shape.kv_heads], "qkv": [shape.heads, shape.kv_heads]}
        self._heads = {tensor.name: heads[tensor.role] for tensor in model.roles.values() if tensor.role in heads}
        self._rows = shape.head_dim
        super().__init__(model.checkpoint, self._heads)

    def blocks(self, name: str) -> Iterator[Block]:
        if name not in self._heads:
            return super().blocks(name)
        return iter([Block(0, self.tensors[name].shape[0], partial(self._interleaved, name))])

    def _interleaved(self, name: str) -> Array:
        array, start = self.base.read(name).copy(), 0
        for heads in self._heads[name]:
            stop = start + heads * self._rows
            array[start:stop] = _interleave(array[start:stop], heads)
            start = stop
        return array


def _interleave(array: Array, heads: int) -> Array:
    rows, columns = array.shape
    return array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def unpermuted_qk(model: Model) -> Model:
    """The model as a converter leaves it that forgets the permutation of q and k."""
    return replace(model, checkpoint=InterleavedCheckpoint(model))


def layers_alike(model: Model) -> Model | None:
    """The model as a converter leaves it that takes all layers for one kind: they attend to every token, and the recipe
    rotates them. None where they are."""
    stated, shape = model.family.layers, model.shape
    if stated is None or not shape.own_theta:
        return None
    view = CheckpointView(model.checkpoint)
    view.config = {**view.config, "layer_types": [FULL] * shape.layers}
    if stated.rotates is not None:
        view.config[stated.rotates] = [1] * shape.layers
    return replace(model, checkpoint=view, shape=replace(shape, sliding=(), own_theta=()))


def query_scale_as(model: Model, scale: QueryScale | None) -> Model | None:
    """The model as a converter leaves it that forgets how queries grow with their positions (None), or takes another
    growth or window for it. None where they don't grow, or that is how they do."""
    if model.shape.query_scale in (None, scale):
        return None
    return replace(model, shape=replace(model.shape, query_scale=scale))


def without_multiplier(model: Model, name: str) -> Model | None:
    """The model as a converter leaves it that drops a multiplier, in its config and its shape. None where it is 1."""
    stated, found = model.family.multipliers.get(name), model.shape.multipliers
    if stated is None or getattr(found, name) == 1.0:
        return None
    view = CheckpointView(model.checkpoint)
    view.config = {**view.config, stated.key: stated.value(1.0, model.shape.numbers)}
    return replace(model, checkpoint=view, shape=replace(model.shape, multipliers=replace(found, **{name: 1.0})))
