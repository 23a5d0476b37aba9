# SPDX-License-Identifier: Apache-2.0
"""What passes take on the device at hand, from two measured lengths.

A pass over n tokens takes a·n + b·n² seconds: products with weights, and attention. Its memory grows with n. Both are
measured on short rows, and carried over to the lengths that are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lrconvert.training.loaded import LoadedModel

PROBES = {"cpu": (512, 2048), "cuda": (8192, 32768)}  # tokens of the two rows that are measured
REPEATS = 2  # of each; the faster one counts: other work on the machine only slows it down


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


def fitted(lengths: tuple[int, int], seconds: tuple[float, float], memory: tuple[float, float] | None) -> Cost:
    """The cost through two measurements; neither part is negative."""
    (one, two), (fast, slow) = lengths, seconds
    square = max((slow / two - fast / one) / (two - one), 0.0)
    linear = max(slow / two - square * two, 0.0)
    if memory is None:
        return Cost(linear, square)
    each = max((memory[1] - memory[0]) / (two - one), 0.0)
    return Cost(linear, square, memory[0] - each * one, each)


def forward_cost(model: LoadedModel) -> Cost:
    """Of losses, without a gradient."""
    return pass_cost(model, lambda loaded, tokens: loaded.losses(tokens))


def pass_cost(model: LoadedModel, run: Callable[[LoadedModel, np.ndarray], Any]) -> Cost:
    """Of `run` on tokens [1, n]. Memory that it left is given back."""
    import torch

    cuda = model.device.type == "cuda"
    lengths = PROBES[model.device.type]
    seconds, memory = [], []
    for length in lengths:
        tokens = (np.arange(length, dtype=np.int64) % model.vocab)[None]
        run(model, tokens)  # the first one loads what others use
        if cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        seconds.append(min(_seconds(model, run, tokens) for _ in range(REPEATS)))
        if cuda:
            memory.append(float(torch.cuda.max_memory_allocated(model.device)))
    model.free()
    return fitted(lengths, (seconds[0], seconds[1]), (memory[0], memory[1]) if cuda else None)


def _seconds(model: LoadedModel, run: Callable[[LoadedModel, np.ndarray], Any], tokens: np.ndarray) -> float:
    import torch

    started = time.perf_counter()
    run(model, tokens)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started
