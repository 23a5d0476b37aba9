# SPDX-License-Identifier: Apache-2.0
"""The score of a benchmark: over all questions, and each question's own, as one string in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lrconvert.evals.figures import Figure


@dataclass(frozen=True)
class BenchmarkRow:
    """One benchmark: its score over all questions with lm-eval's standard error, every question's own score, and the
    SHA-256 of all that was asked, which tells whether two results may be compared."""

    task: str
    metric: str
    shots: int
    score: Figure
    stderr: float
    scores: tuple[float, ...]
    prompts_sha256: str

    def to_json(self) -> dict[str, Any]:
        """With the scores of all questions as one string."""
        return asdict(self) | {"questions": len(self.scores), "scores": pack(self.scores)}


def pack(scores: Sequence[float]) -> str:
    """Scores of questions as one string: in JSON a list would have a line a question."""
    return " ".join(f"{round(score, 6):g}" for score in scores)


def unpack(packed: str) -> list[float]:
    """Raises `ValueError` for what is no score: all are shares, and so is what this evaluation writes."""
    found = [float(score) for score in packed.split()]
    if any(not 0 <= score <= 1 for score in found):  # nor nan
        raise ValueError("a score is not between 0 and 1")
    return found
