# SPDX-License-Identifier: Apache-2.0
"""Losses of candidates on an objective, from a model in memory. The only module of the search that imports torch.

Started by torchrun, every process answers its share of the questions, and all of them see all answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lrconvert.searching.objective import Document, Objective
from lrconvert.searching.protocol import Answer, Question
from lrconvert.shortage import is_shortage
from lrconvert.training.loaded import LoadedModel

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}  # tokens in a forward pass: short documents share one


class TransformersEvaluator:
    """A model, asked for the losses of candidates. See `protocol.Evaluator`; `options` are those of `LoadedModel`."""

    def __init__(self, model: Model, **options: Any) -> None:
        self.model = LoadedModel(model, **options)
        self._workers = self.model.workers
        self.width, self.leading = self._workers.width, self._workers.rank == 0

    def answer(self, objective: Objective, questions: Sequence[Question]) -> list[Answer]:
        """Every team answers one question; then every process has all answers."""
        if len(questions) > self.width:
            raise ValueError(f"{len(questions)} questions for {self.width} teams")
        if self._workers.together and len({question.gradient for question in questions}) > 1:
            raise ValueError("processes that wait for each other can't do different things")
        index = self._workers.own(len(questions))
        own = None if index is None else self._one(objective, questions[index])
        return self._workers.gather(own, len(questions))

    def agree(self, value: Any) -> Any:
        return self._workers.agree(value)

    def largest_fitting(self, length: int) -> int:
        return self.model.largest_fitting(length)

    def describe(self) -> dict[str, Any]:
        return self.model.describe()

    def _one(self, objective: Objective, question: Question) -> Answer:
        """A candidate that fails costs itself alone. A gradient that doesn't fit is made again in less memory."""
        started = time.perf_counter()
        try:
            return self._evaluate(objective, question, started)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            message = str(error).partition("\n")[0]
        self.model.free()
        if question.gradient and not self.model.recompute:
            self.model.recompute = True
            return self._one(objective, question)
        return Answer.failed(f"out of memory: {message}", time.perf_counter() - started)

    def _evaluate(self, objective: Objective, question: Question, started: float) -> Answer:
        self.model.rotation = objective.rotation(question.candidate, objective.length)
        found: list[np.ndarray] = [np.empty(0)] * len(objective.documents)
        total = np.zeros(len(question.candidate.steps))
        for batch in batches(objective.documents, BATCH_TOKENS[self.model.device.type]):
            documents = [objective.documents[index] for index in batch]
            tokens, judged = np.stack([document.tokens for document in documents]), judged_range(documents)
            at = None if documents[0].positions is None else np.stack([_positions(document) for document in documents])
            if question.gradient:
                weights = np.stack([objective.token_weights(index) for index in batch])
                losses, gradient = self.model.losses_and_gradient(tokens, weights, judged, at)
                total += gradient
            else:
                losses = self.model.losses(tokens, judged, at)
            for index, row in zip(batch, losses, strict=True):
                found[index] = row
        loss, losses_by_length = objective.score(found)
        seconds = time.perf_counter() - started
        if not math.isfinite(loss) or not np.isfinite(total).all():
            return Answer.failed("the loss is not a number", seconds)
        gradient = tuple(total.tolist()) if question.gradient else None
        return Answer(loss, losses_by_length, gradient, None, seconds)


def _positions(document: Document) -> np.ndarray:
    return np.arange(len(document.tokens)) if document.positions is None else document.positions


def judged_range(documents: Sequence[Document]) -> tuple[int, int]:
    """From the first to the last loss that any of the documents needs."""
    ranges = [document.judged for document in documents]
    return min(first for first, _ in ranges), max(end for _, end in ranges)


def batches(documents: Sequence[Document], tokens: int) -> list[list[int]]:
    """Indices of documents of equal length that share a forward pass. It depends on nothing else, so that a loss is
    the same whatever is evaluated beside it."""
    made: list[list[int]] = []
    for index, document in enumerate(documents):
        length = len(document.tokens)
        last = made[-1] if made else []
        alike = last and _kind(documents[last[0]]) == _kind(document)
        if alike and (len(last) + 1) * length <= tokens:
            last.append(index)
        else:
            made.append([index])
    return made


def _kind(document: Document) -> tuple[int, bool]:
    """What documents that share a forward pass have in common."""
    return len(document.tokens), document.positions is None
