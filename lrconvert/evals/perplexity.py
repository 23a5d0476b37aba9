# SPDX-License-Identifier: Apache-2.0
"""Perplexity of long documents, at several lengths of context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.errors import InputError
from lrconvert.evals.figures import Figure, perplexity_figure
from lrconvert.runtimes.base import Session

JUDGED = 1024  # tokens whose loss counts: the same ones at every length
WINDOWS = 4
CLUSTER = 64  # judged tokens that are resampled together
PROTOCOL = (
    "perplexity of the same last {judged} tokens of each window, seen at the end of a context of every length: what "
    "differs between lengths is the context alone"
)

Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class PerplexityRow:
    """One length: the figure, and how many tokens of how many windows were judged."""

    length: int
    perplexity: Figure
    tokens: int
    windows: int


def same_token_losses(session: Session, tokens: Tokens, length: int, judged: int = JUDGED) -> np.ndarray:
    """Losses (nats) of the last `judged` of `tokens`, seen at the end of a context of `length` tokens."""
    if length > len(tokens) or judged >= length:
        raise InputError(f"a text of {len(tokens)} tokens can't be judged at {length} with {judged} judged tokens")
    window = np.asarray(tokens[-length:], dtype=np.int64)
    (scores,) = session.score([window.tolist()], [judged])
    return scores.losses


def same_token_perplexity(session: Session, tokens: Tokens, length: int, judged: int = JUDGED) -> float:
    """Perplexity of the document's last `judged` tokens, seen at the end of a context of `length` tokens.

    The judged tokens do not depend on the length, so what differs between lengths is the context alone:
    a model that can use, or at least stand, a longer context does not get worse.
    """
    return float(np.exp(same_token_losses(session, tokens, length, judged).mean()))


def measure_perplexity(
    session: Session,
    documents: Sequence[Tokens],
    lengths: Sequence[int],
    *,
    judged: int = JUDGED,
    windows: int = WINDOWS,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[PerplexityRow]:
    """Same-token perplexity at every length, over windows that end at the same places at all of them.

    Raises `InputError` when no document is as long as the longest length.
    """
    ends = window_ends([len(document) for document in documents], max(lengths), windows)
    rows = []
    for length in sorted(lengths):
        kept = min(judged, min(lengths) - 1)
        parts: list[np.ndarray] = []
        for number, (document, end) in enumerate(ends):
            if progress is not None:
                progress(f"{length} tokens, window {number + 1} of {len(ends)}")
            found = same_token_losses(session, documents[document][:end], length, kept)
            parts += np.array_split(found, max(1, kept // CLUSTER))
        figure = perplexity_figure(parts, seed)
        rows.append(PerplexityRow(length, figure, sum(map(len, parts)), len(ends)))
    return rows


def window_ends(lengths: Sequence[int], longest: int, windows: int) -> list[tuple[int, int]]:
    """Document and end of each window: as far apart as the documents allow, and no more of them than fit without
    sharing judged tokens."""
    long_enough = [(index, length) for index, length in enumerate(lengths) if length >= longest]
    if not long_enough:
        raise InputError(
            f"the longest text has {max(lengths, default=0)} tokens; {longest} are asked for",
            remedy="Give longer texts, or ask for shorter --lengths",
        )
    found = []
    for place, (index, length) in enumerate(long_enough):
        share = windows // len(long_enough) + (place < windows % len(long_enough))
        room = 1 + (length - longest) // JUDGED
        count = min(share, room)
        found += [(index, int(end)) for end in np.linspace(length, longest, count).astype(int)] if count else []
    return found
