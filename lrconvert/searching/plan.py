# SPDX-License-Identifier: Apache-2.0
"""What a search will do, decided before the first evaluation: from a request to a plan, and what the plan costs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lrconvert.checkpoint import Model, describe_source, open_model
from lrconvert.checkpoint.adapter import Adapter, merged, open_adapter
from lrconvert.checkpoint.base import refuse_quantised
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.errors import UsageError
from lrconvert.evals.passkey import PasskeyFormat, form_of
from lrconvert.evals.texts import Text, read_texts, sources_of
from lrconvert.recipe import Recipe, load_recipe
from lrconvert.recipe.models import portable_name, scaled_note
from lrconvert.rope import Tier, serving
from lrconvert.searching.evolution import schedule_for
from lrconvert.searching.guided import GUIDED_BUDGET
from lrconvert.searching.objective import Document, Objective, build_objective, needle_documents
from lrconvert.searching.objective import Kind as ObjectiveKind
from lrconvert.searching.space import Candidate, Space, space_for
from lrconvert.searching.space import Kind as SpaceKind

AlgorithmName = Literal["guided", "evolution"]
SHORT_SHARE = 4  # a tier up to the original window gets a quarter of the evaluations: good sets are near


@dataclass(frozen=True)
class TierPlan:
    """One factor set to search: its space, its objective, and what it may cost in forward equivalents."""

    space: Space
    objective: Objective
    budget: int
    start: tuple[Candidate, ...] = ()

    @property
    def length(self) -> int:
        return self.space.target


@dataclass(frozen=True)
class SearchPlan:
    """Everything that is decided before the first evaluation.

    `kept` are tiers of another recipe that are not searched again; `adapter` is merged into the model; `notes` are for
    the person who started the search.
    """

    model: Model
    original_window: int
    algorithm: AlgorithmName
    seed: int
    tiers: tuple[TierPlan, ...]
    texts: tuple[Text, ...]
    dtype: str
    name: str
    base_model: str
    kept: tuple[Tier, ...] = ()
    uniform: bool = False  # shorter tiers take the longest one's attention factor
    adapter: Adapter | None = None
    adapter_path: str | None = None  # as the recipe names it
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two searches the same. The budget is no part of it: a larger one goes on with the same journal."""
        source = describe_source(self.model)
        model = {key: source[key] for key in ("family", "config_sha256", "weights")}
        if self.adapter is not None:
            model["adapter"] = {key: text for key, text in self.adapter.description.items() if key != "reference"}
        return {
            "model": model,
            "original_window": self.original_window,
            "algorithm": self.algorithm,
            "seed": self.seed,
            "tiers": [
                {
                    "space": tier.space.to_json(),
                    "objective": tier.objective.kind,
                    "lengths": {str(length): weight for length, weight in tier.objective.weights.items()},
                    "documents": [[doc.part, len(doc.tokens)] for doc in tier.objective.documents],
                    "documents_sha256": tier.objective.sha256,
                    "start": [candidate.to_json() for candidate in tier.start],
                }
                for tier in self.tiers
            ],
            # Of a data set the commit may change while its rows stay; the text's digest would not.
            "texts": [{"name": t.name, "sha256": t.sha256, "tokens": len(t.tokens)} for t in self.texts],
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class SearchRequest:
    """The options of a search. `searching.api.search` says what each value means."""

    model: str | Path
    target: int
    texts: Sequence[str | Path] = ()
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
    attention_factor: float | None = None
    uniform: bool = False
    allow_concatenate: bool = False
    form: Path | None = None
    original_window: int | None = None
    name: str | None = None
    adapter: str | None = None
    dtype: str | None = None
    revision: str | None = None


def default_budget(algorithm: AlgorithmName, target: int, original_window: int) -> int:
    """Forward equivalents that a tier gets where none are given."""
    full = schedule_for(target).evaluations if algorithm == "evolution" else GUIDED_BUDGET
    return full if target > original_window else full // SHORT_SHARE


def plan_search(request: SearchRequest) -> SearchPlan:
    """The plan for a request. Reads the config, the texts and the tokenizer, and loads no model.

    Without a `dtype` the plan has float32. Raises `UsageError` for lengths that don't go together, `InputError` for
    texts, recipes and adapters that are unreadable, too short or another model's, `UnsupportedError` for a quantised
    model.
    """
    sources = sources_of(request.texts) if request.objective != "needle" or request.texts else []
    model = open_model(str(request.model), revision=request.revision)
    refuse_quantised(model, "a search")
    adapter = open_adapter(request.adapter) if request.adapter else None
    if adapter is not None:
        model = merged(model, adapter)
    window, notes = _original_window(request, model)
    start = load_recipe(request.start_from) if request.start_from else None
    if start is not None:
        model.resolve(start)
    lengths = tier_lengths(request.tiers, request.lengths or (), window, request.target)
    texts = read_texts(
        sources,
        lambda: tokenizer_of(model.checkpoint.path),
        vocab=model.shape.vocab,
        tokens=1 if request.allow_concatenate else request.target,
    )
    # The longest first: an error about a text that is too short then names the length it needs most.
    tiers = tuple(_tier(request, model, window, length, texts, start) for length in reversed(lengths))[::-1]
    kept = [tier for tier in start.tiers if tier.max_length not in lengths] if start else []
    return SearchPlan(
        model=model,
        original_window=window,
        algorithm=request.algorithm,
        seed=request.seed,
        tiers=tiers,
        texts=tuple(texts),
        dtype=request.dtype or "float32",
        name=request.name or _name(request, model),
        base_model=portable_name(request.model, model.checkpoint.path),
        kept=tuple(tier for tier in kept if tier.max_length <= request.target),
        uniform=request.uniform,
        adapter=adapter,
        adapter_path=None if adapter is None else _beside(adapter.reference, request.output),
        notes=notes,
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


def _original_window(request: SearchRequest, model: Model) -> tuple[int, tuple[str, ...]]:
    """The window to extend from, and notes on how it was found."""
    if request.original_window is not None:
        return request.original_window, ()
    found = model.rotation
    return found.original_window, (scaled_note(request.model, found, "search"),) if found.scaled else ()


def _name(request: SearchRequest, model: Model) -> str:
    """The output's name, else one made of the model and the target."""
    if request.output is not None:
        return request.output.name.removesuffix(".json")
    thousands, rest = divmod(request.target, 1024)
    length = request.target if rest else f"{thousands}k"
    return f"{Path(portable_name(request.model, model.checkpoint.path)).name}-{length}"


def _beside(reference: str, output: Path | None) -> str:
    """A path relative to the recipe's folder; a Hub id stays as it is."""
    if output is None or not Path(reference).exists():
        return reference
    return Path(os.path.relpath(reference, output.parent if output.suffix == ".json" else output)).as_posix()


def _tier(
    request: SearchRequest, model: Model, window: int, length: int, texts: list[Text], start: Recipe | None
) -> TierPlan:
    shape, factor = model.shape, request.attention_factor
    fixed = (factor, factor) if factor is not None and length > window else None
    space = space_for(shape.rotary_dim, shape.theta, window, length, kind=request.space, attention=fixed)
    objective = build_objective(
        request.objective,
        {at: weight for at, weight in (request.lengths or {}).items() if at <= length} or {length: 1.0},
        original_window=window,
        texts=texts,
        documents=request.documents * (request.target // length),  # as many tokens for every tier
        join=request.allow_concatenate,
        needles=_needles(request, model),
    )
    candidates: tuple[Candidate, ...] = ()
    if start is not None:
        old = serving(start.tiers, length)
        candidates = (space.make(old.factors, old.start_tokens, old.attention_factor),)
    return TierPlan(space, objective, _budget(request, length, window), candidates)


def _budget(request: SearchRequest, length: int, window: int) -> int:
    """Forward equivalents for a tier. A budget that was named is the long set's, unless one tier alone is searched."""
    if request.budget is None:
        return default_budget(request.algorithm, length, window)
    if length <= window and len(request.tiers) != 1:
        return max(1, request.budget // SHORT_SHARE)
    return request.budget


def _needles(request: SearchRequest, model: Model) -> Callable[[Sequence[int]], list[Document]]:
    """Makes the documents of a retrieval objective: only then is the tokenizer needed."""

    def made(lengths: Sequence[int]) -> list[Document]:
        path = model.checkpoint.path
        form = PasskeyFormat.read(request.form or form_of(path))
        return needle_documents(form, tokenizer_of(path), lengths, request.seed)

    return made


# --- what it costs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TierCost:
    """What the search for one set costs: `evaluations` of `documents` with `tokens` together, `operations`
    (floating-point) each."""

    length: int
    evaluations: int
    documents: int
    tokens: int
    operations: float


def costs(plan: SearchPlan) -> list[TierCost]:
    """Every tier's cost, from shapes alone."""
    shape = plan.model.shape
    parameters = sum(int(np.prod(info.shape, dtype=np.float64)) for info in plan.model.checkpoint.tensors.values())
    found = []
    for tier in plan.tiers:
        lengths = [len(document.tokens) for document in tier.objective.documents]
        # A product of matrices takes 2 operations a parameter and token; causal attention reads half of all pairs.
        dense = 2.0 * parameters * sum(lengths)
        attention = sum(2.0 * shape.layers * shape.heads * shape.head_dim * length**2 for length in lengths)
        found.append(TierCost(tier.length, tier.budget, len(lengths), sum(lengths), dense + attention))
    return found
