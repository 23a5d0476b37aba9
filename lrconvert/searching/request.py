# SPDX-License-Identifier: Apache-2.0
"""The options of a search, what it starts from, and which sets may be candidates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lrconvert.checkpoint import Model
from lrconvert.engines.capability import SEARCHABLE, of_model
from lrconvert.errors import UsageError
from lrconvert.evals.texts import Text
from lrconvert.families import ModelShape
from lrconvert.recipe import Recipe, load_recipe
from lrconvert.recipe.models import ground_of
from lrconvert.rope import Tier, longrope_attention_factor, serving
from lrconvert.searching.objective import JumpingRows
from lrconvert.searching.objective import Kind as ObjectiveKind
from lrconvert.searching.space import Kind as SpaceKind

AlgorithmName = Literal["guided", "evolution"]


@dataclass(frozen=True)
class SearchRequest:
    """The options of a search. `searching.api.search` says what each value means."""

    model: str | Path
    target: int
    texts: Sequence[str | Path | Text] = ()
    output: Path | None = None
    algorithm: AlgorithmName = "guided"
    space: SpaceKind = "longrope"
    objective: ObjectiveKind = "perplexity"
    lengths: Mapping[int, float] | None = None
    documents: int = 1
    tiers: Sequence[int | Literal["short", "long"]] = ()
    budget: int | None = None
    seed: int = 0
    start_from: str | Path | None = None
    on: str | Path | None = None
    rows: JumpingRows | None = None
    start_tokens: bool = False
    from_plain: bool = False
    runtime: str | None = None
    attention_factor: float | None = None
    uniform: bool = False
    allow_concatenate: bool = False
    form: Path | None = None
    original_window: int | None = None
    name: str | None = None
    adapter: str | None = None
    dtype: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Base:
    """What a search starts from: the original window, the window that the model reaches, and the sets it has for that.
    Without sets its rotation is unscaled.

    `whole`: the attention factors of the sets are parts of LongRoPE's formula for the whole extension, as those of a
    recipe are. Otherwise they are the model's own, and the formula for what is beyond its window multiplies them.
    """

    original_window: int
    reach: int
    tiers: tuple[Tier, ...] = ()
    whole: bool = False

    def attention_factor(self, length: int) -> float:
        """LongRoPE's formula for a set up to `length`, as far as the model does not have it."""
        if not self.whole:
            return longrope_attention_factor(length / self.reach, self.reach)
        own = serving(self.tiers, length).attention_factor
        return longrope_attention_factor(length / self.original_window, self.original_window) / own

    def own(self, length: int) -> Tier | None:
        return serving(self.tiers, length) if self.tiers else None


def base_of(request: SearchRequest, model: Model, on: Recipe | None) -> tuple[Base, tuple[str, ...]]:
    """What the search starts from, and notes on how it was found."""
    if on is not None:
        model.resolve(on)
        return Base(on.original_window, on.tiers[-1].max_length, on.tiers, whole=True), ()
    ground = ground_of(
        request.model, model.rotation, model.shape, from_plain=request.from_plain, window=request.original_window
    )
    ground.check_target(request.target)
    scaled = ground.kind != "default"
    return Base(ground.tiers[0].max_length, ground.window, ground.tiers if scaled else ()), ground.notes


def start_of(request: SearchRequest, model: Model) -> tuple[Recipe | None, tuple[str, ...]]:
    """The recipe whose sets are the first candidates, as the runtime can express it, because sets that are not searched
    are kept; and what that dropped, in words."""
    if request.start_from is None:
        return None, ()
    start = load_recipe(request.start_from)
    spec = model.resolve(start)
    if request.runtime is None:
        return start, ()
    fitted, dropped = replace(SEARCHABLE[request.runtime], once=False, first_only=False).fit(spec)
    return replace(start, tiers=fitted.tiers), tuple(f"of {start.name}: {words}" for words in dropped)


def limited(request: SearchRequest) -> SearchRequest:
    """The request with the freedoms that its runtime has. Raises `UsageError` for more."""
    if request.runtime is None:
        return request
    able = SEARCHABLE[request.runtime]
    if able.attention == "formula" and request.attention_factor is not None:
        raise UsageError(f"--attention-factor: {able.name} computes LongRoPE's formula", remedy="Omit it, or --for")
    if request.start_tokens and not able.start_tokens:
        raise UsageError(f"--start-tokens: {able.name} knows none", remedy="Omit it, or --for")
    return replace(request, uniform=request.uniform or able.attention != "per tier")


def check_sets(request: SearchRequest, base: Base, shape: ModelShape) -> None:
    """Raises `UsageError` for more factor sets than the runtime knows, and for sets that change where it can't."""
    if request.runtime is None or (most := SEARCHABLE[request.runtime].tiers) is None:
        return
    named = {"short": base.original_window, "long": request.target}
    searched = {named[tier] if isinstance(tier, str) else tier for tier in request.tiers or ("long",)}
    lengths = {base.original_window, request.target, *searched, *(tier.max_length for tier in base.tiers)}
    if len(lengths) > most:
        raise UsageError(
            f"the recipe would have sets for {', '.join(map(str, sorted(lengths)))} tokens; "
            f"{SEARCHABLE[request.runtime].name} knows {most}"
        )
    able = of_model(SEARCHABLE[request.runtime], shape)
    if able.boundary not in (None, min(lengths)):
        raise UsageError(
            f"the recipe's sets would change after {min(lengths)} tokens; {able.name} changes them after "
            f"{able.boundary} alone, from where on the model's queries grow",
            remedy="Omit --for; one set for every length can be baked for it (`lrconvert gguf --static-long`)",
        )


def tier_lengths(
    tiers: Sequence[int | Literal["short", "long"]], weighted: Iterable[int], window: int, target: int
) -> list[int]:
    """The lengths to search sets for, each once, in order. `window` is the original one, `weighted` the lengths that an
    evaluation counts. Raises `UsageError` for what is not between the original window and the target."""
    if window < 2:
        raise UsageError(f"an original window of {window} token has nothing to extend")
    if target <= window:
        raise UsageError(
            f"--target {target} is within the original window, {window}",
            remedy="Use a longer one; --tier short searches the original window's own set",
        )
    if beyond := [length for length in weighted if length > target]:
        raise UsageError(f"--lengths {beyond[0]} is beyond the target, {target}")
    named = {"short": window, "long": target}
    lengths = {named[tier] if isinstance(tier, str) else tier for tier in tiers or ("short", "long")}
    if off := [length for length in lengths if not window <= length <= target]:
        raise UsageError(f"--tier {off[0]} is not between the original window, {window}, and the target, {target}")
    return sorted(lengths)


def start_tokens_of(request: SearchRequest, own: Tier | None) -> tuple[int, ...] | None:
    """The numbers to try; None: the space's own. On top of a set that scales, its number alone composes."""
    if own is not None and set(own.factors) != {1.0}:
        return (own.start_tokens,)
    return None if request.start_tokens else (0,)


def attention_of(
    request: SearchRequest, base: Base, length: int, kept: Sequence[Tier] = ()
) -> tuple[float, float] | None:
    """The attention factors to try on top of what the model has; None: the space's own. `kept` are the sets that are
    not searched: where all have one factor, a longer one of them has it already."""
    own, named, short = base.own(length), request.attention_factor, length <= base.original_window
    if named is None and request.uniform and kept and kept[-1].max_length > length:
        named = kept[-1].attention_factor
    if named is not None and (request.uniform or not short):
        factor = named / (own.attention_factor if own else 1.0)
    elif short or own is None:
        return None
    else:
        factor = base.attention_factor(length)
    return factor, factor
