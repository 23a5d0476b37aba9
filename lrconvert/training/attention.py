# SPDX-License-Identifier: Apache-2.0
"""The attention kernel of PyTorch that a model computes with on a GPU: named, or the fastest by measurement.

Kernels differ in the fourth digit of a loss, so one is chosen once and kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from lrconvert.errors import UsageError

# The last one holds the scores of all pairs of tokens: it is for what the others refuse, and is not measured.
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PROBE_TOKENS = 16384  # long enough that attention dominates, short enough to take no time
Timer = Callable[[str], float | None]  # seconds of a forward pass with a kernel; None where it refuses


def check_kernel(name: str | None, team: int = 1) -> None:
    """Raises `UsageError` for a name that is not in `KERNELS`, and for a kernel that a team can't share a document
    with."""
    if name is not None and name not in KERNELS:
        raise UsageError(f"no attention kernel {name!r}; there are {', '.join(KERNELS)}")
    if name == "math" and team > 1:
        raise UsageError(
            "--context-parallel: PyTorch's ring attention has every kernel but math; math was named, or is the only "
            "one for this dtype and model",
            remedy="Use another --attention or --dtype, or do without --context-parallel",
        )


def use_kernel(name: str | None) -> AbstractContextManager[Any]:
    """Within, attention is computed by this kernel; None leaves the choice to PyTorch."""
    return contextlib.nullcontext() if name is None else sdpa_kernel([KERNELS[name]])


def choose_kernel(named: str | None, time_kernel: Timer) -> str:
    """The kernel that is `named`, else the fastest.

    Raises `UsageError` where PyTorch has no such kernel for this card, dtype and model.
    """
    if named is not None:
        if named != "math" and time_kernel(named) is None:
            raise UsageError(f"--attention {named}: PyTorch has no such kernel for this GPU, dtype and model")
        return named
    times = {name: seconds for name in KERNELS if name != "math" and (seconds := time_kernel(name)) is not None}
    return min(times, key=lambda name: times[name]) if times else "math"
