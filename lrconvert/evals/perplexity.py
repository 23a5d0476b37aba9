# SPDX-License-Identifier: Apache-2.0
"""Perplexity of long documents, at several lengths of context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lrconvert.errors import InputError
from lrconvert.evals.figures import Figure, perplexity_figure
from lrconvert.evals.protocols import JUDGED, Plan
from lrconvert.progress import Progress, Steps
from lrconvert.runtimes.base import Scores, Scoring

CLUSTER = 64  # judged tokens that are resampled together

Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class PerplexityRow:
    """One length: the figure, over how many tokens of how many excerpts, and by which protocol."""

    length: int
    perplexity: Figure
    tokens: int
    excerpts: int
    protocol: str  # a name of `protocols.PROTOCOLS`

    def to_json(self) -> dict[str, Any]:
        """Results call the excerpts `windows`."""
        values = asdict(self)
        return {"windows" if key == "excerpts" else key: value for key, value in values.items()}


def same_token_perplexity(session: Scoring, tokens: Tokens, length: int, judged: int = JUDGED) -> float:
    """Perplexity of the document's last `judged` tokens at the end of a context of `length` tokens.

    The judged tokens are the same at every length, so only the context differs: a model that copes with a longer
    context does not get worse.
    """
    if length > len(tokens) or judged >= length:
        raise InputError(f"a text of {len(tokens)} tokens can't be scored at {length} with {judged} scored tokens")
    return float(np.exp(_losses(session, tokens[-length:], judged).mean()))


def measure_perplexity(
    session: Scoring,
    texts: Sequence[Tokens],
    plan: Plan,
    *,
    only: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[PerplexityRow]:
    """Perplexity at every length of the plan, or at those of them that are named by `only`; shortest first.

    Raises `InputError` when no text is long enough, or the model's losses are not numbers.
    """
    rows, steps = [], Steps("passes", progress)
    passes = {length: plan.contexts([len(text) for text in texts], length) for length in sorted(only or plan.lengths)}
    for length, contexts in passes.items():
        steps.expect(length, len(contexts))
    for length, contexts in passes.items():
        parts: list[np.ndarray] = []
        for context in contexts:
            steps.start(f"{length:,} tokens", length)
            found = _losses(session, texts[context.text][context.start : context.end], context.judged)
            parts += np.array_split(found, max(1, context.judged // CLUSTER))
        figure = perplexity_figure(parts, seed)
        excerpts = len({context.excerpt for context in contexts})
        rows.append(PerplexityRow(length, figure, sum(map(len, parts)), excerpts, plan.protocol(length).name))
    steps.finish()
    return rows


def _losses(session: Scoring, tokens: Tokens, judged: int) -> np.ndarray:
    """Losses (nats) of the last `judged` of `tokens`."""
    row = np.asarray(tokens, dtype=np.int64).tolist()
    (scores,) = session.score([row], [judged])
    return finite(scores, len(row)).losses


def finite(scores: Scores, length: int) -> Scores:
    """The scores of a row. Raises `InputError` where they are not numbers: the model is broken."""
    if not np.isfinite(scores.losses).all():
        raise InputError(f"the model's losses in a context of {length} tokens are not all numbers (nan or infinity)")
    return scores
