# SPDX-License-Identifier: Apache-2.0
"""The device that computes with PyTorch in this process: its name, its memory."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

from lrconvert.errors import EnvironmentFailure, UsageError, require
from lrconvert.machine import total_memory


def is_leading() -> bool:
    """Whether this is the process that writes: of those that torchrun starts, the first."""
    return os.environ.get("RANK", "0") == "0"


def torch_device(name: str, extra: str, purpose: str) -> Any:
    """The CPU or a GPU that is there, a `torch.device`.

    Raises `UsageError` for anything else, `EnvironmentFailure` where this PyTorch has no such GPU.
    """
    torch = require("torch", extra, purpose)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {str(error).partition(chr(10))[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: {purpose} runs on cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise EnvironmentFailure(f"--device {name}: this PyTorch sees no GPU", remedy="Use --device cpu")
        if device.index is not None and device.index >= count:
            raise EnvironmentFailure(f"--device {name}: the last of this machine's GPUs is cuda:{count - 1}")
    return device


def process_device(name: str | None, purpose: str) -> Any:
    """The `torch.device` of this process: the one named, by default a GPU where there is one.

    Of the GPUs, each process that torchrun starts takes its own (`LOCAL_RANK`). Raises as `torch_device`.
    """
    torch = require("torch", "search", purpose)
    device = torch_device(name or ("cuda" if torch.cuda.is_available() else "cpu"), "search", purpose)
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", device.index if device.index is not None else local)
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def computing_threads(count: int | None) -> Iterator[None]:
    """Within, PyTorch computes with `count` threads; None: as many as before."""
    torch = require("torch", "search", "computing with PyTorch")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_dtype(device: str | None, purpose: str) -> str:
    """bfloat16 on a GPU, float32 elsewhere; `device` as for `process_device`."""
    torch = require("torch", "search", purpose)
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return "bfloat16" if cuda else "float32"


def device_memory(device: Any) -> int:
    """Bytes of memory that a `torch.device` has, used or not."""
    torch = require("torch", "search", "computing with PyTorch")
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_memory()


def free_memory(device: Any) -> None:
    """Give back what nothing refers to. Call it outside of the `except` block: the exception holds the frames, and
    they hold the tensors."""
    gc.collect()
    if device.type == "cuda":
        require("torch", "search", "computing with PyTorch").cuda.empty_cache()
