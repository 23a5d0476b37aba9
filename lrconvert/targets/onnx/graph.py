# SPDX-License-Identifier: Apache-2.0
"""The decoder as an ONNX graph, straight from the family's table: no torch, no tracing.

Weights are initializers that point into a file which is written later; they keep their Hugging Face names, and
their [out, in] layout (`Gemm` with transB: as fast as `MatMul` over transposed weights in ONNX Runtime, and a tied
lm_head shares the embedding's bytes). The residual stream is [B·S, hidden]; only attention sees [B, S, …]. Where all
products are quantised it is [B, S, hidden] throughout, q, k and v are one product, and with GroupQueryAttention a sum
and the norm after it are one operator: a token's step is so short there that every operator shows.

Inputs: input_ids [B, S], attention_mask [B, past + S], position_ids [B, S], past_key_values.N.key|value
[B, kv_heads, past, head_dim]. Outputs: logits [B, S, vocab] in float32, present.N.key|value.

Two constants are there to be made inputs by who wants them (a graph input of the same name; `runtimes` does that):
`num_logits_to_keep` (0: all), for long prompts, and `sequence_length` (0: unknown, see `rotary`), for prompts in parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.onnx_folder import DOMAIN, MICROSOFT, ROWS, TIED_HEAD
from lrconvert.families.query_scale import QueryScale
from lrconvert.rope import RopeSpec
from lrconvert.targets.onnx import rotary
from lrconvert.targets.onnx.experts import mixture
from lrconvert.targets.onnx.nodes import Nodes
from lrconvert.targets.onnx.tensors import Stored

Attention = Literal["gqa", "standard"]
ADJUSTABLE = ("num_logits_to_keep", "sequence_length")
DEFAULT_OPSET = 23  # the first with RotaryEmbedding, RMSNormalization and Attention
LEFT_PADDED = "left-padded batches need an export with --attention standard"


@dataclass(frozen=True)
class Choices:
    """How to build the graph. `computing`: the dtype of activations and caches, a safetensors name."""

    computing: str = "F32"
    attention: Attention = "gqa"
    opset: int = DEFAULT_OPSET
    double: bool = True


def build(model: Model, spec: RopeSpec, stored: Sequence[Stored], choices: Choices, *, producer: str) -> ModelProto:
    """The whole model; `stored` says which initializers there are and where their bytes lie."""
    graph = _Decoder(model, spec, stored, choices)
    graph.write()
    opsets = [helper.make_opsetid("", choices.opset), helper.make_opsetid(DOMAIN, rotary.VERSION)]
    if any(node.domain == MICROSOFT for node in graph.nodes):
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    body = helper.make_graph(
        graph.nodes, "decoder", graph.inputs(), graph.outputs(), graph.initializers(), value_info=graph.between
    )
    return helper.make_model(
        body,
        functions=[rotary.function(choices.opset, double=choices.double)],
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets[:1]),
        producer_name="lrconvert",
        producer_version=producer,
    )


class _Decoder(Nodes):
    """The decoder, layer by layer."""

    def __init__(self, model: Model, spec: RopeSpec, stored: Sequence[Stored], choices: Choices) -> None:
        super().__init__(model, stored, choices.computing)
        self.spec, self.choices = spec, choices
        # [B, S, hidden], not [B·S, hidden]: MatMulNBits takes any rank; Gemm doesn't, nor do experts.
        self.deep = model.shape.experts is None and any(tensor.bits for tensor in stored)
        plain = model.shape.norm == "rms" and not model.shape.norm_offset
        before = self.has("attention_norm", 0) and self.has("ffn_norm", 0)
        self.fused = self.deep and choices.attention == "gqa" and plain and before

    # --- the graph ---------------------------------------------------------------------------------------

    def write(self) -> None:
        shape, scales = self.shape, self.shape.multipliers
        if not self.deep or self.has("q_norm", 0):
            places = self.op("Shape", "input_ids", name="batch_and_length")
            self.to_queries = self.op(
                "Concat", places, self.constant([shape.heads * shape.head_dim]), name="q_shape", axis=0
            )
            self.to_keys = self.op(
                "Concat", places, self.constant([shape.kv_heads * shape.head_dim]), name="kv_shape", axis=0
            )
        x = self._embedded()
        self._prepare_rotations()
        self.grown = None if shape.query_scale is None else self._grown(shape.query_scale)
        self._prepare_attention()
        self.scope = ["layers.0"]
        normed = self.normed(x, "attention_norm", 0)
        for layer in range(shape.layers):
            self.scope = [f"layers.{layer}"]
            mixed = self.normed(self._attention(normed, layer), "attention_post_norm", layer)
            mixed = self.times(mixed, scales.residual, "mixed.times")
            x, normed = self._added(x, mixed, "after_attention", "ffn_norm", layer)
            made = self._mlp(normed, layer) if shape.experts is None else mixture(self, normed, layer)
            made = self.times(self.normed(made, "ffn_post_norm", layer), scales.residual, "made.times")
            if layer + 1 < shape.layers:
                x, normed = self._added(x, made, "after_ffn", "attention_norm", layer + 1)
            else:
                x = self.op("Add", x, made, name="after_ffn")
        self.scope = []
        self._logits(x)

    def _added(self, x: str, made: str, name: str, norm: str, layer: int) -> tuple[str, str]:
        """x + made, and the norm of it that a layer begins a part with."""
        if not self.fused:
            total = self.op("Add", x, made, name=name)
            self.scope = [f"layers.{layer}"]
            return total, self.normed(total, norm, layer)
        total, normed = ".".join([*self.scope, name]), f"layers.{layer}.{norm}"
        self.scope = [f"layers.{layer}"]
        self.op(
            "SkipSimplifiedLayerNormalization", x, made, self.weight(norm, layer), name=norm, domain=MICROSOFT,
            outputs=[normed, "", "", total], epsilon=self.shape.norm_eps,
        )  # fmt: skip
        # Shape inference knows nothing of that operator.
        dims = ["batch_size", "length", self.shape.hidden]
        self.between += [helper.make_tensor_value_info(each, self.type, dims) for each in (normed, total)]
        return total, normed

    def _embedded(self) -> str:
        """[B·S, hidden]; with GQA, divided by zero where a batch is padded on the left."""
        table = self.stored[self.weight("embedding")]
        x = self._looked_up(table)
        if table.dtype != self.choices.computing:
            x = self.op("Cast", x, name="embedded.widened", to=self.type)
        x = self.times(x, self.shape.multipliers.embedding, "embedded.times")
        if self.choices.attention == "gqa":
            x = self.op("Div", x, self._refusal(), name="embedded.allowed")
        return x if self.deep else self.op("Reshape", x, self.constant([-1, self.shape.hidden]), name="embedded.flat")

    def _looked_up(self, table: Stored) -> str:
        """[B, S, hidden]."""
        if table.bits is None:
            return self.op("Gather", table.name, "input_ids", name="embedded")
        rows = f"{table.packed}{ROWS}"  # as the operator wants them; a view of what lm_head multiplies with
        shape = self.constant([table.shape[0], -1])
        self.nodes.append(helper.make_node("Reshape", [table.packed, shape], [rows], name=rows))
        return self.op(
            "GatherBlockQuantized", rows, "input_ids", self.scales(table), name="embedded", domain=MICROSOFT,
            bits=table.bits, block_size=table.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def _refusal(self) -> str:
        """One, or zero where a row begins with padding, which GroupQueryAttention would read as tokens: on a CPU the
        lookup fails and its name says why; elsewhere all logits become NaN."""
        first = self.op(
            "Slice", "attention_mask", self.constant([0]), self.constant([1]), self.constant([1]), name="first_mask"
        )
        real = self.op("ReduceMin", first, name="all_begin", keepdims=0)
        padded = self.op("Sub", self.constant(1), real, name="any_padded")
        one = self.op("Gather", self.constant([1.0], np.float32), padded, name=LEFT_PADDED)
        allowed = self.op(
            "Mul", one, self.op("Cast", real, name="all_begin.float", to=TensorProto.FLOAT), name="allowed"
        )
        return (
            allowed if self.type == TensorProto.FLOAT else self.op("Cast", allowed, name="allowed.cast", to=self.type)
        )

    def _prepare_rotations(self) -> None:
        """cos and sin of the recipe, and those of every θ that layers have for themselves: no recipe scales them."""
        turns = dict.fromkeys(self.shape.turn(layer) for layer in range(self.shape.layers))
        self.tables: dict[float | None, tuple[str, str]] = {}
        for number, turn in enumerate([None, *(turn for turn in turns if turn)]):
            spec = self.spec if turn is None else rotary.plain(self.spec, turn)
            self.tables[turn] = ("cos", "sin") if turn is None else (f"plain.{number}.cos", f"plain.{number}.sin")
            self.nodes.append(
                rotary.call(
                    spec,
                    "position_ids",
                    "sequence_length",
                    self.type,
                    double=self.choices.double,
                    outputs=self.tables[turn],
                )
            )

    def _grown(self, scale: QueryScale) -> str:
        """What queries are multiplied with, [B, S, 1]: by their positions, in float32, which knows every step."""
        windows = self.op("Div", "position_ids", self.constant(scale.window), name="grown.windows")  # of integers
        counted = self.op("Add", windows, self.constant(1), name="grown.counted")
        x = self.op("Log", self.op("Cast", counted, name="grown.float", to=TensorProto.FLOAT), name="grown.log")
        x = self.op("Mul", x, self.constant(scale.growth, np.float32), name="grown.times")
        x = self.op("Add", x, self.constant(1.0, np.float32), name="grown.wide")
        x = x if self.type == TensorProto.FLOAT else self.op("Cast", x, name="grown.cast", to=self.type)
        return self.op("Unsqueeze", x, self.constant([2]), name="grown")

    def _prepare_attention(self) -> None:
        """What all layers share: lengths for GQA, a mask for the standard operator."""
        total = self.op("Shape", "attention_mask", name="total", start=1, end=2)
        if self.choices.attention == "gqa":
            self.total = self.op(
                "Cast",
                self.op("Squeeze", total, self.constant([0]), name="total.scalar"),
                name="total_length",
                to=TensorProto.INT32,
            )
            seen = self.op("ReduceSum", "attention_mask", self.constant([1]), name="seen", keepdims=0)
            last = self.op("Sub", seen, self.constant([1]), name="last_seen")
            self.seqlens = self.op("Cast", last, name="seqlens", to=TensorProto.INT32)
            return
        # Token i of this call sits at past + i: it sees what the mask allows before it, and itself (padding must
        # see something, or it becomes NaN that later layers multiply with 0).
        total_scalar = self.op("Squeeze", total, self.constant([0]), name="total.scalar")
        length = self.op(
            "Squeeze",
            self.op("Shape", "input_ids", name="length", start=1, end=2),
            self.constant([0]),
            name="length.scalar",
        )
        past = self.op("Sub", total_scalar, length, name="past")
        keys = self.op("Range", self.constant(0), total_scalar, self.constant(1), name="key_places")
        queries = self.op("Range", past, total_scalar, self.constant(1), name="query_places")
        queries = self.op("Unsqueeze", queries, self.constant([1]), name="query_places.column")
        real = self.op(
            "Cast",
            self.op("Unsqueeze", "attention_mask", self.constant([1, 2]), name="mask.wide"),
            name="mask.real",
            to=TensorProto.BOOL,
        )
        before = self.op("And", self.op("Less", keys, queries, name="mask.before"), real, name="mask.visible")
        whole = self.op("Or", before, self.op("Equal", keys, queries, name="mask.itself"), name="mask")
        self.masks = {0: whole}
        for width in sorted(set(self.shape.sliding) - {0}):
            oldest = self.op("Sub", queries, self.constant(width), name=f"mask.before_{width}")
            seen = self.op("Greater", keys, oldest, name=f"mask.within_{width}")
            self.masks[width] = self.op("And", whole, seen, name=f"mask.last_{width}")

    def _attention(self, x: str, layer: int) -> str:
        shape, widths = self.shape, (self.shape.heads * self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim)
        if self.has("qkv", layer) or self.can_join("qkv", layer):
            q, k, v = (f"layers.{layer}.{part}" for part in "qkv")
            whole = self.has("qkv", layer)
            joined = self.linear(x, "qkv", layer) if whole else self.joined(x, "qkv", layer, "qkv")
            self.op(
                "Split",
                joined,
                self.constant([widths[0], widths[1], widths[1]]),
                name="qkv.split",
                outputs=(q, k, v),
                axis=-1 if self.deep else 1,
            )
        else:
            q, k, v = (self.linear(x, role, layer) for role in "qkv")
        q, k = (self._rotated(part, role, layer) for part, role in ((q, "q"), (k, "k")))
        q = q if self.grown is None else self.op("Mul", q, self.grown, name="q.grown")
        v = v if self.deep else self.op("Reshape", v, self.to_keys, name="v.wide")
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        factor = shape.multipliers.attention
        scale = {} if factor == 1.0 else {"scale": factor / shape.head_dim**0.5}
        mixed, reach = f"layers.{layer}.mixed", shape.sliding[layer] if shape.sliding else 0
        if self.choices.attention == "gqa":
            self.op(
                "GroupQueryAttention", q, k, v, *past, self.seqlens, self.total, name="attention", domain=MICROSOFT,
                outputs=[mixed, *present], num_heads=shape.heads, kv_num_heads=shape.kv_heads,
                **({"local_window_size": reach} if reach else {}), **scale,
            )  # fmt: skip
            # Shape inference knows nothing of that operator.
            self.between.append(helper.make_tensor_value_info(mixed, self.type, ["batch_size", "length", widths[0]]))
        else:
            self.op(
                "Attention", q, k, v, self.masks[reach], *past, name="attention", outputs=[mixed, *present],
                q_num_heads=shape.heads, kv_num_heads=shape.kv_heads, **scale,
            )  # fmt: skip
        if not self.deep:
            mixed = self.op("Reshape", mixed, self.constant([-1, widths[0]]), name="mixed.flat")
        return self.linear(mixed, "o", layer)

    def _rotated(self, x: str, role: str, layer: int) -> str:
        """q or k, normalised where the family does that: [B·S, heads · head_dim] → [B, S, heads · head_dim]."""
        shape, turn = self.shape, self.shape.turn(layer)
        heads = shape.heads if role == "q" else shape.kv_heads
        by_head = self.has(f"{role}_norm", layer) and not self.model.family.whole_qk_norms
        if by_head:
            x = self.op("Reshape", x, self.constant([-1, shape.head_dim]), name=f"{role}.by_head")
        x = self.normed(x, f"{role}_norm", layer)
        if by_head or not self.deep:
            wide = self.to_queries if role == "q" else self.to_keys
            x = self.op("Reshape", x, wide, name=f"{role}.wide")
        if turn == 0.0:
            return x
        more: dict[str, Any] = {"interleaved": 1} if shape.neighbours else {}
        if shape.rotary_dim != shape.head_dim:
            more["rotary_embedding_dim"] = shape.rotary_dim
        return self.op("RotaryEmbedding", x, *self.tables[turn], name=f"{role}.rotated", num_heads=heads, **more)

    def _mlp(self, x: str, layer: int) -> str:
        if self.has("gate_up", layer):
            gate, up = f"layers.{layer}.gate", f"layers.{layer}.up"
            self.op(
                "Split",
                self.linear(x, "gate_up", layer),
                name="gate_up.split",
                outputs=(gate, up),
                axis=-1 if self.deep else 1,
                num_outputs=2,
            )
        else:
            gate, up = self.linear(x, "gate", layer), self.linear(x, "up", layer)
        return self.linear(self.gated(gate, up), "down", layer)

    def _logits(self, x: str) -> None:
        """Of the last `num_logits_to_keep` tokens; −0 is 0, so that 0 keeps all."""
        shape = self.shape
        whole = self.op("Shape", "input_ids", name="batch", start=0, end=1)
        if not self.deep:
            x = self.op(
                "Reshape",
                x,
                self.op("Concat", whole, self.constant([-1, shape.hidden]), name="hidden_shape", axis=0),
                name="hidden",
            )
        begin = self.op(
            "Reshape", self.op("Neg", "num_logits_to_keep", name="kept.from_end"), self.constant([1]), name="kept.begin"
        )
        x = self.op("Slice", x, begin, self.constant([2**63 - 1]), self.constant([1]), name="hidden.kept")
        x = self.norm(x, "final_norm", None)
        if not self.deep:
            x = self.op("Reshape", x, self.constant([-1, shape.hidden]), name="final.flat")
        tied = TIED_HEAD if TIED_HEAD in self.stored else self.weight("embedding")
        x = self.product(x, tied if shape.tied else self.weight("lm_head"), self.bias("lm_head", None), "lm_head")
        to = self.op("Concat", whole, self.constant([-1, shape.vocab]), name="logits_shape", axis=0)
        if self.type != TensorProto.FLOAT:
            x = self.op("Cast", x, name="logits.wide", to=TensorProto.FLOAT)
        x = self.times(x, shape.multipliers.logits, "logits.times", TensorProto.FLOAT)
        if shape.logits_cap:
            cap = self.constant(shape.logits_cap, np.float32)
            bent = self.op("Tanh", self.op("Div", x, cap, name="logits.part"), name="logits.bent")
            x = self.op("Mul", bent, cap, name="logits.capped")
        self.op("Reshape", x, to, name="logits")

    # --- the outside -------------------------------------------------------------------------------------

    def inputs(self) -> list[Any]:
        # transformers.js makes empty caches of the right size only where the first dimension has this name.
        ids = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "length"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total"]),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch_size", "length"]),
        ]
        return [*ids, *self._caches("past_key_values", "past")]

    def outputs(self) -> list[Any]:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "kept", self.shape.vocab])
        return [logits, *self._caches("present", "total")]

    def _caches(self, prefix: str, length: str) -> Iterable[Any]:
        dims = ["batch_size", self.shape.kv_heads, length, self.shape.head_dim]
        names = [f"{prefix}.{layer}.{part}" for layer in range(self.shape.layers) for part in ("key", "value")]
        return [helper.make_tensor_value_info(name, self.type, dims) for name in names]

    def initializers(self) -> list[TensorProto]:
        defaults = [numpy_helper.from_array(np.array(0, np.int64), name) for name in ADJUSTABLE]
        weights = [proto for tensor in self.stored.values() for proto in tensor.protos()]
        return [*weights, *self.constants.values(), *defaults]
