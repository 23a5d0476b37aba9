# SPDX-License-Identifier: Apache-2.0
"""Laying out safetensors files before they are written: who lies where, and the header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrconvert.checkpoint.base import numpy_dtype

MAX_SHARD_BYTES = 5 * 10**9  # what save_pretrained uses
_ALIGN = 8


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: its name, its dtype (as safetensors spells it) and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


def plan_shards(
    tensors: Sequence[PlannedTensor], limit: int = MAX_SHARD_BYTES
) -> list[tuple[str, list[PlannedTensor]]]:
    """File names and the tensors in each, in order; no shard above `limit` bytes unless one tensor is."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def header_of(tensors: Sequence[PlannedTensor]) -> bytes:
    """Length and JSON header of a file that holds these tensors one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text
