# SPDX-License-Identifier: Apache-2.0
"""What a plan needs of texts and labelled keys, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lrconvert.checkpoint.tokenizer import Encode
from lrconvert.errors import InputError
from lrconvert.evals.passkey import PasskeyFormat, build_document, form_of
from lrconvert.evals.retrieval import build_text, evaluation_keys
from lrconvert.evals.texts import Text
from lrconvert.extending.plan import Calibrate, Evaluate, Plan, Recover, Search, Stage, Tune
from lrconvert.extending.task import Ground
from lrconvert.training.keys import LabelledForm, training_form
from lrconvert.training.rows import KEY_TOKENS


def check_texts(plan: Plan, window: int, texts: Sequence[int], held_out: Sequence[int]) -> None:
    """Raises `InputError` where a stage needs more text than there is; the numbers are tokens of each text. `window` is
    the original one, which rows under the short set have."""
    problems = []
    for key, stage in zip(plan.names, plan.stage, strict=True):
        if isinstance(stage, Tune) and stage.length > max(texts):
            problems.append(f"{key}.length is {stage.length}; the longest text has {max(texts)} tokens")
        if isinstance(stage, Tune) and stage.mixed_every and window > max(texts):
            problems.append(f"{key}.mixed_every asks for rows of {window} tokens; the longest text has {max(texts)}")
        if isinstance(stage, Search):
            row = stage.row_length
            if row is not None and row > max(texts):
                problems.append(f"{key}.row_length is {row}; the longest text has {max(texts)} tokens")
            if (needed := max(stage.decide or 0, 0 if row else stage.window)) > sum(texts):
                problems.append(f"{key} needs {needed} tokens of text; there are {sum(texts)}")
        if isinstance(stage, Calibrate) and (needed := max(stage.lengths)) > sum(texts):
            problems.append(f"{key} needs {needed} tokens of text; there are {sum(texts)}")
        if isinstance(stage, Recover) and window > sum(texts):
            problems.append(f"{key} needs {window} tokens of text; there are {sum(texts)}")
        if isinstance(stage, Evaluate):
            base = (window,) if stage.perplexity else ()
            needed: int = max((*stage.perplexity, *stage.retrieval, *base), default=0)
            if needed > sum(held_out):
                problems.append(f"{key} needs {needed} tokens of held-out text; there are {sum(held_out)}")
    if problems:
        raise InputError("; ".join(problems), remedy="Give more text, or shorter lengths in the plan")


def check_unseen(texts: Sequence[Text], on: Ground | None) -> None:
    """Raises `InputError` for a text that the recipe which is calibrated was made with."""
    told = {} if on is None else on.recipe.provenance.search or {}
    seen = {text["sha256"] for text in told.get("texts", ())}
    if known := [text.name for text in texts if text.sha256 in seen]:
        raise InputError(
            f"{', '.join(known)}: the recipe was searched or trained on it, so it can't calibrate",
            remedy="Give a text that it has not seen",
        )


def check_keys(plan: Plan, folder: Path, encode: Callable[[], Encode]) -> None:
    """Raises `InputError` where a stage asks for more keys than there are labels, or where its lengths have no room for
    them; `folder` is the model's, which may have forms of its own."""
    problems = []
    for name, stage in zip(plan.names, plan.stage, strict=True):
        problems += [f"{name}.{problem}" for problem in _key_problems(stage, folder, encode)]
    if problems:
        raise InputError("; ".join(problems), remedy="Ask for fewer keys, or for longer lengths")


def _key_problems(stage: Stage, folder: Path, encode: Callable[[], Encode]) -> Iterator[str]:
    if isinstance(stage, Evaluate):
        yield from _evaluation_problems(stage, folder, encode)
    for key, shortest, longest, keys in _hiding(stage):
        labels = len(training_form(folder).labels)
        if min(keys, longest // (2 * KEY_TOKENS)) > labels:
            yield f"keys is {keys}; the keys that the model is trained on have {labels} labels"
        if shortest < 2 * KEY_TOKENS:
            yield f"{key} is {shortest}, with keys = {keys}: not one key has room"


def _hiding(stage: Stage) -> Iterator[tuple[str, int, int, int]]:
    """Of a stage that hides labelled keys in its rows: the plan's name of their lengths, the shortest and the longest,
    and how many keys."""
    match stage:
        case Tune() if stage.keys:
            yield "length", stage.length, stage.length, stage.keys
        case Search() if stage.row_length is not None and stage.objective != "perplexity":
            yield "row_length", stage.row_length, stage.decide or stage.row_length, stage.keys
        case Calibrate() if stage.objective != "perplexity":
            yield "lengths", min(stage.lengths), max(stage.lengths), stage.keys


def _evaluation_problems(stage: Evaluate, folder: Path, encode: Callable[[], Encode]) -> Iterator[str]:
    """By the documents that the evaluation would make, at the shortest lengths."""
    if not (stage.retrieval or stage.passkey):
        return
    encoded, rng = encode(), np.random.default_rng(0)
    if stage.retrieval:
        length, form = min(stage.retrieval), LabelledForm.read(evaluation_keys(folder))
        try:
            build_text(form, encoded, np.zeros(length, np.int64), length, stage.keys, rng)
        except InputError as error:
            yield f"retrieval is {length}, with keys = {stage.keys}: {error.message}"
    if stage.passkey:
        length, form = min(stage.passkey), PasskeyFormat.read(form_of(folder))
        try:
            build_document(form, encoded, length, 0.5, rng)
        except InputError as error:
            yield f"passkey is {length}: {error.message}"
