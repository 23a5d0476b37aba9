# SPDX-License-Identifier: Apache-2.0
"""What a model is fine-tuned on: rows of tokens with their positions, and which of their losses count.

A row is one document: it sees no other, because every row has a forward pass, or a place in a batch, of its own. Four
ingredients, each of which can be turned off:

- *text*: a window of a long text.
- *dense retrieval*: labelled keys hidden in the window, all asked for at its end. Text alone does not teach retrieval.
- *positional skip-wise training* (PoSE, arXiv 2309.10400): positions jump at random places, so that a short row has the
  distances of a long one.
- *mixed windows* (LongRoPE2, arXiv 2502.20082, section 3.4): some steps have rows of the original window under the
  short set, so that the model keeps what it could.

Rows depend on the seed and on the number of their step alone: training goes on after an interruption with the rows that
it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lrconvert.errors import InputError
from lrconvert.training.keys import KeyMaker, Tokens, hidden_in

if TYPE_CHECKING:
    from lrconvert.training.rotation import Rotation

KEY_TOKENS = 40  # more than the sentence and the question of one key together take
OVERLAP = 4  # a teacher's window shows the last fourth of the one before it again: its first tokens know too little
ENDS = 0.5  # share of rows with a key in front of all text, and of rows with one behind it


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens [n], their positions [n], and which losses [n − 1] (entry t is of token t + 1) are of text and of
    answers."""

    tokens: Tokens
    positions: Tokens
    text: NDArray[np.bool_]
    answers: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class StepRows:
    """The rows of one step, all under one rotation."""

    rotation: Rotation
    rows: tuple[Row, ...]
    kind: str = "long"  # for the log


@dataclass(frozen=True)
class RowOptions:
    """How rows are made.

    `length`: tokens of a row. `span`: positions that its jumps may reach. `jumps`: the least and the most of them;
    (0, 0) for consecutive positions. `keys`: the most labelled keys of a row; 0 for text alone.
    """

    length: int
    span: int
    jumps: tuple[int, int] = (0, 0)
    keys: int = 0


def make_row(texts: Sequence[Tokens], options: RowOptions, keys: KeyMaker | None, rng: np.random.Generator) -> Row:
    """A row of exactly `options.length` tokens. Raises `InputError` where every text is too short."""
    count = min(options.keys, options.length // (2 * KEY_TOKENS))  # half of a short row stays text
    made = keys.make(count, rng) if keys is not None and count else []
    asked = [made[index] for index in rng.permutation(len(made))]
    tail = [part for key in asked for part in (key.question, key.answer, key.end)]
    behind = sum(map(len, tail))
    window = _window(texts, options.length - behind - sum(len(key.sentence) for key in made), rng)
    places = key_places(len(window), len(made), rng)
    tokens, own = hidden_in(window, made, places.tolist())
    answers = np.zeros(options.length, bool)
    at = len(tokens)
    for key in asked:
        answers[at + len(key.question) : at + len(key.question) + len(key.answer)] = True
        at += len(key.question) + len(key.answer) + len(key.end)
    tokens = np.concatenate([tokens, *tail])
    text = np.concatenate([own, np.zeros(behind, bool)])
    return Row(tokens, jumping_positions(options, rng), text[1:], answers[1:])


def key_places(length: int, count: int, rng: np.random.Generator) -> Tokens:
    """How many of a text's tokens stand before each of `count` keys, in order.

    Places are even but for the ends: a key with nothing in front of it is a case of its own, which even places never
    show.
    """
    places = rng.integers(0, length + 1, count)
    if count > 1:
        places[0] = 0 if rng.random() < ENDS else places[0]
        places[1] = length if rng.random() < ENDS else places[1]
    return np.sort(places)


def jumping_positions(options: RowOptions, rng: np.random.Generator) -> Tokens:
    """0 … n − 1 with jumps forward at random places, the last position below `options.span`; shape [n].

    How far the jumps lead is spread evenly over the span, and what would lead beyond it ends there: otherwise the
    longest distances, which only the very largest jumps reach, would hardly occur.
    """
    positions = np.arange(options.length, dtype=np.int64)
    least, most = options.jumps
    count, room = int(rng.integers(least, most + 1)), options.span - options.length
    if count and room > 0:
        # Sorted, because what was jumped over stays behind.
        offsets = np.sort(rng.integers(0, options.span, count)).clip(max=room)
        places = np.sort(rng.choice(np.arange(1, options.length), count, replace=False))
        positions += np.concatenate([[0], offsets])[np.searchsorted(places, positions, side="right")]
    return positions


def window_starts(count: int, window: int) -> list[int]:
    """Where a teacher's windows begin: every one of `count` tokens is in one, behind a fourth of a window or behind all
    that the row has before it."""
    step = max(window - window // OVERLAP, 1)
    return [*range(0, count - window, step), count - window]


def _window(texts: Sequence[Tokens], length: int, rng: np.random.Generator) -> Tokens:
    """`length` consecutive tokens of a text; every place of every text is equally likely."""
    rooms = np.array([max(len(text) - length + 1, 0) for text in texts], dtype=np.int64)
    if length < 1 or not rooms.sum():
        longest = max((len(text) for text in texts), default=0)
        raise InputError(
            f"a row needs {length} tokens of text; the longest has {longest}", remedy="Use longer texts or shorter rows"
        )
    at = int(rng.integers(rooms.sum()))
    chosen = int(np.searchsorted(np.cumsum(rooms), at, side="right"))
    start = at - int(rooms[:chosen].sum())
    return texts[chosen][start : start + length]
