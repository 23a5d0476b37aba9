# SPDX-License-Identifier: Apache-2.0
"""The rotary operator: a model-local function, `lrconvert::LongRopeCosSin(position_ids, sequence_length) → cos, sin`.

It consists of standard operators, so no runtime needs a library for it. `position_ids` [B, S] int64; a row's tier is
the first one that holds max(position) + 1 tokens, or `sequence_length` tokens if that is more (0: not said; a caller
who knows how long a sequence gets can say so). cos and sin [B, S, d/2] carry the attention factor already, and feed
the standard operator RotaryEmbedding.

Factors and the like are attributes of the call, so that a graph can be read (`checkpoint.onnx_folder`).

`double`: angles in float64, 3e-8 from exact at any position. Otherwise: two levels of float32 tables and the addition
theorem, cos(x + y) = cos x · cos y − sin x · sin y with position = x·stride + y, for execution providers without
float64; 1e-7 from exact up to the window, NaN beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from lrconvert.checkpoint.onnx_folder import COS_SIN, DOMAIN, TIER_ATTRIBUTES
from lrconvert.rope import RopeSpec, Tier, inverse_frequencies

VERSION = 1

# Attributes of the call. Published names are permanent.
DOUBLE = (*TIER_ATTRIBUTES, "to")
TABLES = (*TIER_ATTRIBUTES, "coarse_cos", "coarse_sin", "fine_cos", "fine_sin", "stride", "rows", "scaled_block",
          "start_block", "to")  # fmt: skip


def plain(spec: RopeSpec, theta: float) -> RopeSpec:
    """The unscaled rotation of another θ, as one tier for the whole window."""
    tier = Tier(spec.window, (1.0,) * (spec.rotary_dim // 2))
    return replace(spec, base=theta, original_window=spec.window, tiers=(tier,))


def call(
    spec: RopeSpec,
    position_ids: str,
    sequence_length: str,
    to: int,
    *,
    double: bool,
    outputs: tuple[str, str] = ("cos", "sin"),
) -> NodeProto:
    """The node that calls the function; its outputs are cos and sin of the ONNX type `to`."""
    values = _shared(spec)
    if not double:
        values |= _tables(spec)
    name = "longrope" if outputs[0] == "cos" else outputs[0].removesuffix(".cos")
    node = helper.make_node(COS_SIN, [position_ids, sequence_length], list(outputs), name=name, domain=DOMAIN, to=to)
    for name, array in values.items():
        node.attribute.append(helper.make_attribute(name, numpy_helper.from_array(array, name)))
    return node


def function(opset: int, *, double: bool) -> FunctionProto:
    """The function's body."""
    body = _Body()
    tier, starts = body.tier(), body.op("Less", "position_ids", body.gathered("start_tokens", "tier"))
    if double:
        _double(body, starts)
    else:
        _two_levels(body, tier, starts)
    return helper.make_function(
        DOMAIN,
        COS_SIN,
        ["position_ids", "sequence_length"],
        ["cos", "sin"],
        body.nodes,
        [helper.make_opsetid("", opset)],
        attributes=list(DOUBLE if double else TABLES),
        doc_string=__doc__,
    )


def _shared(spec: RopeSpec) -> dict[str, np.ndarray[Any, Any]]:
    plain = inverse_frequencies(spec.rotary_dim, spec.base)
    return {
        "tier_lengths": np.array([tier.max_length for tier in spec.tiers], np.int64),
        "start_tokens": np.array([tier.start_tokens for tier in spec.tiers], np.int64),
        "attention_factors": np.array([tier.attention_factor for tier in spec.tiers], np.float64),
        "inverse_frequencies": plain,
        "scaled_inverse_frequencies": np.stack([plain / np.asarray(tier.factors) for tier in spec.tiers]),
    }


