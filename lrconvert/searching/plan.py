# SPDX-License-Identifier: Apache-2.0
"""What a search will do, decided before the first evaluation: from a request to a plan, and what the plan costs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.artifact.again import check_not_merged
from lrconvert.artifact.sliding import lifted_note
from lrconvert.checkpoint import Model, describe_source, open_model
from lrconvert.checkpoint.adapter import Adapter, choose_adapter, merged, open_adapter
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.errors import UsageError
from lrconvert.evals.passkey import PasskeyFormat, form_of
from lrconvert.evals.texts import Text, read_texts, sources_of
from lrconvert.precision import long_name
from lrconvert.recipe import Recipe, load_recipe, recipe_folder
from lrconvert.recipe.models import portable_name
from lrconvert.rope import Tier, serving
from lrconvert.searching.evolution import schedule_for
from lrconvert.searching.guided import GUIDED_BUDGET
from lrconvert.searching.objective import (
    Document,
    Objective,
    build_objective,
    jumping_documents,
    needle_documents,
)
from lrconvert.searching.request import (
    AlgorithmName,
    Base,
    SearchRequest,
    attention_of,
    base_of,
    check_sets,
    limited,
    start_of,
    start_tokens_of,
    tier_lengths,
)
from lrconvert.searching.space import Candidate, Space, space_for
from lrconvert.training.keys import KeyMaker, LabelledForm, training_form

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

    def tier_of(self, candidate: Candidate) -> Tier:
        """The set that a recipe gets of a candidate."""
        return self.objective.rotation(candidate, self.length)


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
                    **({} if tier.objective.own is None else {"own": asdict(tier.objective.own)}),
                    "documents_sha256": tier.objective.sha256,
                    "start": [candidate.to_json() for candidate in tier.start],
                }
                for tier in self.tiers
            ],
            # Of a data set the commit may change while its rows stay; the text's digest would not.
            "texts": [{"name": t.name, "sha256": t.sha256, "tokens": len(t.tokens)} for t in self.texts],
            "dtype": self.dtype,
        }


def default_budget(algorithm: AlgorithmName, target: int, original_window: int) -> int:
    """Forward equivalents that a tier gets where none are given."""
    full = schedule_for(target).evaluations if algorithm == "evolution" else GUIDED_BUDGET
    return full if target > original_window else full // SHORT_SHARE


def plan_search(request: SearchRequest) -> SearchPlan:
    """The plan for a request. Reads the config, the texts and the tokenizer, and loads no model.

    Without a `dtype` the plan has float32. Raises `UsageError` for lengths that don't go together, `InputError` for
    texts, recipes and adapters that are unreadable, too short or another model's.
    """
    request = limited(request)
    sources = sources_of(request.texts) if request.objective != "needle" or request.texts else []
    model = open_model(str(request.model), revision=request.revision)
    on = load_recipe(request.on) if request.on else None
    adapter = _adapter(request, on)
    if adapter is not None:
        check_not_merged(model, adapter, of_recipe=request.adapter is None)
        model = merged(model, adapter)
    base, notes = base_of(request, model, on)
    if request.on and request.start_from:
        raise UsageError("--start-from names whole sets, and --on searches what multiplies a recipe's: use one of them")
    start, dropped = start_of(request, model)
    check_sets(request, base, model.shape)
    # Where the model has sets already, they stay as they are unless a tier is named.
    tiers = request.tiers or (("long",) if base.tiers else ())
    lengths = tier_lengths(tiers, request.lengths or (), base.original_window, request.target)
    if base.whole and "long" in tiers and request.target <= base.reach:
        raise UsageError(
            f"--target {request.target} is within the window of {request.on}, {base.reach}", remedy="Use a longer one"
        )
    texts = read_texts(
        sources,
        lambda: tokenizer_of(model.checkpoint.path),
        vocab=model.shape.vocab,
        tokens=_needed(request),
    )
    kept = tuple(
        tier
        for tier in (start.tiers if start else base.tiers)
        if tier.max_length not in lengths and tier.max_length <= request.target
    )
    # The longest first: an error about a text that is too short then names the length it needs most.
    plans = tuple(_tier(request, model, base, length, texts, start, kept) for length in reversed(lengths))[::-1]
    return SearchPlan(
        model=model,
        original_window=base.original_window,
        algorithm=request.algorithm,
        seed=request.seed,
        tiers=plans,
        texts=tuple(texts),
        dtype=long_name(request.dtype or "float32"),
        name=request.name or _name(request, model),
        base_model=portable_name(request.model, model.checkpoint.path),
        kept=kept,
        uniform=request.uniform,
        adapter=adapter,
        adapter_path=None if adapter is None else _beside(adapter.reference, request.output),
        notes=(
            *notes,
            *dropped,
            *model.read_dequantised("the search runs on its dequantised weights"),
            *lifted_note(model, "a search"),
        ),
    )


def _adapter(request: SearchRequest, on: Recipe | None) -> Adapter | None:
    """The adapter that was given, or the one of the recipe that the search stands on."""
    chosen = request.adapter
    if on is not None and request.on is not None:
        chosen = choose_adapter(chosen, on.adapter, recipe_folder(request.on))
    return open_adapter(chosen) if chosen else None


def _needed(request: SearchRequest) -> int:
    """Tokens that a text must have to be of use."""
    if request.rows is not None:
        return request.rows.length
    return 1 if request.allow_concatenate else request.target


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
    request: SearchRequest,
    model: Model,
    base: Base,
    length: int,
    texts: list[Text],
    start: Recipe | None,
    kept: Sequence[Tier],
) -> TierPlan:
    shape, own = model.shape, base.own(length)
    space = space_for(
        shape.rotary_dim,
        shape.theta,
        base.original_window if length <= base.original_window else base.reach,
        length,
        kind=request.space,
        attention=attention_of(request, base, length, kept),
        start_tokens=start_tokens_of(request, own),
    )
    if request.rows is not None and length > base.original_window:
        objective = _jumping(request, model, length, texts)
    else:
        objective = build_objective(
            request.objective,
            {at: weight for at, weight in (request.lengths or {}).items() if at <= length} or {length: 1.0},
            original_window=base.original_window,
            texts=texts,
            documents=request.documents * (1 if request.rows else request.target // length),  # as many tokens each
            join=request.allow_concatenate,
            needles=_needles(request, model),
        )
    candidates = (space.make((1.0,) * space.size),) if own is not None else ()
    if start is not None:
        old = serving(start.tiers, length)
        candidates = (space.make(old.factors, old.start_tokens, old.attention_factor),)
    budget = _budget(request, length, base.original_window)
    return TierPlan(space, replace(objective, own=own), budget, candidates)


def _jumping(request: SearchRequest, model: Model, length: int, texts: list[Text]) -> Objective:
    assert request.rows is not None
    path, maker = model.checkpoint.path, None
    if request.objective != "perplexity":
        form = LabelledForm.read(request.form) if request.form else training_form(path)
        maker = KeyMaker(form, tokenizer_of(path))
    made = jumping_documents(request.rows, request.objective, texts, length, maker, request.seed)
    return Objective(request.objective, tuple(made), {length: 1.0})


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
    found = []
    for tier in plan.tiers:
        lengths = [len(document.tokens) for document in tier.objective.documents]
        done = operations(plan.model, lengths)
        found.append(TierCost(tier.length, tier.budget, len(lengths), sum(lengths), done))
    return found


def operations(model: Model, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward pass over rows of these lengths."""
    shape = model.shape
    parameters = sum(int(np.prod(info.shape, dtype=np.float64)) for info in model.checkpoint.tensors.values())
    # A product of matrices takes 2 operations a parameter and token; causal attention reads half of all pairs.
    attention = sum(2.0 * shape.layers * shape.heads * shape.head_dim * length**2 for length in lengths)
    return 2.0 * parameters * sum(lengths) + attention
