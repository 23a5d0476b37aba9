# SPDX-License-Identifier: Apache-2.0
"""What the stages of a plan take on the device at hand: time and memory, from two measured lengths.

A pass over n tokens takes a·n + b·n² seconds: products with weights, and attention. Its memory grows with n. Both are
measured on short rows, forward and with a step of training, and carried over to the lengths of the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.extending.plan import Derive, Evaluate, Plan, Recover, Search, Tune
from lrconvert.searching.objective import PARTS
from lrconvert.searching.plan import default_budget

if TYPE_CHECKING:
    from lrconvert.extending.task import Task
    from lrconvert.training.loaded import LoadedModel

PROBES = {"cpu": (512, 2048), "cuda": (8192, 32768)}  # tokens of the two rows that are measured
LOADING = 5.0  # seconds that a stage takes before its first pass, beyond what is measured


@dataclass(frozen=True)
class Cost:
    """Of a pass: seconds a·n + b·n², and bytes base + each·n (None on a CPU)."""

    linear: float
    square: float
    base: float | None = None
    each: float = 0.0

    def seconds(self, tokens: float) -> float:
        return self.linear * tokens + self.square * tokens**2

    def memory(self, tokens: float) -> float | None:
        return None if self.base is None else self.base + self.each * tokens


@dataclass(frozen=True)
class Estimate:
    """Of one stage: seconds, and bytes of the GPU's memory (None on a CPU)."""

    name: str
    seconds: float
    memory: int | None


def fitted(lengths: tuple[int, int], seconds: tuple[float, float], memory: tuple[float, float] | None) -> Cost:
    """The cost through two measurements; neither part is negative."""
    (one, two), (fast, slow) = lengths, seconds
    square = max((slow / two - fast / one) / (two - one), 0.0)
    linear = max(slow / two - square * two, 0.0)
    if memory is None:
        return Cost(linear, square)
    each = max((memory[1] - memory[0]) / (two - one), 0.0)
    return Cost(linear, square, memory[0] - each * one, each)


def estimate(plan: Plan, task: Task) -> list[Estimate]:
    """Every stage's, in order. Loads the model twice: frozen, and trainable as the first fine-tuning stage has it."""
    forward, step = measured(plan, task)
    window, found = task.model.rotation.original_window, []
    for name, stage in zip(plan.names, plan.stage, strict=True):
        passes = PASSES[type(stage)](stage, window)
        cost = step if isinstance(stage, Tune) else forward
        longest = max((tokens for tokens, _ in passes), default=1.0)
        seconds = sum(count * cost.seconds(tokens) for tokens, count in passes)
        memory = cost.memory(longest) if passes else None
        found.append(Estimate(name, seconds + (LOADING if passes else 0.0), None if memory is None else int(memory)))
    return found


# --- passes of each kind of stage: (tokens, how many) ----------------------------------------------------

Passes = list[tuple[float, float]]


def _search(stage: Search, window: int) -> Passes:
    budget = stage.budget or default_budget(stage.algorithm, stage.window, window)
    row, count = stage.window, stage.documents
    if stage.row_length is not None:
        row, count = stage.row_length, stage.rows * len(PARTS[stage.objective])
    deciding = [] if stage.decide is None else [(float(stage.decide), 2.0 * stage.finalists)]
    return [(float(row), float(budget * count)), *deciding]


def _tune(stage: Tune, window: int) -> Passes:
    mixed = stage.steps // stage.mixed_every if stage.mixed_every else 0
    return [(stage.length, (stage.steps - mixed) * stage.rows), (window, mixed * stage.mixed_rows)]


def _recover(stage: Recover, window: int) -> Passes:
    return [(window, (stage.budget or default_budget("guided", window, window)) * stage.documents)]


def _evaluate(stage: Evaluate, window: int) -> Passes:
    return [
        *((length, stage.excerpts) for length in stage.perplexity),
        *([(window, stage.excerpts)] if stage.perplexity else []),  # of the model before its extension
        *((length, stage.texts) for length in stage.retrieval),
        *((length, stage.depths) for length in stage.passkey),
    ]


PASSES: dict[type, Callable[[Any, int], Passes]] = {
    Derive: lambda stage, window: [],
    Search: _search,
    Tune: _tune,
    Recover: _recover,
    Evaluate: _evaluate,
}


# --- measuring -------------------------------------------------------------------------------------------


def measured(plan: Plan, task: Task) -> tuple[Cost, Cost]:
    """The cost of a forward pass, and of a pass with its gradient in the weights that train."""
    from lrconvert.training.loaded import LoadedModel
    from lrconvert.training.tuning import TuneOptions, load_trainable

    task.say("measuring")
    forward = _cost(LoadedModel(task.model, **task.loading), lambda model, tokens: model.losses(tokens))
    tuned = [stage for stage in plan.stage if isinstance(stage, Tune)]
    if not tuned:
        return forward, forward
    model, _ = load_trainable(task.model, TuneOptions(method=tuned[0].method, rank=tuned[0].rank), **task.loading)
    return forward, _cost(model, _step)


def _step(model: LoadedModel, tokens: np.ndarray) -> None:
    model.backward(tokens, np.full((1, tokens.shape[1] - 1), 1.0 / tokens.shape[1]))
    for weight in model.trainable:
        weight.grad = None


def _cost(model: LoadedModel, run: Callable[[LoadedModel, np.ndarray], Any]) -> Cost:
    import torch

    cuda = model.device.type == "cuda"
    lengths = PROBES[model.device.type]
    seconds, memory = [], []
    for length in lengths:
        tokens = (np.arange(length, dtype=np.int64) % model.vocab)[None]
        run(model, tokens)
        if cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        started = time.perf_counter()
        run(model, tokens)
        if cuda:
            torch.cuda.synchronize(model.device)
            memory.append(float(torch.cuda.max_memory_allocated(model.device)))
        seconds.append(time.perf_counter() - started)
    model.free()
    return fitted(lengths, (seconds[0], seconds[1]), (memory[0], memory[1]) if cuda else None)
