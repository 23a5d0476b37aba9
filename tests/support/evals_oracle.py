# SPDX-License-Identifier: Apache-2.0
"""A session whose answers are known, for tests of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lrconvert.runtimes.base import Scores, score_by_logits

VOCAB = 4096


class Oracle:
    """A session that knows what comes next (or, `blind`, prefers token 0 always; `slips`: at the last place asked)."""

    answers: frozenset[str] = frozenset()

    def __init__(self, *, blind: bool = False, slips: bool = False, sharpness: float = 20.0) -> None:
        self.info: dict[str, Any] = {}
        self.blind, self.slips, self.sharpness = blind, slips, sharpness
        self.asked: list[Sequence[int]] = []

    def logits(
        self, rows: Sequence[Sequence[int]], *, positions: Sequence[int] | None = None, keep: Sequence[int]
    ) -> list[np.ndarray]:
        (row,) = rows
        self.asked.append(row)
        out = np.zeros((len(keep), VOCAB))
        for at, index in enumerate(keep):
            wrong = self.blind or (self.slips and index == keep[-1])
            out[at, 0 if wrong else row[index + 1]] = self.sharpness
        return [out]

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        return score_by_logits(self, rows, judged)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
        raise AssertionError("evaluations use forward passes")

    def close(self) -> None: ...
