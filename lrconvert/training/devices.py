# SPDX-License-Identifier: Apache-2.0
"""What `--device` names, for what computes with PyTorch in this process."""

from __future__ import annotations

from typing import Any

from lrconvert.errors import EnvironmentFailure, UsageError, require


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
