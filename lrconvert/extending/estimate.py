# SPDX-License-Identifier: Apache-2.0
"""What the stages of a plan take on the device at hand: time and memory, from passes over two lengths, forward and with
a step of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.extending.calibrating import USUAL
from lrconvert.extending.fitting import demands
from lrconvert.extending.plan import Calibrate, Derive, Evaluate, Plan, Recover, Search, Tune
from lrconvert.extending.stages import MOST_WINDOWS
from lrconvert.precision import ITEM_BYTES
from lrconvert.searching.objective import PARTS
from lrconvert.searching.plan import default_budget
from lrconvert.training.costs import Cost, cache_bytes, forward_cost, pass_cost
from lrconvert.training.rows import window_starts

if TYPE_CHECKING:
    from lrconvert.extending.task import Task
    from lrconvert.training.loaded import LoadedModel

LOADING = 5.0  # seconds that a stage takes before its first pass, beyond what is measured


@dataclass(frozen=True)
class Estimate:
    """Of one stage: seconds, and bytes of memory. `least`: no less than these, as far as shapes alone say it, where
    nothing can be measured (on a CPU); None where they say nothing."""

    name: str
    seconds: float
    memory: int | None
    least: bool = False


@dataclass(frozen=True)
class Around:
    """What a stage's work depends on beside its own options: the original window, those that earlier stages reached,
    and the first beyond it that any stage reaches, in tokens; whether a text can be read once for all its keys (a team
    shares no cache)."""

    window: int
    lower: tuple[int, ...]
    following: int
    cached: bool


Passes = Sequence[tuple[float, float]]  # (tokens, how many)


@dataclass(frozen=True)
class Work:
    """Of a stage: passes forward, passes with a step of training, and the tokens of the longest cache. A stage that has
    both kinds holds a second model, its teacher."""

    forward: Passes
    steps: Passes = ()
    cached: int = 0


def estimate(plan: Plan, task: Task) -> list[Estimate]:
    """Every stage's, in order. Loads the model twice: frozen, and trainable as the first fine-tuning stage has it."""
    forward, step = measured(plan, task)
    cache = cache_bytes(task.model.shape, ITEM_BYTES[task.loading.get("dtype") or "bfloat16"])  # as on a GPU
    least: dict[str, float] = {}
    for demand in demands(plan, task):
        least[demand.stage] = max(demand.bytes, least.get(demand.stage, 0.0))
    found = []
    for name, stage, around in zip(plan.names, plan.stage, _surroundings(plan, task), strict=True):
        work = WORK[type(stage)](stage, around)
        passes, cost = (work.steps, step) if work.steps else (work.forward, forward)
        seconds = LOADING if passes else 0.0
        seconds += sum(count * forward.seconds(tokens) for tokens, count in work.forward)
        seconds += sum(count * step.seconds(tokens) for tokens, count in work.steps)
        memory = cost.memory(max(tokens for tokens, _ in passes)) if passes else None
        if memory is not None:
            memory += cache * work.cached
            memory += (forward.base or 0.0) if work.steps and work.forward else 0.0
        bound = least.get(name) if memory is None else None
        known = bound if memory is None else memory
        found.append(Estimate(name, seconds, None if known is None else int(known), least=bound is not None))
    return found


def _surroundings(plan: Plan, task: Task) -> Iterator[Around]:
    """Of each stage, in order."""
    window, cached = task.model.rotation.original_window, task.loading.get("team", 1) == 1
    lower = [] if task.on is None else [tier.max_length for tier in task.on.recipe.tiers[1:]]
    reached = [stage.window for stage in plan.stage if isinstance(stage, Derive | Search)]
    following = min([*lower, *reached], default=window)
    for stage in plan.stage:
        yield Around(window, tuple(lower), following, cached)
        lower += [stage.window] if isinstance(stage, Derive | Search) else []


# --- the work of each kind of stage ----------------------------------------------------------------------


def _derive(stage: Derive, around: Around) -> Work:
    return Work([])


def _search(stage: Search, around: Around) -> Work:
    budget = stage.budget or default_budget(stage.algorithm, stage.window, around.window)
    row, count = stage.window, stage.documents
    if stage.row_length is not None:
        row, count = stage.row_length, stage.rows * len(PARTS[stage.objective])
    deciding = [] if stage.decide is None else [(float(stage.decide), 2.0 * stage.finalists)]
    return Work([(float(row), float(budget * count)), *deciding])


def _tune(stage: Tune, around: Around) -> Work:
    """Mixed steps keep, in turns, the original window and those between it and the stage's."""
    lower = [length for length in around.lower if length < stage.window]
    mixed = stage.steps // stage.mixed_every if stage.mixed_every else 0
    turn = mixed / (1 + len(lower))
    steps: Passes = [
        (stage.length, (stage.steps - mixed) * stage.rows),
        (around.window, turn * stage.mixed_rows),
        *((min(stage.length, length), turn * stage.rows) for length in lower),
    ]
    return Work(_taught(stage.distil, steps) if stage.distil else [], steps)


def _taught(length: int, steps: Passes) -> Passes:
    """A teacher's, over the same rows: of long ones in windows of `length` that overlap."""
    windows = [(min(length, int(tokens)), int(tokens), count) for tokens, count in steps]
    return [(window, count * len(window_starts(tokens, window))) for window, tokens, count in windows]


def _recover(stage: Recover, around: Around) -> Work:
    rows = stage.documents * min(around.following // around.window, MOST_WINDOWS)
    return Work([(around.window, (stage.budget or default_budget("guided", around.window, around.window)) * rows)])


def _calibrate(stage: Calibrate, around: Around) -> Work:
    return Work([(length, float(USUAL * stage.documents)) for length in stage.lengths])


def _evaluate(stage: Evaluate, around: Around) -> Work:
    passes: Passes = [
        *((length, stage.excerpts) for length in stage.perplexity),
        *([(around.window, stage.excerpts)] if stage.perplexity else []),  # of the model before its extension
        *((length, stage.texts * (1 if around.cached else stage.keys)) for length in stage.retrieval),
        *((length, stage.depths) for length in stage.passkey),
    ]
    return Work(passes, cached=max(stage.retrieval, default=0) if around.cached else 0)


WORK: dict[type, Callable[..., Work]] = {
    Derive: _derive,
    Search: _search,
    Tune: _tune,
    Recover: _recover,
    Calibrate: _calibrate,
    Evaluate: _evaluate,
}


# --- measuring -------------------------------------------------------------------------------------------


def measured(plan: Plan, task: Task) -> tuple[Cost, Cost]:
    """The cost of a forward pass, and of a pass with its gradient in the weights that train."""
    from lrconvert.training.loaded import LoadedModel
    from lrconvert.training.tuning import TuneOptions, load_trainable

    task.say("measuring")
    forward = forward_cost(LoadedModel(task.model, **task.loading))
    tuned = [stage for stage in plan.stage if isinstance(stage, Tune)]
    if not tuned:
        return forward, forward
    first = tuned[0]
    options = TuneOptions(method=first.method, rank=first.rank, projections=first.projections)
    model, _ = load_trainable(task.model, options, **task.loading)
    return forward, pass_cost(model, _step)


def _step(model: LoadedModel, tokens: np.ndarray) -> None:
    model.backward(tokens, np.full((1, tokens.shape[1] - 1), 1.0 / tokens.shape[1]))
    for weight in model.trainable:
        weight.grad = None
