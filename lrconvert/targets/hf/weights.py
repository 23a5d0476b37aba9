# SPDX-License-Identifier: Apache-2.0
"""The artifact's weight files: which stay as they are, which are written anew, and how."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lrconvert.artifact.plan import Stream, StreamTensor
from lrconvert.artifact.prefetch import Job
from lrconvert.checkpoint import Checkpoint, Model, TensorInfo, read_json
from lrconvert.checkpoint.base import cast_block
from lrconvert.checkpoint.blocks import Block
from lrconvert.checkpoint.folder import INDEX, SINGLE
from lrconvert.targets.hf.shards import PlannedTensor, header_of

Shard = tuple[str, list[PlannedTensor]]  # a file's name and its tensors, in order


def lay_out(
    model: Model, stored: str | None, shard: Callable[[Sequence[PlannedTensor]], list[Shard]]
) -> tuple[dict[str, Path], list[Shard], dict[str, bytes]]:
    """Weight files that are kept, shards that are written, and the index if it isn't kept.

    With a `stored` dtype every tensor is laid out anew by `shard`. Else the source's own layout stands, and a
    file is written again, under its name and in its order, if it holds a tensor that a view changes.
    """
    checkpoint = model.checkpoint
    if stored is not None:
        shards = shard([PlannedTensor(tensor.name, stored, tensor.shape) for tensor in model.roles.values()])
        return {}, shards, {INDEX: _index(shards)} if len(shards) > 1 else {}
    weights = checkpoint.weight_files()
    # A lone file may have any name in the source; transformers looks for one.
    names = {weights[0]: SINGLE} if len(weights) == 1 else {path: path.name for path in weights}
    if not checkpoint.touched:
        return {name: path for path, name in names.items()}, [], {}
    shards = []
    used = {tensor.name for tensor in model.roles.values()}
    for path in dict.fromkeys(checkpoint.tensors[name].file for name in checkpoint.touched):
        infos = [info for info in checkpoint.tensors.values() if info.file == path and info.name in used]
        shards.append((names.pop(path), [PlannedTensor(info.name, info.dtype, info.shape) for info in infos]))
    holding = {info.file for info in checkpoint.tensors.values()}  # a view may leave out all that a file holds
    kept = {name: path for path, name in names.items() if path in holding or name == INDEX}
    index = {} if INDEX not in kept else _edited_index(checkpoint, kept[INDEX], used)
    return {name: path for name, path in kept.items() if name not in index}, sorted(shards), index


def _index(shards: Sequence[Shard]) -> bytes:
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for _, group in shards for tensor in group)},
        "weight_map": {tensor.name: name for name, group in shards for tensor in group},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _edited_index(checkpoint: Checkpoint, path: Path, used: set[str]) -> dict[str, bytes]:
    """The source's index with the tensors that the merge adds, and without the unused ones that a
    rewritten shard leaves out; nothing where it stays as it is."""
    index = read_json(path)
    rewritten = {checkpoint.tensors[name].file for name in checkpoint.touched}
    infos = {n: i for n, i in checkpoint.tensors.items() if n in used or i.file not in rewritten}
    if infos.keys() == index["weight_map"].keys():
        return {}
    metadata = dict(index["metadata"]) if isinstance(index.get("metadata"), dict) else {}
    counted = {"total_size": _bytes, "total_parameters": _values}
    metadata |= {key: sum(map(count, infos.values())) for key, count in counted.items() if key in metadata}
    index |= {"metadata": metadata, "weight_map": {name: info.file.name for name, info in sorted(infos.items())}}
    return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _bytes(info: TensorInfo) -> int:
    return info.nbytes


def _values(info: TensorInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64))


# --- writing ---------------------------------------------------------------------------------------------


def stream(checkpoint: Checkpoint, name: str, tensors: Sequence[PlannedTensor]) -> Stream:
    """A shard, written tensor by tensor."""
    streamed = [StreamTensor(tensor.name, tensor.nbytes, partial(_jobs, checkpoint, tensor)) for tensor in tensors]
    return Stream(name, streamed, header_of(tensors))


def _jobs(checkpoint: Checkpoint, tensor: PlannedTensor) -> Iterator[Job]:
    """Functions that make a tensor's bytes block by block, each with how many bytes it makes."""
    for block in checkpoint.blocks(tensor.name):
        yield partial(_cast, checkpoint, tensor, block), tensor.nbytes * block.rows // tensor.shape[0]


def _cast(checkpoint: Checkpoint, planned: PlannedTensor, block: Block) -> memoryview:
    """The bytes of a block in the planned dtype."""
    return cast_block(block.read(), planned.dtype, planned.name, checkpoint.path).reshape(-1).view(np.uint8).data
