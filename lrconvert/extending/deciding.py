# SPDX-License-Identifier: Apache-2.0
"""The best sets of a search, compared on whole documents of a true length.

A search on rows with jumping positions is cheap. What it ranks first is confirmed here, and the rank correlation of
both losses says how far to trust it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.errors import InputError
from lrconvert.extending.plan import Search
from lrconvert.extending.task import JOURNAL, Task
from lrconvert.rope import Tier, compose, serving
from lrconvert.searching.journal import Record, read_journal
from lrconvert.searching.objective import PARTS
from lrconvert.searching.objective import Kind as Objective
from lrconvert.training.keys import KeyMaker, training_form
from lrconvert.training.rows import KEY_TOKENS, Row, RowOptions, make_row

if TYPE_CHECKING:
    from lrconvert.training.loaded import LoadedModel

DECIDED = "decided.json"


@dataclass(frozen=True)
class Decided:
    """A set with its loss in the search and on whole documents."""

    rank: int  # in the search, from 0
    made: str
    searched: float
    whole: float
    tier: Tier


def decide(stage: Search, task: Task) -> dict[str, Any]:
    """Puts the set that is best on whole documents into the stage's recipe; what it was compared with.

    Raises `InputError` for texts that are shorter than a document.
    """
    from lrconvert.training.loaded import LoadedModel as Loaded

    assert stage.decide is not None
    before = task.recipe
    own = serving(before.tiers, stage.window)
    ranked = ranking(read_journal(task.folder / JOURNAL).records, stage.window)
    chosen = spread([record.answer.loss for record in ranked], stage.finalists)
    row = whole_row(task, [text.tokens for text in task.texts], stage.decide, stage.objective, stage.keys)
    kept = task.kept(DECIDED)
    model: LoadedModel | None = None
    found = []
    for number, rank in enumerate(chosen):
        record = ranked[rank]
        tier = compose(own, record.question.candidate.tier(stage.window))
        key = json.dumps(asdict(tier))
        if key not in kept:
            task.say(f"deciding at {stage.decide} tokens", number, len(chosen))
            model = model or Loaded(task.trained(), **task.loading)
            model.rotation = tier
            kept[key] = loss_of(model, row, stage.objective, stage.judged)
            task.keep(DECIDED, kept)
        found.append(Decided(rank, record.question.made, record.answer.loss, kept[key], tier))
    best = min(found[: stage.finalists], key=lambda one: one.whole)
    task.write(task.with_tier(best.tier), task.adapter)
    rows = [{key: value for key, value in asdict(one).items() if key != "tier"} for one in found]
    correlation = rank_correlation([one.searched for one in found], [one.whole for one in found])
    return {
        "tokens": stage.decide,
        "judged": stage.judged,
        "sets": rows,
        "chosen": best.rank,
        "rank_correlation": correlation,
    }


def ranking(records: list[Record], length: int) -> list[Record]:
    """The sets that a search evaluated for `length`, the best first, each once."""
    best: dict[Any, Record] = {}
    for record in records:
        if record.tier == length and np.isfinite(record.answer.loss):
            best.setdefault(record.question.candidate, record)
    return sorted(best.values(), key=lambda record: record.answer.loss)


def spread(losses: list[float], finalists: int) -> list[int]:
    """The first ranks, and up to as many again whose losses are ever further from the best: among near ties alone, a
    rank correlation is noise."""
    first, rest = list(range(min(finalists, len(losses)))), np.arange(finalists, len(losses))
    if not len(rest):
        return first
    gaps = np.maximum(np.asarray(losses)[rest] - losses[0], 1e-6)
    wanted = np.geomspace(gaps[0], gaps[-1], finalists)
    return sorted({*first, *(int(rest[np.abs(gaps - gap).argmin()]) for gap in wanted)})


def whole_row(task: Task, texts: Sequence[np.ndarray], length: int, objective: Objective, keys: int) -> Row:
    """A document of `length` tokens with consecutive positions, and with keys where the objective has some. Texts that
    are shorter are joined.

    Raises `InputError` for too little text, or no room for a key.
    """
    joined = texts if max(map(len, texts)) >= length else [np.concatenate(texts)]
    hidden = keys if "needle" in PARTS[objective] else 0
    if hidden and length < 2 * KEY_TOKENS:
        raise InputError(f"a document of {length} tokens has no room for a key; the objective {objective} asks for one")
    maker = KeyMaker(training_form(task.model.checkpoint.path), task.encode) if hidden else None
    options = RowOptions(length, length, keys=hidden)
    return make_row(joined, options, maker, np.random.default_rng([task.seed, length]))


def loss_of(model: LoadedModel, row: Row, objective: Objective, judged: int) -> float:
    """The objective on the document: of its text the last `judged` losses count."""
    first = max(0, len(row.text) - judged)
    (losses,) = model.losses(row.tokens[None], (first, len(row.text)))
    masks = {"text": row.text, "needle": row.answers}
    means = {part: float(losses[first:][mask[first:]].mean()) for part, mask in masks.items() if mask.any()}
    return sum(share * means[part] for part, share in PARTS[objective].items())


def rank_correlation(first: list[float], second: list[float]) -> float | None:
    """Spearman's ρ; None for fewer than three pairs."""
    if len(first) < 3:
        return None
    one, other = (np.argsort(np.argsort(values)).astype(float) for values in (first, second))
    return round(float(np.corrcoef(one, other)[0, 1]), 4)
