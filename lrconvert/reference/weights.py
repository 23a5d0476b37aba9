# SPDX-License-Identifier: Apache-2.0
"""The weights that references compute with: kept once for all of them, as they are stored, while there is room."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lrconvert.machine import usable_memory

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model

# What is kept between passes, at most. On a GPU, a part of its memory: a 7B in bfloat16 takes a tenth of an H200's, and
# another in the program that is compared, which needs room for its cache too. On a CPU, the same part of what is free,
# and no more than these bytes: the program that is compared holds all weights too. Floats are read again from the
# system's cache in a moment. What may be quantised takes longer: of the 30 seconds that a case of 512 tokens took with
# a billion weights in q4_k_m, on two slow cores, reading all of them again would have been 10.
KEEP_PART, KEEP_FLOATS, KEEP_QUANTISED = 1 / 3, 2**27, 5 * 2**29

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
        self._kept: dict[Key, torch.Tensor] = {}
        on_gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else usable_memory()
        most = memory * KEEP_PART
        if not on_gpu:
            most = min(most, KEEP_QUANTISED if model.checkpoint.dequantises else KEEP_FLOATS)
        self._room = most if keep_bytes is None else keep_bytes

    def get(self, key: Key, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor | None:
        """A weight, or some of its rows, in a type; None where the model has none."""
        tensor = self._kept.get(key)
        if tensor is None:
            tensor = self._read(key)
            if tensor is None:
                return None
            size = tensor.numel() * tensor.element_size()
            if size <= self._room:
                self._room -= size
                self._kept[key] = tensor
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
