# SPDX-License-Identifier: Apache-2.0
"""The weights that references compute with: read once for all of them, and widened to what each computes in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from lrconvert.machine import usable_memory

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model

# What is kept between passes, at most. On a GPU, a part of its memory: a 7B in bfloat16 takes a tenth of an H200's, and
# another in the program that is compared, which needs room for its cache too. On a CPU, the same part of what is free.
KEEP_BYTES, KEEP_PART = 6 * 2**30, 1 / 3
# Up to so many bytes in float64, weights are kept as they are computed with: those of SmolLM2-135M fit. Those of larger
# models are kept as they are stored: a billion bfloat16 numbers take 2 GB, and 8 when they are wide. To widen a matrix
# of 5,632 rows by 2,048 takes a quarter of the time of its product with 512 tokens, on two cores.
WIDE_BYTES = 5 * 2**28

Key = tuple[str, int | None, int | None]  # role, layer, expert


class Weights:
    """The weights of a model on a device.

    `stored_dtype` (a safetensors name) rounds them to what an artifact stores before they are widened, so that the
    artifact is not blamed for a rounding that the user asked for.
    """

    def __init__(
        self, model: Model, device: torch.device, stored_dtype: str | None = None, keep_bytes: int | None = None
    ) -> None:
        self.model, self.device, self._stored_dtype = model, device, stored_dtype
        self._kept: dict[tuple[Key, torch.dtype | None], torch.Tensor] = {}
        on_gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else usable_memory()
        most = memory * KEEP_PART if on_gpu else min(KEEP_BYTES, memory * KEEP_PART)
        self._room = most if keep_bytes is None else keep_bytes
        numbers = sum(math.prod(info.shape) for info in model.checkpoint.tensors.values())
        self._wide = not on_gpu and numbers * 8 <= WIDE_BYTES

    def get(self, key: Key, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor | None:
        """A weight, or some of its rows, in a type; None where the model has none."""
        kept = (key, dtype if self._wide else None)
        tensor = self._kept.get(kept)
        if tensor is None:
            tensor = self._read(key)
            if tensor is None:
                return None
            tensor = tensor.to(dtype) if self._wide else tensor
            size = tensor.numel() * tensor.element_size()
            if size <= self._room:
                self._room -= size
                self._kept[kept] = tensor
        return (tensor if rows is None else tensor[rows]).to(dtype)

    def _read(self, key: Key) -> torch.Tensor | None:
        """As it is stored."""
        array = self.model.tensor(*key)
        if array is None:
            return None
        if self._stored_dtype is not None:
            from lrconvert.checkpoint.base import numpy_dtype

            array = array.astype(numpy_dtype(self._stored_dtype), copy=False)
        return _on_device(array, self.device)


def _on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same numbers there. NumPy's bfloat16 is not PyTorch's: its bits are."""
    is_bfloat16 = array.dtype.name == "bfloat16"
    known = array.view(np.int16) if is_bfloat16 else array
    tensor = torch.from_numpy(np.require(known, requirements=("C", "W"))).to(device)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
