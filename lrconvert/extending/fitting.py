# SPDX-License-Identifier: Apache-2.0
"""Whether a plan's stages can fit the device's memory at all: the least that they need, from shapes alone.

What a stage takes is more than this. A stage that is refused here would fail for certain, minutes into its run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrconvert.errors import EnvironmentFailure
from lrconvert.extending.plan import Calibrate, Derive, Evaluate, Plan, Recover, Search, Stage, Tune
from lrconvert.precision import ITEM_BYTES
from lrconvert.training.costs import cache_bytes, token_bytes, weight_count
from lrconvert.training.devices import default_dtype, device_memory, process_device

if TYPE_CHECKING:
    from lrconvert.extending.task import Task
    from lrconvert.families import ModelShape

OPTIMIZER = 16  # bytes for each number that trains, whatever the model's dtype: float32 copy, its gradient, two moments
SMALLER = "Use shorter lengths in the plan, --shard-weights, or a device with more memory"
GIB = 2**30


@dataclass(frozen=True)
class Demand:
    """The least bytes that a stage needs at the longest length of one of its keys, on one device."""

    stage: str
    key: str
    tokens: int
    fixed: float
    each: float  # a token, on this device

    @property
    def bytes(self) -> float:
        return self.fixed + self.each * self.tokens


def check_memory(plan: Plan, task: Task) -> None:
    """`EnvironmentFailure` for stages that need more memory than the device has, each with its key and what fits.

    Nothing is loaded. Processes of torchrun share rows and weights as `task.machine` says.
    """
    device = process_device(task.machine.get("device"), "an extension")
    has, problems = device_memory(device), []
    for demand in demands(plan, task):
        if demand.bytes > has:
            fits = max(0, int((has - demand.fixed) / demand.each))
            words = f"up to {fits} tokens fit" if fits > 1 else "its weights alone don't fit"
            problems.append(
                f"{demand.stage}.{demand.key} is {demand.tokens}: that takes {demand.bytes / GIB:.1f} GiB or more, and "
                f"{device} has {has / GIB:.1f}; {words}"
            )
    if problems:
        raise EnvironmentFailure(f"plan {plan.name}: " + "; ".join(problems), remedy=SMALLER)


def demands(plan: Plan, task: Task) -> Iterator[Demand]:
    """Of every stage with lengths, and every key of it that holds some."""
    device = process_device(task.machine.get("device"), "an extension")
    size = ITEM_BYTES[task.machine.get("dtype") or default_dtype(device.type, "an extension")]
    team = task.machine.get("context_parallel") or 1
    shared = int(os.environ.get("WORLD_SIZE", "1")) if task.machine.get("shard_weights") else 1
    weights = weight_count(task.model)
    for name, stage in zip(plan.names, plan.stage, strict=True):
        full = isinstance(stage, Tune) and stage.method == "full"
        fixed = weights * (size + (OPTIMIZER if full else 0)) / shared
        fixed += weights * size if isinstance(stage, Tune) and stage.distil else 0  # the teacher, in every process
        for key, (tokens, each) in lengths(stage, task.model.shape, size, team).items():
            yield Demand(name, key, tokens, fixed, each / team)


def lengths(stage: Stage, shape: ModelShape, size: int, team: int = 1) -> dict[str, tuple[int, float]]:
    """Of each key that holds lengths: the longest one in tokens, and the least bytes that a token takes; a team reads
    without a cache."""
    forward = token_bytes(shape, size)
    kept = float(shape.layers * shape.hidden * size)  # for a backward pass that computes all else again
    cache = cache_bytes(shape, size) if team == 1 else 0.0
    match stage:
        case Tune():
            found: dict[str, tuple[Any, float]] = {"length": (stage.length, forward + kept)}
        case Search():
            key = "window" if stage.row_length is None else "row_length"
            found = {key: (getattr(stage, key), forward), "decide": (stage.decide, forward)}
        case Calibrate():
            found = {"lengths": (max(stage.lengths), forward)}
        case Evaluate():
            found = {
                "perplexity": (max(stage.perplexity, default=None), forward),
                "retrieval": (max(stage.retrieval, default=None), forward + cache),
                "passkey": (max(stage.passkey, default=None), forward),
            }
        case Derive() | Recover():
            found = {}
    return {key: (tokens, each) for key, (tokens, each) in found.items() if tokens is not None}