def _tables(spec: RopeSpec) -> dict[str, np.ndarray[Any, Any]]:
    """Blocks of the two-level tables: one for every tier, then one more with plain frequencies for every tier that has
    start tokens. The attention factor is in the coarse ones."""
    stride = 2 ** math.ceil(math.log2(spec.window) / 2)
    rows = -(-spec.window // stride)
    plain = inverse_frequencies(spec.rotary_dim, spec.base)
    scaled = [(plain / np.asarray(tier.factors), tier.attention_factor) for tier in spec.tiers]
    start_block, unscaled = [], []
    for index, tier in enumerate(spec.tiers):
        start_block.append(len(scaled) + len(unscaled) if tier.start_tokens > 1 else index)
        unscaled += [(plain, tier.attention_factor)] if tier.start_tokens > 1 else []
    coarse = [(np.arange(rows)[:, None] * stride * f, m) for f, m in (*scaled, *unscaled)]
    fine = [np.arange(stride)[:, None] * f for f, _ in (*scaled, *unscaled)]
    nowhere = np.full((1, spec.rotary_dim // 2), np.nan)
    return {
        "coarse_cos": np.concatenate([*(np.cos(a) * m for a, m in coarse), nowhere]).astype(np.float32),
        "coarse_sin": np.concatenate([*(np.sin(a) * m for a, m in coarse), nowhere]).astype(np.float32),
        "fine_cos": np.concatenate([np.cos(a) for a in fine]).astype(np.float32),
        "fine_sin": np.concatenate([np.sin(a) for a in fine]).astype(np.float32),
        "stride": np.array(stride, np.int64),
        "rows": np.array(rows, np.int64),
        "scaled_block": np.arange(len(spec.tiers), dtype=np.int64),
        "start_block": np.array(start_block, np.int64),
    }


def _double(body: _Body, starts: str) -> None:
    """angle = position · (plain or scaled inverse frequency), in float64; shapes [B, S, d/2]."""
    position = body.op("Unsqueeze", body.op("Cast", "position_ids", to=TensorProto.DOUBLE), body.constant([2]))
    frequency = body.op(
        "Where",
        body.op("Unsqueeze", starts, body.constant([2])),
        body.attribute("inverse_frequencies"),
        body.gathered("scaled_inverse_frequencies", "tier"),
    )
    angle = body.op("Mul", position, frequency)
    factor = body.op("Unsqueeze", body.gathered("attention_factors", "tier"), body.constant([2]))
    for kind in ("Cos", "Sin"):
        body.cast(body.op("Mul", body.op(kind, angle), factor), kind.lower())


def _two_levels(body: _Body, tier: str, starts: str) -> None:
    """position = high · stride + low; the block of a token is its tier's, or the unscaled one of its tier."""
    stride = body.attribute("stride")
    high, low = body.op("Div", "position_ids", stride), body.op("Mod", "position_ids", stride)
    block = body.op("Where", starts, body.gathered("start_block", tier), body.gathered("scaled_block", tier))
    # A position beyond the window must not read the next block's first rows: it gets the last row, which is NaN.
    rows = body.attribute("rows")
    inside = body.op("Less", high, rows)
    coarse = body.op("Where", inside, body.op("Add", body.op("Mul", block, rows), high), body.constant(-1))
    fine = body.op("Add", body.op("Mul", block, stride), low)
    cos_x, sin_x = body.gathered("coarse_cos", coarse), body.gathered("coarse_sin", coarse)
    cos_y, sin_y = body.gathered("fine_cos", fine), body.gathered("fine_sin", fine)
    body.cast(body.op("Sub", body.op("Mul", cos_x, cos_y), body.op("Mul", sin_x, sin_y)), "cos")
    body.cast(body.op("Add", body.op("Mul", sin_x, cos_y), body.op("Mul", cos_x, sin_y)), "sin")


class _Body:
    """Nodes of the function, in order; every method returns the name of what it adds."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self._attributes: dict[str, str] = {}
        self._constants: dict[str, str] = {}

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, value: int | Sequence[int]) -> str:
        key = repr(value)
        if key not in self._constants:
            tensor = numpy_helper.from_array(np.array(value, np.int64), "value")
            self._constants[key] = self.op("Constant", value=tensor)
        return self._constants[key]

    def attribute(self, name: str) -> str:
        """An attribute of the call, as a tensor."""
        if name not in self._attributes:
            node = helper.make_node("Constant", [], [name])
            node.attribute.append(AttributeProto(name="value", type=AttributeProto.TENSOR, ref_attr_name=name))
            self.nodes.append(node)
            self._attributes[name] = name
        return name

    def gathered(self, table: str, index: str) -> str:
        return self.op("Gather", self.attribute(table), index, axis=0)

    def cast(self, value: str, output: str) -> None:
        node = helper.make_node("Cast", [value], [output])
        node.attribute.append(AttributeProto(name="to", type=AttributeProto.INT, ref_attr_name="to"))
        self.nodes.append(node)

    def tier(self) -> str:
        """The index of each row's tier, [B, 1]: how many tiers but the last are too short."""
        last = self.op("ReduceMax", "position_ids", self.constant([1]), keepdims=1)
        length = self.op("Max", self.op("Add", last, self.constant(1)), "sequence_length")
        lengths = self.attribute("tier_lengths")
        short = self.op("Less", lengths, length)
        # Beyond the window the last tier goes on.
        count = self.op("ReduceSum", self.op("Cast", short, to=TensorProto.INT64), self.constant([1]), keepdims=1)
        last_tier = self.op("Sub", self.op("Size", lengths), self.constant(1))
        return self.op("Min", count, last_tier, output="tier")
