# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors in a stream: the header is known before the first tensor is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrconvert.checkpoint.base import numpy_dtype
from lrconvert.output import Staging

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


def write_shards(
    staging: Staging,
    shards: Sequence[tuple[str, list[PlannedTensor]]],
    read: Callable[[PlannedTensor], np.ndarray[Any, Any]],
) -> Iterator[PlannedTensor]:
    """Write every shard (and an index when there are several); yields each tensor once it is written.

    `read` gives the array of a planned tensor in the planned dtype and shape; one is held at a time.
    """
    for file_name, tensors in shards:
        with staging.create(file_name) as file:
            file.write(header_of(tensors))
            for tensor in tensors:
                array = np.ascontiguousarray(read(tensor))
                file.write(array.reshape(-1).view(np.uint8).data)
                yield tensor
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for _, group in shards for t in group)},
            "weight_map": {t.name: name for name, group in shards for t in group},
        }
        staging.write_bytes(
            "model.safetensors.index.json", (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        )
