# SPDX-License-Identifier: Apache-2.0
"""Scales folded into weights, as they are read: an attention factor, and a family's multipliers.

Attention logits are q·k with rotated channels times (attention factor)². So code that fixes the factor f computes
what a asks for when those channels of q and of k are a/f times as large:

    model = folded(open_model("base"), a / f)

Channels that don't rotate have no attention factor and stay. Where q and k pass through a norm of their own
(Qwen3), the norm undoes a scale before it, so its weight is scaled, which all heads share.

Multipliers of a family that transformers has no class for go into the embedding, into what o and down add, and into
the head; a tied head becomes one of its own where the two ends differ. What is left is a model of another family:

    model = in_weights(open_model("MiniCPM4"))     # a llama
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from lrconvert.checkpoint.base import FLOAT_DTYPES, Checkpoint, CheckpointView, Model, numpy_dtype
from lrconvert.checkpoint.blocks import Array, Block
from lrconvert.errors import UnsupportedError
from lrconvert.families import get_family
from lrconvert.families.base import LM_HEAD
from lrconvert.families.multipliers import Multipliers

# Roles whose rows carry a multiplier; biases add after the product, so they are multiplied too.
CARRIERS = {
    "embedding": ("embedding",),
    "residual": ("o", "o_bias", "down", "down_bias", "expert_down", "shared_down"),
    "attention": ("q", "q_bias"),
    "logits": ("lm_head", "lm_head_bias"),
}


class FoldedCheckpoint(CheckpointView):
    """A checkpoint in which rows of some tensors are scaled when they are read: what they are multiplied with is. Where
    norms add an `offset` to their weights, so much less of it is stored."""

    def __init__(
        self,
        base: Checkpoint,
        scales: Mapping[str, Array],
        *,
        rounded: bool,
        copies: Mapping[str, str] = MappingProxyType({}),
        offset: float = 0.0,
    ) -> None:
        """`scales`: a factor for every row of a tensor. `rounded`: what is read has the stored dtype; else what
        changed stays wider for the reader to round. `copies`: tensors that are others of the base, by name."""
        super().__init__(base, scales.keys() | copies.keys())
        self._scales, self._rounded, self._copies, self._offset = scales, rounded, copies, offset
        more = {n: base.tensors.get(n) or replace(base.tensors[source], name=n) for n, source in copies.items()}
        self.tensors = {**base.tensors, **more}

    def blocks(self, name: str) -> Iterator[Block]:
        scales, stored = self._scales.get(name), self.tensors[name].dtype
        dtype = numpy_dtype(stored) if self._rounded and stored in FLOAT_DTYPES else None
        found = self.base.blocks(self._copies.get(name, name))
        if scales is None and dtype is None:
            return found
        return (replace(block, read=partial(_scaled, block, scales, dtype, self._offset)) for block in found)


def _scaled(block: Block, scales: Array | None, dtype: np.dtype[Any] | None, offset: float) -> Array:
    """In float64, so that the only rounding is that to `dtype`; as wide as it gets where that is None."""
    values = block.read()
    if scales is not None:
        own = scales[block.start : block.stop].reshape(-1, *(1 for _ in values.shape[1:]))
        values = (values.astype(np.float64) + offset) * own - offset
    return values if dtype is None else values.astype(dtype, copy=False)


def folded(model: Model, scale: float, *, rounded: bool = True) -> Model:
    """The model with the rotated channels of q and k scaled; `rounded`: see `FoldedCheckpoint`.

    With a scale of 1 nothing is scaled.
    """
    scales = {} if scale == 1.0 else row_scales(model, scale)
    normed = ("q_norm", 0) in model.roles  # then nothing but norms is scaled
    offset = model.shape.norm_offset if normed else 0.0
    return replace(model, checkpoint=FoldedCheckpoint(model.checkpoint, scales, rounded=rounded, offset=offset))


def row_scales(model: Model, scale: float) -> dict[str, Array]:
    """The factor of every row of the tensors that make q and k in the layers that the recipe rotates: by role, how many
    heads of them lead."""
    shape = model.shape
    normed = any(tensor.role == "q_norm" for tensor in model.roles.values())
    heads: dict[str, int] = {"q": shape.heads, "k": shape.kv_heads, "qkv": shape.heads + shape.kv_heads}
    heads |= {f"{role}_bias": count for role, count in heads.items()}
    if normed:
        whole = model.family.whole_qk_norms
        heads = {"q_norm": shape.heads if whole else 1, "k_norm": shape.kv_heads if whole else 1}
    head = np.ones(shape.head_dim)
    head[: shape.rotary_dim] = scale
    found: dict[str, Any] = {}
    for tensor in model.roles.values():
        if tensor.role in heads and tensor.layer is not None and shape.turn(tensor.layer) is None:
            leading = np.tile(head, heads[tensor.role])
            found[tensor.name] = np.concatenate([leading, np.ones(tensor.shape[0] - len(leading))])
    return found


# --- multipliers -----------------------------------------------------------------------------------------


def in_weights(model: Model, *, rounded: bool = True) -> Model:
    """The model as one of the family that `Family.hf_written` names, its multipliers in its weights; the model itself
    where that names none. `rounded`: see `FoldedCheckpoint`.
    """
    written = model.family.hf_written
    if written is None:
        return model
    found, family, tied = model.shape.multipliers, get_family(written), model.shape.tied
    # Where a copy of the embedding is stored as a head, it is written as one: it would be left behind unscaled.
    untied = tied and (found.embedding != found.logits or ("lm_head", None) in model.roles)
    embedding, copies, roles = model.roles["embedding", None], {}, dict(model.roles)
    if untied:
        copies = {LM_HEAD.hf: embedding.name}
        roles["lm_head", None] = replace(embedding, role="lm_head", name=LM_HEAD.hf)
    by_role = {role: getattr(found, name) for name, carriers in CARRIERS.items() for role in carriers}
    factors = {tensor.name: by_role.get(tensor.role, 1.0) for tensor in roles.values()}
    rows = {tensor.name: tensor.shape[0] for tensor in roles.values()}
    scales = {name: np.full(rows[name], factor) for name, factor in factors.items() if factor != 1.0}
    checkpoint = FoldedCheckpoint(model.checkpoint, scales, rounded=rounded, copies=copies)
    checkpoint.config, gone = _config_of(model, written, tied=tied and not untied)
    checkpoint.outdated = {**checkpoint.outdated, **gone}
    shape = replace(model.shape, multipliers=Multipliers(), tied=tied and not untied, mlp_bias=False)
    return replace(model, checkpoint=checkpoint, family=family, shape=shape, roles=roles)


def _config_of(model: Model, written: str, *, tied: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a model whose multipliers are in its weights, and what of the old one is no longer so."""
    old, family = model.checkpoint.config, model.family
    own = family.inert | family.remarks.keys() | {stated.key for stated in family.multipliers.values()}
    new = {key: value for key, value in old.items() if key not in own | {"auto_map", "mlp_bias"}}
    new |= {"model_type": written, "tie_word_embeddings": tied}
    return new, {key: value for key, value in old.items() if new.get(key) != value}


def rewritten(model: Model, scale: float, *, multipliers: bool, rounded: bool = True) -> Model:
    """The model as an artifact has it: with its multipliers in the weights if so, and rotated q and k scaled."""
    if multipliers:
        model = in_weights(model, rounded=rounded and scale == 1.0)
        if scale == 1.0:
            return model
    return folded(model, scale, rounded=rounded)


def refuse_training(model: Model) -> None:
    """`UnsupportedError` where what trains would have the multipliers in its weights: an adapter of those is none of
    the model's own."""
    if model.family.hf_written is not None:
        raise UnsupportedError(
            f"{model.reference}: {model.family.name} has no class in transformers; what would train is a "
            f"{model.family.hf_written} with its multipliers in the weights, and its adapter would not fit the model",
            remedy="Convert it with `lrconvert hf`, and train the folder",
        )
