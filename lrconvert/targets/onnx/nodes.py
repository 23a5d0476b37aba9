# SPDX-License-Identifier: Apache-2.0
"""What a graph is built from: nodes, constants, and the operators that a model's weights need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.onnx_folder import INT8_PRODUCTS, MICROSOFT
from lrconvert.targets.onnx.tensors import ONNX_TYPES, Stored

# Of MatMulNBits, activations rounded to 8 bits as well. Without that, 8 bits are a hundred times slower on a CPU and 4
# bits half as fast; it moves the logits by a fiftieth of what the weights' own rounding to 4 bits does.
ACCURACY = INT8_PRODUCTS


class Nodes:
    """Nodes in order. Methods that add some return the name of their result."""

    def __init__(self, model: Model, stored: Sequence[Stored], computing: str) -> None:
        """`computing`: the dtype of activations, a safetensors name."""
        self.model, self.shape = model, model.shape
        self.type = ONNX_TYPES[computing]
        self.stored = {tensor.name: tensor for tensor in stored}
        self.nodes: list[NodeProto] = []
        self.between: list[Any] = []
        self.constants: dict[str, TensorProto] = {}
        self.scope: list[str] = []

    def op(
        self, kind: str, *inputs: str, name: str, outputs: Sequence[str] = (), domain: str = "", **attributes: Any
    ) -> str:
        full = ".".join([*self.scope, name])
        results = list(outputs) or [full]
        self.nodes.append(helper.make_node(kind, list(inputs), results, name=full, domain=domain, **attributes))
        return results[0]

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        array = np.array(values, dtype)
        kind = array.dtype.name + ("" if array.ndim else ".scalar")
        name = f"constant.{kind}.{'_'.join(map(str, array.reshape(-1).tolist()))}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, role: str, layer: int | None = None, expert: int | None = None) -> str:
        return self.model.roles[(role, layer) if expert is None else (role, layer, expert)].name

    def has(self, role: str, layer: int | None) -> bool:
        return (role, layer) in self.model.roles

    def linear(self, x: str, role: str, layer: int | None, expert: int | None = None) -> str:
        """x [n, in] → [n, out]."""
        return self.product(x, self.weight(role, layer, expert), self.bias(role, layer), role)

    def bias(self, role: str, layer: int | None) -> list[str]:
        """The bias of a role, where it has one."""
        return [self.weight(f"{role}_bias", layer)] if self.has(f"{role}_bias", layer) else []

    def product(self, x: str, name: str, bias: list[str], label: str) -> str:
        tensor = self.stored[name]
        if tensor.bits is None:
            return self.op("Gemm", x, name, *bias, name=label, transB=1)
        named, scales = f"{label}.product" if bias else label, self.scales(tensor)
        out = self._quantised_product(x, tensor, tensor.packed, scales, named, rows=tensor.shape[0])
        return self.op("Add", out, *bias, name=label) if bias else out

    def joined(self, x: str, roles: Sequence[str], layer: int, label: str) -> str:
        """x [n, in] → [n, out of all roles]: quantised weights as one, which rounds the activations once. What loads
        the graph joins them; in the file each has its own place and name."""
        tensors = [self.stored[self.weight(role, layer)] for role in roles]
        packed = self.op("Concat", *(tensor.packed for tensor in tensors), name=f"{label}.packed", axis=0)
        scales = self.op("Concat", *(tensor.scales for tensor in tensors), name=f"{label}.scales", axis=0)
        wide = self.op("Cast", scales, name=f"{label}.scales.wide", to=self.type)
        biases = [bias for role in roles for bias in self.bias(role, layer)]
        out = self._quantised_product(x, tensors[0], packed, wide, f"{label}.product" if biases else label,
                                      rows=sum(tensor.shape[0] for tensor in tensors))  # fmt: skip
        if not biases:
            return out
        return self.op("Add", out, self.op("Concat", *biases, name=f"{label}.bias", axis=0), name=label)

    def can_join(self, roles: Sequence[str], layer: int) -> bool:
        """Whether their weights are quantised alike, and all or none have a bias."""
        tensors = [self.stored[self.weight(role, layer)] for role in roles if self.has(role, layer)]
        alike = {(tensor.bits, tensor.block, tensor.shape[1]) for tensor in tensors}
        biased = {bool(self.bias(role, layer)) for role in roles}
        return len(tensors) == len(roles) and len(alike) == len(biased) == 1 and tensors[0].bits is not None

    def _quantised_product(self, x: str, tensor: Stored, packed: str, scales: str, name: str, *, rows: int) -> str:
        return self.op(
            "MatMulNBits", x, packed, scales, name=name, domain=MICROSOFT, K=tensor.shape[1], N=rows, bits=tensor.bits,
            block_size=tensor.block, accuracy_level=ACCURACY,
        )  # fmt: skip

    def scales(self, tensor: Stored) -> str:
        """In the type of activations: what loads the graph computes this once."""
        wide = f"{tensor.scales}.wide"
        if all(wide not in node.output for node in self.nodes):
            self.nodes.append(helper.make_node("Cast", [tensor.scales], [wide], name=wide, to=self.type))
        return wide

    def norm(self, x: str, role: str, layer: int | None) -> str:
        kind = {"rms": "RMSNormalization", "layer": "LayerNormalization"}[self.shape.norm]
        weight = self.weight(role, layer)
        if self.shape.norm_offset:  # a constant for what loads the graph
            weight = self.op("Add", weight, self.offset(), name=f"{role}.weight")
        return self.op(kind, x, weight, *self.bias(role, layer), name=role, axis=-1, epsilon=self.shape.norm_eps)

    def offset(self) -> str:
        """What norms add to their weights, in the type of the graph."""
        found = self.constant(self.shape.norm_offset, np.float32)
        if self.type == TensorProto.FLOAT:
            return found
        narrow = f"{found}.narrow"
        if all(narrow not in node.output for node in self.nodes):
            self.nodes.append(helper.make_node("Cast", [found], [narrow], name=narrow, to=self.type))
        return narrow

    def normed(self, x: str, role: str, layer: int) -> str:
        """x through a norm that not every family has."""
        return self.norm(x, role, layer) if self.has(role, layer) else x

    def gated(self, gate: str, up: str) -> str:
        """activation(gate) · up."""
        if self.shape.activation == "gelu_tanh":
            active = self.op("Gelu", gate, name="gate.gelu", approximate="tanh")
        else:
            active = self.op("Mul", gate, self.op("Sigmoid", gate, name="gate.sigmoid"), name="gate.silu")
        return self.op("Mul", active, up, name="gated")

    def times(self, x: str, multiplier: float, name: str, kind: int | None = None) -> str:
        """x · multiplier; a narrow x (`kind`: its type, by default the graph's) is widened, so that only the result is
        rounded."""
        kind = self.type if kind is None else kind
        if multiplier == 1.0:
            return x
        factor = self.constant(multiplier, np.float32)
        if kind == TensorProto.FLOAT:
            return self.op("Mul", x, factor, name=name)
        wide = self.op("Cast", x, name=f"{name}.operand", to=TensorProto.FLOAT)
        return self.op("Cast", self.op("Mul", wide, factor, name=f"{name}.wide"), name=name, to=kind)
