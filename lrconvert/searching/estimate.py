# SPDX-License-Identifier: Apache-2.0
"""How fast the device at hand does what a search does: floating-point operations a second, measured on a short row.

Time is then a matter of counting (`searching.plan.costs`). Attention runs at another rate than products with weights
and has a larger share of longer rows: the estimate is good to a factor of about two.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.precision import long_name
from lrconvert.searching.plan import SearchPlan, operations
from lrconvert.training.devices import computing_threads, default_dtype

if TYPE_CHECKING:
    from lrconvert.training.loaded import LoadedModel

SHORTEST = 512  # tokens of the first row; each further one has twice as many
ENOUGH = 0.3  # seconds of a row that says how fast a device is, and not what starting costs


@dataclass(frozen=True)
class Speed:
    """Of a device, named: operations a second."""

    device: str
    rate: float


def measured_speed(
    plan: SearchPlan, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
) -> Speed:
    """Loads the model and reads rows for a second or two. `device`, `dtype`, `threads`: as of a search.
    `EnvironmentFailure` where PyTorch, a GPU or memory is missing."""
    import torch

    from lrconvert.training.loaded import LoadedModel

    kind = default_dtype(device, "a search") if dtype is None else long_name(dtype)
    with computing_threads(threads):
        loaded = LoadedModel(plan.model, device=device, dtype=kind)
        cuda, number = loaded.device.type == "cuda", torch.get_num_threads()
        longest = max(len(document.tokens) for tier in plan.tiers for document in tier.objective.documents)
        length, seconds = min(SHORTEST, longest), 0.0
        loaded.losses(_row(length, loaded.vocab))  # the first one loads what others use
        while seconds < ENOUGH:
            seconds = min(_seconds(loaded, length) for _ in range(2))  # other work on the machine only slows it down
            if 2 * length > longest:
                break
            length *= 2 if seconds < ENOUGH else 1
        used = f"{number} thread{'s' if number > 1 else ''}"
        name = torch.cuda.get_device_name(loaded.device) if cuda else f"this CPU with {used}"
        loaded.free()
    return Speed(name, operations(plan.model, [length]) / seconds)


def _seconds(loaded: LoadedModel, length: int) -> float:
    started = time.perf_counter()
    loaded.losses(_row(length, loaded.vocab))  # ends with numbers on this side, so a GPU has finished
    return time.perf_counter() - started


def _row(length: int, vocab: int) -> np.ndarray:
    return (np.arange(length, dtype=np.int64) % vocab)[None]
