# SPDX-License-Identifier: Apache-2.0
"""Retrieval of many keys from one text: labelled keys at all depths, each asked for behind the same text.

A passkey costs a forward pass over the whole text for every key. Here the text is read once, and a question costs the
few tokens that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from lrconvert.checkpoint.tokenizer import Encode
from lrconvert.data import DATA
from lrconvert.errors import InputError
from lrconvert.evals.passkey import PasskeyRow
from lrconvert.evals.perplexity import finite
from lrconvert.progress import Progress, Steps
from lrconvert.runtimes.base import Scores, Scoring
from lrconvert.training.keys import Key, KeyMaker, LabelledForm, hidden_in, keys_file

if TYPE_CHECKING:
    from lrconvert.runtimes.answers import AnswersBehind

PROTOCOL = (
    "labelled keys of digits at depths from the start of a text to its end, each asked for behind it on its own; found "
    "when greedy decoding writes every digit"
)


@dataclass(frozen=True, eq=False)
class KeyedText:
    """A text with keys: `prompt` and every `question` with its answer are `length` tokens together, or a few less."""

    prompt: list[int]
    keys: list[Key]


def evaluation_keys(folder: Path) -> Path:
    """The file of labelled keys to evaluate a model with: its own passkey.json, where that has some; else plain
    English ones."""
    return keys_file(folder, DATA / "passkey.json")


def build_text(
    form: LabelledForm, encode: Encode, haystack: np.ndarray, length: int, keys: int, rng: np.random.Generator
) -> KeyedText:
    """`keys` keys at even depths from the start to the end of the haystack's first tokens.

    Raises `InputError` for a haystack that is too short, or a length without room.
    """
    made = KeyMaker(form, encode).make(keys, rng)
    question = max(len(key.question) + len(key.answer) for key in made)
    own = length - question - sum(len(key.sentence) for key in made)
    if own < keys:
        raise InputError(f"{length} tokens have no room for {keys} keys", remedy="Ask for fewer keys")
    if own > len(haystack):
        raise InputError(f"the text has {len(haystack)} tokens; {length} tokens with {keys} keys need {own}")
    places = np.linspace(0, own, keys).astype(int)
    tokens, _ = hidden_in(np.asarray(haystack[:own], dtype=np.int64), made, places.tolist())
    return KeyedText(tokens.tolist(), made)


def measure_retrieval(
    session: Scoring,
    form: LabelledForm,
    encode: Encode,
    haystacks: Sequence[np.ndarray],
    lengths: Sequence[int],
    *,
    keys: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[PasskeyRow]:
    """Keys found at every length and depth; a haystack that is long enough has `keys` keys of its own."""
    rows, steps = [], Steps("texts", progress)
    chosen = {length: [text for text in haystacks if len(text) >= length] or [max(haystacks, key=len)]
              for length in sorted(lengths)}  # fmt: skip
    for length, texts in chosen.items():
        steps.expect(length, len(texts))
    for length, texts in chosen.items():
        hits = np.zeros(keys, dtype=int)
        for number, haystack in enumerate(texts):
            steps.start(f"{length:,} tokens", length)
            text = build_text(form, encode, haystack, length, keys, np.random.default_rng([seed, length, number]))
            hits += [bool(finite(scores, length).preferred.all()) for scores in _scores(session, text)]
        depths = np.linspace(0.0, 1.0, keys).tolist()
        rows += [PasskeyRow(length, int(hit), len(texts), depth) for hit, depth in zip(hits, depths, strict=True)]
    steps.finish()
    return rows


def _scores(session: Scoring, text: KeyedText) -> list[Scores]:
    """Of every answer: behind one reading of the text where the session can, else with a reading for each."""
    rows = [np.concatenate([key.question, key.answer]).tolist() for key in text.keys]
    judged = [len(key.answer) for key in text.keys]
    if "behind" in session.answers:
        return cast("AnswersBehind", session).score_behind(text.prompt, rows, judged)
    return [session.score([text.prompt + row], [count])[0] for row, count in zip(rows, judged, strict=True)]
