# SPDX-License-Identifier: Apache-2.0
"""What passes take on the device at hand, from two measured lengths.

A pass over n tokens takes a·n + b·n² seconds: products with weights, and attention. Its memory grows with n. Both are
measured on short rows, and carried over to the lengths that are asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model
    from lrconvert.families import ModelShape
    from lrconvert.training.loaded import LoadedModel

PROBES = {"cpu": (512, 2048), "cuda": (8192, 32768)}  # tokens of the two rows that are measured
# Each is read again and again, so often or so long; the fastest pass counts: other work only slows one down.
REPEATS, ENOUGH = 6, 1.5
# Measured: 0.4 to 0.9 on two cores of a CPU (embedded model, 512 to 16k tokens); 2.5 to 3.2 on an H200 in bf16 (788
# TFLOP/s of products, 250 of cuDNN's and 311 of flash attention).
ATTENTION = (0.5, 4.0)


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


def fitted(
    lengths: tuple[int, int], seconds: tuple[float, float], memory: tuple[float, float] | None, share: float
) -> Cost:
    """The cost through two measurements.

    `share`: operations of attention for those of products, in a pass over one token. Two times that other work has
    disturbed say anything about squares, and long rows multiply it: an operation of attention takes between
    `ATTENTION` times what one of products does, and the longer row's time is kept.
    """
    (one, two), (fast, slow) = lengths, seconds
    square = (slow / two - fast / one) / (two - one)
    linear = slow / two - square * two
    slower = square / (share * linear) if linear > 0 else ATTENTION[1]
    slower = min(max(slower, ATTENTION[0]), ATTENTION[1])
    linear = slow / two / (1 + slower * share * two)
    square = slower * share * linear
    if memory is None:
        return Cost(linear, square)
    each = max((memory[1] - memory[0]) / (two - one), 0.0)
    return Cost(linear, square, memory[0] - each * one, each)


def weight_count(model: Model) -> int:
    """How many numbers a model has."""
    return sum(math.prod(info.shape) for info in model.checkpoint.tensors.values())


def token_bytes(shape: ModelShape, size: int) -> float:
    """The least that a token of a forward pass takes, in a dtype of `size` bytes: hidden states before and after a
    layer, and both inner states of its MLP."""
    return 2.0 * (shape.hidden + shape.ffn) * size


def cache_bytes(shape: ModelShape, size: int) -> float:
    """What the keys and values of a token take, in a dtype of `size` bytes."""
    return 2.0 * shape.layers * shape.kv_heads * shape.head_dim * size


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
        seconds.append(_fastest(model, run, tokens))
        if cuda:
            memory.append(float(torch.cuda.max_memory_allocated(model.device)))
    model.free()
    return fitted(lengths, (seconds[0], seconds[1]), (memory[0], memory[1]) if cuda else None, attention_share(model))


def attention_share(model: LoadedModel) -> float:
    """Operations of attention for those of products, of a pass over one token: causal attention over n tokens takes
    2 · layers · heads · head size · n², products take 2 · parameters · n."""
    config = model.network.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers * heads * size / sum(weight.numel() for weight in model.network.parameters())


def _fastest(model: LoadedModel, run: Callable[[LoadedModel, np.ndarray], Any], tokens: np.ndarray) -> float:
    """In every process the leading one's: those that wait for each other make equally many passes."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH:
        taken.append(model.workers.agree(_seconds(model, run, tokens)))
    return min(taken)


def _seconds(model: LoadedModel, run: Callable[[LoadedModel, np.ndarray], Any], tokens: np.ndarray) -> float:
    """Of one pass. On a CPU its own time on all threads, which other work on the machine hardly changes."""
    import torch

    if model.device.type == "cpu":
        started = time.process_time()
        run(model, tokens)
        return (time.process_time() - started) / torch.get_num_threads()
    started = time.perf_counter()
    run(model, tokens)
    torch.cuda.synchronize(model.device)
    return time.perf_counter() - started
