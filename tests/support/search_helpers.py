# SPDX-License-Identifier: Apache-2.0
"""What the tests of the search share: landscapes whose optimum is known, and one made from a real search's journal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrconvert.searching.objective import Document, Objective
from lrconvert.searching.protocol import Algorithm, Answer, Question
from lrconvert.searching.space import Candidate, Space, space_for

JOURNAL = Path(__file__).resolve().parents[3] / "shared" / "search" / "evolution-journal-smollm2-64k.json"
Loss = Callable[[Candidate], float]
# An objective for evaluators that don't look at it.
NOTHING = Objective("perplexity", (Document("text", np.zeros(8, dtype=np.int64), ((8, 0, 7),)),), {8: 1.0})


def small_space(**changes: Any) -> Space:
    """Eight frequencies, 8x."""
    return space_for(16, 10000.0, 64, 512, **changes)


def planted(space: Space, start_tokens: int = 0) -> tuple[Candidate, Loss]:
    """A candidate and a loss that is lowest there: 2 nats, and more with the distance in ln λ, in n̂ and in the
    attention factor."""
    top = math.log(space.bounds[1] / 100)
    curve = 1 / (1 + np.exp(-12 * (np.linspace(0.0, 1.0, space.size) - 0.55)))
    optimum = space.make(np.exp(0.9 * top * curve), start_tokens, sum(space.attention) / 2)

    def loss(candidate: Candidate) -> float:
        away = np.log(np.asarray(candidate.steps) / np.asarray(optimum.steps))
        starts = abs(math.log2(1 + candidate.start_tokens) - math.log2(1 + optimum.start_tokens))
        factor = (candidate.attention_factor - optimum.attention_factor) * 10
        return 2.0 + float(np.mean(away**2)) + 0.02 * starts + factor**2

    return optimum, loss


@dataclass
class Landscape:
    """An evaluator of a function; gradients by differences. `fail` names evaluations, by number, without a loss."""

    loss: Loss
    fail: dict[int, str] = field(default_factory=dict)
    width: int = 1
    leading: bool = True
    fits: int = 0
    asked: list[Question] = field(default_factory=list)

    def answer(self, objective: Objective, questions: Sequence[Question]) -> list[Answer]:
        return [self._one(question) for question in questions]

    def _one(self, question: Question) -> Answer:
        self.asked.append(question)
        if error := self.fail.get(len(self.asked), self.fail.get(0)):
            return Answer.failed(error)
        value = self.loss(question.candidate)
        gradient = tuple(self._slopes(question.candidate)) if question.gradient else None
        return Answer(value, {"text@8": value}, gradient, None, 0.5)

    def _slopes(self, candidate: Candidate) -> list[float]:
        def moved(index: int, by: int) -> Candidate:
            steps = list(candidate.steps)
            steps[index] += by
            return Candidate(tuple(steps), candidate.start_tokens, candidate.attention_factor, candidate.critical)

        return [
            (self.loss(moved(index, 1)) - self.loss(moved(index, -1))) / math.log((step + 1) / (step - 1))
            for index, step in enumerate(candidate.steps)
        ]

    def agree(self, value: Any) -> Any:
        return value

    def largest_fitting(self, length: int) -> int:
        return self.fits

    def describe(self) -> dict[str, Any]:
        return {"device": "none", "attention": None}


def drive(algorithm: Algorithm, landscape: Landscape, budget: float) -> list[tuple[float, float, Candidate]]:
    """Cost so far, loss and candidate of every evaluation that the budget (forward equivalents) pays for."""
    spent, found = 0.0, []
    questions = next(algorithm, None)
    while questions:
        answers = landscape.answer(NOTHING, questions)
        for question, answer in zip(questions, answers, strict=True):
            spent += question.cost
            if spent <= budget:
                found.append((spent, answer.loss, question.candidate))
        if spent >= budget:
            return found
        try:
            questions = algorithm.send(answers)
        except StopIteration:
            return found
    return found


def best_at(found: Sequence[tuple[float, float, Candidate]], cost: float) -> float:
    return min((loss for spent, loss, _ in found if spent <= cost), default=math.inf)


def cost_to_reach(found: Sequence[tuple[float, float, Candidate]], loss: float) -> float:
    return next((spent for spent, value, _ in found if value <= loss), math.inf)


@dataclass(frozen=True)
class RealJournal:
    """A recorded search: SmolLM2-135M, 8k to 64k, 707 sets. `losses` in the order of evaluation."""

    space: Space
    losses: np.ndarray[Any, Any]
    factors: np.ndarray[Any, Any]  # [707, 32]

    def best(self, count: int) -> float:
        return float(self.losses[:count].min())

    def surrogate(self) -> Loss:
        """What a Gaussian process makes of all recorded sets: a landscape like the real one, without its model."""
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, WhiteKernel

        floor = self.losses.min() - 0.03
        values = np.log(self.losses - floor)
        mean, spread = values.mean(), values.std()
        regressor: Any = GaussianProcessRegressor
        process = regressor(RBF(1.0) + WhiteKernel(0.01), optimizer=None)
        process.fit(np.log(self.factors), (values - mean) / spread)
        known: dict[tuple[int, ...], float] = {}

        def loss(candidate: Candidate) -> float:
            if candidate.steps not in known:
                predicted: Any = process.predict(np.log(np.array([candidate.steps]) / 100))
                known[candidate.steps] = float(np.exp(predicted[0] * spread + mean) + floor)
            return known[candidate.steps]

        return loss


def read_real_journal() -> RealJournal:
    if not JOURNAL.is_file():
        pytest.skip("the journal of a real search (../shared/search) is not on this machine")
    rows = json.loads(JOURNAL.read_text())["rows"]
    space = space_for(64, 100000.0, 8192, 65536)
    return RealJournal(space, np.array([row[0] for row in rows]), np.array([row[3] for row in rows]) / 100)
