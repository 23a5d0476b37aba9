# SPDX-License-Identifier: Apache-2.0
"""An attention factor folded into weights: a view that scales the rotated channels of q and k as they are read.

Attention logits are q·k with rotated channels times (attention factor)². So code that fixes the factor f computes
what a asks for when those channels of q and of k are a/f times as large:

    model = folded(open_model("base"), a / f)

Channels that don't rotate have no attention factor and stay. Where q and k pass through a norm of their own
(Qwen3), the norm undoes a scale before it, so its weight is scaled, which all heads share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lrconvert.checkpoint.base import FLOAT_DTYPES, Checkpoint, CheckpointView, Model, numpy_dtype
from lrconvert.checkpoint.blocks import Array, Block


class FoldedCheckpoint(CheckpointView):
    """A checkpoint in which rows of some tensors are scaled when they are read."""

    def __init__(self, base: Checkpoint, scales: Mapping[str, Array], *, rounded: bool) -> None:
        """`scales`: a factor for every row of a tensor. `rounded`: what is read has the stored dtype; else what
        changed stays wider for the reader to round."""
        super().__init__(base, scales)
        self._scales, self._rounded = scales, rounded

    def blocks(self, name: str) -> Iterator[Block]:
        scales, stored = self._scales.get(name), self.tensors[name].dtype
        dtype = numpy_dtype(stored) if self._rounded and stored in FLOAT_DTYPES else None
        found = self.base.blocks(name)
        if scales is None and dtype is None:
            return found
        return (replace(block, read=partial(_scaled, block, scales, dtype)) for block in found)


def _scaled(block: Block, scales: Array | None, dtype: np.dtype[Any] | None) -> Array:
    """In float64, so that the only rounding is that to `dtype`; as wide as it gets where that is None."""
    values = block.read()
    if scales is not None:
        own = scales[block.start : block.stop].reshape(-1, *(1 for _ in values.shape[1:]))
        values = values.astype(np.float64) * own
    return values if dtype is None else values.astype(dtype, copy=False)


def folded(model: Model, scale: float, *, rounded: bool = True) -> Model:
    """The model with the rotated channels of q and k scaled; `rounded`: see `FoldedCheckpoint`.

    With a scale of 1 nothing is scaled.
    """
    scales = {} if scale == 1.0 else row_scales(model, scale)
    return replace(model, checkpoint=FoldedCheckpoint(model.checkpoint, scales, rounded=rounded))


def row_scales(model: Model, scale: float) -> dict[str, Array]:
    """The factor of every row of the tensors that make q and k: by role, how many heads of them lead."""
    shape = model.shape
    normed = any(role == "q_norm" for role, _ in model.roles)
    heads: dict[str, int] = {"q": shape.heads, "k": shape.kv_heads, "qkv": shape.heads + shape.kv_heads}
    heads |= {f"{role}_bias": count for role, count in heads.items()}
    heads = {"q_norm": 1, "k_norm": 1} if normed else heads
    head = np.ones(shape.head_dim)
    head[: shape.rotary_dim] = scale
    found: dict[str, Any] = {}
    for (role, _), tensor in model.roles.items():
        if role in heads:
            leading = np.tile(head, heads[role])
            found[tensor.name] = np.concatenate([leading, np.ones(tensor.shape[0] - len(leading))])
    return found
