# SPDX-License-Identifier: Apache-2.0
"""A model in memory under the tiers of a recipe: it scores as a session does, so evaluations need no artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lrconvert.rope import Tier, serving
from lrconvert.runtimes.base import Scores
from lrconvert.training.cached import Prefilled
from lrconvert.training.loaded import LoadedModel


class LoadedSession:
    """`tiers` in order; a row of n tokens has the first that reaches n. A team shares no cache, which one process may
    not have the memory for: it answers nothing behind a text."""

    def __init__(self, model: LoadedModel, tiers: Sequence[Tier]) -> None:
        self.model, self.tiers = model, tuple(tiers)
        self.answers: frozenset[str] = frozenset(("behind",) if model.workers.team == 1 else ())
        self.info: dict[str, Any] = {**model.describe(), "class": type(model.network).__name__}

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        found = []
        for row, count in zip(rows, judged, strict=True):
            tokens = np.asarray(row, dtype=np.int64)
            self.model.rotation = serving(self.tiers, len(tokens))
            found.append(Scores(*self.model.scores(tokens, count)))
        return found

    def score_behind(self, prompt: Sequence[int], rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        """As `score` of the prompt with each row behind it; the prompt is read once."""
        self.model.rotation = serving(self.tiers, len(prompt) + max(map(len, rows)))
        cached = Prefilled(self.model, np.asarray(prompt, dtype=np.int64))
        pairs = zip(rows, judged, strict=True)
        return [Scores(*cached.score(np.asarray(row, dtype=np.int64), count)) for row, count in pairs]
