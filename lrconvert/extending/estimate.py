# SPDX-License-Identifier: Apache-2.0
"""What the stages of a plan take on the device at hand: time and memory, from passes over two lengths, forward and with
a step of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.extending.calibrating import USUAL
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
    """Of one stage: seconds, and bytes of the GPU's memory (None on a CPU)."""

    name: str
    seconds: float
    memory: int | None


def estimate(plan: Plan, task: Task) -> list[Estimate]:
    """Every stage's, in order. Loads the model twice: frozen, and trainable as the first fine-tuning stage has it."""
    forward, step = measured(plan, task)
    window, found = task.model.rotation.original_window, []
    lower = [] if task.on is None else [tier.max_length for tier in task.on.recipe.tiers[1:]]
    reached = [stage.window for stage in plan.stage if isinstance(stage, Derive | Search)]
    following = min([*lower, *reached], default=window)
    cached = task.loading.get("team", 1) == 1  # a team shares no cache: it reads a text anew for every key
    cache = cache_bytes(task.model.shape, ITEM_BYTES[task.loading.get("dtype") or "bfloat16"])  # as on a GPU
    for name, stage in zip(plan.names, plan.stage, strict=True):
        if isinstance(stage, Tune):
            passes = _tune(stage, window, [length for length in lower if length < stage.window])
        elif isinstance(stage, Evaluate):
            passes = _evaluate(stage, window, cached)
        else:
            passes = PASSES[type(stage)](stage, window, following)
        taught = _taught(stage, passes) if isinstance(stage, Tune) else []
        cost = step if isinstance(stage, Tune) else forward
        seconds = sum(count * cost.seconds(tokens) for tokens, count in passes)
        seconds += sum(count * forward.seconds(tokens) for tokens, count in taught)
        memory = cost.memory(max((tokens for tokens, _ in passes), default=1.0)) if passes else None
        if memory is not None:
            memory += (forward.base or 0.0) if taught else 0.0  # the teacher is one more copy
            memory += cache * max(stage.retrieval, default=0) if isinstance(stage, Evaluate) and cached else 0.0
        found.append(Estimate(name, seconds + (LOADING if passes else 0.0), None if memory is None else int(memory)))
        lower += [stage.window] if isinstance(stage, Derive | Search) else []
    return found


# --- passes of each kind of stage: (tokens, how many) ----------------------------------------------------

Passes = list[tuple[float, float]]


def _search(stage: Search, window: int, following: int) -> Passes:
    budget = stage.budget or default_budget(stage.algorithm, stage.window, window)
    row, count = stage.window, stage.documents
    if stage.row_length is not None:
        row, count = stage.row_length, stage.rows * len(PARTS[stage.objective])
    deciding = [] if stage.decide is None else [(float(stage.decide), 2.0 * stage.finalists)]
    return [(float(row), float(budget * count)), *deciding]


def _tune(stage: Tune, window: int, lower: Sequence[int]) -> Passes:
    """`lower`: windows between the original one and the stage's, which mixed steps keep in turns with that."""
    mixed = stage.steps // stage.mixed_every if stage.mixed_every else 0
    turn = mixed / (1 + len(lower))
    return [
        (stage.length, (stage.steps - mixed) * stage.rows),
        (window, turn * stage.mixed_rows),
        *((min(stage.length, length), turn * stage.rows) for length in lower),
    ]


def _taught(stage: Tune, passes: Passes) -> Passes:
    """A teacher's, over the same rows: of long ones in windows that overlap."""
    if not stage.distil:
        return []
    windows = [(min(stage.distil, int(tokens)), int(tokens), count) for tokens, count in passes]
    return [(window, count * len(window_starts(tokens, window))) for window, tokens, count in windows]


def _recover(stage: Recover, window: int, following: int) -> Passes:
    rows = stage.documents * min(following // window, MOST_WINDOWS)
    return [(window, (stage.budget or default_budget("guided", window, window)) * rows)]


def _calibrate(stage: Calibrate, window: int, following: int) -> Passes:
    return [(length, float(USUAL * stage.documents)) for length in stage.lengths]


def _evaluate(stage: Evaluate, window: int, cached: bool) -> Passes:
    return [
        *((length, stage.excerpts) for length in stage.perplexity),
        *([(window, stage.excerpts)] if stage.perplexity else []),  # of the model before its extension
        *((length, stage.texts * (1 if cached else stage.keys)) for length in stage.retrieval),
        *((length, stage.depths) for length in stage.passkey),
    ]


PASSES: dict[type, Callable[..., Passes]] = {
    Derive: lambda stage, window, following: [],
    Search: _search,
    Recover: _recover,
    Calibrate: _calibrate,
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
