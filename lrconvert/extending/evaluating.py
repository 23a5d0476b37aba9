# SPDX-License-Identifier: Apache-2.0
"""The evaluation of an extension, on the model in memory. Every length is kept as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lrconvert.errors import InputError
from lrconvert.evals.in_memory import LoadedSession
from lrconvert.evals.passkey import PROTOCOL as PASSKEY
from lrconvert.evals.passkey import PasskeyFormat, PasskeyRow, by_length, form_of, measure_passkey
from lrconvert.evals.perplexity import measure_perplexity
from lrconvert.evals.protocols import Plan as Protocol
from lrconvert.evals.retrieval import PROTOCOL as RETRIEVAL
from lrconvert.evals.retrieval import evaluation_keys, measure_retrieval
from lrconvert.extending.plan import Evaluate
from lrconvert.extending.task import Task
from lrconvert.rope import Tier
from lrconvert.training.keys import LabelledForm
from lrconvert.training.loaded import LoadedModel

MEASURED = "measured.json"
BASE, EXTENDED = "base", "extended"  # the model before its extension, rotated plainly, and after it
Measure = Callable[[LoadedSession], Any]


def evaluate(stage: Evaluate, task: Task) -> dict[str, Any]:
    """Everything that the stage asks for: by kind and length, with protocols and the digests of the texts."""
    kept = task.kept(MEASURED)
    measures = _measures(stage, task)
    session, loaded = None, ""
    for number, (key, (model, measure)) in enumerate(measures.items()):
        if key in kept:
            continue
        task.say(key, number, len(measures))
        if session is None or loaded != model:
            plain = Tier(task.recipe.original_window, (1.0,) * (task.recipe.rotary_dim // 2))
            weights, tiers = (task.model, (plain,)) if model == BASE else (task.trained(), task.recipe.tiers)
            session, loaded = None, model  # the one before goes away first
            session = LoadedSession(LoadedModel(weights, **task.loading), tiers)
        kept[key] = measure(session)
        task.keep(MEASURED, kept)
    return {
        "texts": [text.record() for text in task.held_out],
        "protocols": {"perplexity": _protocol(stage, task).sentence if stage.perplexity else None,
                      "retrieval": RETRIEVAL, "passkey": PASSKEY},
        "measured": {key: kept[key] for key in measures},
    }  # fmt: skip


def _protocol(stage: Evaluate, task: Task) -> Protocol:
    """Its excerpts hold the longest length, and the original window, at which the model before is measured."""
    window = task.recipe.original_window
    lengths = stage.perplexity if max(stage.perplexity) >= window else (*stage.perplexity, window)
    return Protocol(lengths, stage.judged, stage.excerpts)


def _measures(stage: Evaluate, task: Task) -> dict[str, tuple[str, Measure]]:
    """What is measured under which name, and on which model: the base first, then the short lengths."""
    texts = [text.tokens for text in task.held_out]
    folder, encode = task.model.checkpoint.path, task.encode

    def perplexity(length: int) -> Measure:
        plan = _protocol(stage, task)
        documents = long_enough(texts, max(plan.lengths))
        return lambda session: measure_perplexity(session, documents, plan, only=(length,), seed=task.seed)[0].to_json()

    def retrieval(length: int) -> Measure:
        form, documents = LabelledForm.read(evaluation_keys(folder)), long_enough(texts, length)[: stage.texts]
        return lambda session: _total(
            measure_retrieval(session, form, encode, documents, [length], keys=stage.keys, seed=task.seed)
        )

    def passkey(length: int) -> Measure:
        form = PasskeyFormat.read(form_of(folder))
        return lambda session: _total(
            measure_passkey(session, form, encode, [length], depths=stage.depths, seed=task.seed)
        )

    makers = {"perplexity": perplexity, "retrieval": retrieval, "passkey": passkey}
    wanted = sorted((length, kind) for kind in makers for length in getattr(stage, kind))
    window = task.recipe.original_window
    found = {f"{BASE} perplexity@{window}": (BASE, perplexity(window))} if stage.perplexity else {}
    return found | {f"{kind}@{length}": (EXTENDED, makers[kind](length)) for length, kind in wanted}


def _total(rows: list[PasskeyRow]) -> dict[str, Any]:
    """All depths together, and which of them were found."""
    (total,) = by_length(rows)
    return {**total.to_json(), "missed_depths": [round(row.depth, 3) for row in rows if row.hits < row.trials]}


def long_enough(texts: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """The texts of at least `length` tokens; where there is none, all of them one behind the other.

    Raises `InputError` for too little text.
    """
    if found := [text for text in texts if len(text) >= length]:
        return found
    joined = np.concatenate(list(texts))
    if len(joined) < length:
        raise InputError(f"{length} tokens of held-out text are needed; there are {len(joined)}")
    return [joined]
