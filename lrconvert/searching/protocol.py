# SPDX-License-Identifier: Apache-2.0
"""What an algorithm asks and what an evaluator answers.

An algorithm is a generator: it yields a round of questions, is sent their answers in the same order, and returns when
it has nothing more to ask. It knows nothing of models, devices or journals, so the same seed asks the same questions
wherever they are answered.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lrconvert.searching.objective import Objective
from lrconvert.searching.space import Candidate

# What an evaluation with its gradient costs, in forward passes: 3.36 measured at 64k with frozen weights on an H100.
GRADIENT_COST = 3.4


@dataclass(frozen=True)
class Question:
    """One candidate to evaluate, with the gradient of its loss or without; `made` says how it came to be."""

    candidate: Candidate
    made: str = ""
    gradient: bool = False

    @property
    def cost(self) -> float:
        """In forward equivalents: passes over the objective's documents without a gradient."""
        return GRADIENT_COST if self.gradient else 1.0


@dataclass(frozen=True)
class Answer:
    """The loss in nats a token, infinite where there is none, and what was learnt beside it.

    `losses` are by kind and length (`text@8192`); `gradient` is d loss / d ln λ_i where it was asked for; `error` says
    why a candidate has no loss; `seconds` is what it took.
    """

    loss: float
    losses: dict[str, float] = field(default_factory=dict)
    gradient: tuple[float, ...] | None = None
    error: str | None = None
    seconds: float = 0.0

    @classmethod
    def failed(cls, error: str, seconds: float = 0.0) -> Answer:
        return cls(math.inf, error=error, seconds=seconds)


Round = list[Question]
Algorithm = Generator[Round, Sequence[Answer], None]


class Evaluator(Protocol):
    """Answers questions, in one process or in several that all see the same answers."""

    width: int  # questions that are answered at the same time
    leading: bool  # whether this process writes files and messages

    def answer(self, objective: Objective, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions, the same in every process; at most `width` questions."""
        ...

    def agree(self, value: Any) -> Any:
        """The leading process's value, in every process."""
        ...

    def largest_fitting(self, length: int) -> int:
        """The longest document, in tokens and at most `length`, that fits the memory; 0 when none does."""
        ...

    def describe(self) -> dict[str, Any]:
        """Device, precision, attention kernel and versions: recorded, never compared."""
        ...
