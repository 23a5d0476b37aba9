# SPDX-License-Identifier: Apache-2.0
"""Experts in standard operators: every expert reads the tokens that use it, and no others.

Gates are computed first, in float32 whatever the type of the graph is: [B·S, experts], zero where an expert isn't used.
ONNX Runtime's own MoE takes about twice the time on a CPU (benchmarks/onnx_experts.py), and float32 alone.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from lrconvert.families.experts import SPARSEMIXER_USED, Experts
from lrconvert.targets.onnx.nodes import Nodes


def mixture(graph: Nodes, x: str, layer: int) -> str:
    """Σ gate · expert(x), [B·S, hidden], of the type of the graph."""
    experts = graph.shape.experts
    assert experts is not None
    scope = graph.scope
    scores = graph.linear(x, "router", layer)
    if graph.type != TensorProto.FLOAT:
        scores = graph.op("Cast", scores, name="router.wide", to=TensorProto.FLOAT)
    gating = {"sparsemixer": _sparsemixer, "softmax": _softmax}[experts.gating]
    gates = gating(graph, scores, experts)
    columns = [f"layers.{layer}.experts.{expert}.gates" for expert in range(experts.count)]
    graph.op("Split", gates, name="gates.split", outputs=columns, axis=1, num_outputs=experts.count)
    shape = graph.op("Shape", x, name="experts.shape")
    made = graph.op("Expand", graph.constant(0.0, np.float32), shape, name="experts.none")
    for expert, column in enumerate(columns):
        graph.scope = [*scope, f"experts.{expert}"]
        made = _added(graph, made, x, column, layer, expert)
    graph.scope = scope
    if graph.type != TensorProto.FLOAT:
        made = graph.op("Cast", made, name="experts.made", to=graph.type)
    return _with_shared(graph, made, x, layer) if experts.shared else made


def _with_shared(graph: Nodes, made: str, x: str, layer: int) -> str:
    """`made` and what the expert adds that every token uses."""
    gate, up = (graph.linear(x, role, layer) for role in ("shared_gate", "shared_up"))
    answer = graph.linear(graph.gated(gate, up), "shared_down", layer)
    share = graph.op("Sigmoid", graph.linear(x, "shared_router", layer), name="shared.share")
    return graph.op("Add", made, graph.op("Mul", answer, share, name="shared.weighted"), name="shared.added")


def _added(graph: Nodes, made: str, x: str, gates: str, layer: int, expert: int) -> str:
    """`made` [B·S, hidden] and what an expert adds to it. `gates` [B·S, 1]."""
    flat = graph.op("Reshape", gates, graph.constant([-1]), name="gates.flat")
    used = graph.op("NonZero", flat, name="used.row")
    used = graph.op("Reshape", used, graph.constant([-1]), name="used")
    own = graph.op("Gather", x, used, name="tokens")
    gate, up = (graph.linear(own, role, layer, expert) for role in ("expert_gate", "expert_up"))
    answer = graph.linear(graph.gated(gate, up), "expert_down", layer, expert)
    if graph.type != TensorProto.FLOAT:
        answer = graph.op("Cast", answer, name="answer.wide", to=TensorProto.FLOAT)
    weighted = graph.op("Mul", answer, graph.op("Gather", gates, used, name="own_gates"), name="weighted")
    places = graph.op("Reshape", used, graph.constant([-1, 1]), name="places")
    return graph.op("ScatterND", made, places, weighted, name="added", reduction="add")


def _softmax(graph: Nodes, scores: str, experts: Experts) -> str:
    """The largest of the softmax over all, divided by their sum where they are normalised."""
    soft = graph.op("Softmax", scores, name="router.softmax", axis=-1)
    scope = ".".join([*graph.scope, "router"])
    largest, which = f"{scope}.largest", f"{scope}.which"
    graph.op("TopK", soft, graph.constant([experts.used]), name="router.topk", outputs=(largest, which), axis=-1)
    if experts.normalised:
        total = graph.op("ReduceSum", largest, graph.constant([-1]), name="router.total", keepdims=1)
        largest = graph.op("Div", largest, total, name="router.normalised")
    shape = graph.op("Shape", soft, name="router.shape")
    none = graph.op("Expand", graph.constant(0.0, np.float32), shape, name="router.none")
    return graph.op("ScatterElements", none, which, largest, name="gates", axis=-1)


def _sparsemixer(graph: Nodes, scores: str, experts: Experts) -> str:
    """Two experts, one after the other: see `families.experts`."""
    numbers = graph.constant(range(experts.count))
    never, left = graph.constant(-np.inf, np.float32), scores
    reach = graph.constant(2 * experts.jitter, np.float32)
    sizes = graph.op("Abs", scores, name="router.sizes")
    gates = ""
    for turn in range(SPARSEMIXER_USED):
        name = f"router.{turn}"
        best = graph.op("ReduceMax", left, graph.constant([-1]), name=f"{name}.best", keepdims=1)
        which = graph.op("ArgMax", left, name=f"{name}.which", axis=-1, keepdims=1)
        behind = graph.op("Sub", best, scores, name=f"{name}.behind")
        size = graph.op("Max", sizes, best, name=f"{name}.size")
        far = graph.op("Greater", graph.op("Div", behind, size, name=f"{name}.distance"), reach, name=f"{name}.far")
        near = graph.op("Where", far, never, left, name=f"{name}.near")
        soft = graph.op("Softmax", near, name=f"{name}.softmax", axis=-1)
        chosen = graph.op("Equal", numbers, which, name=f"{name}.chosen")
        before = gates or graph.constant(0.0, np.float32)
        gates = graph.op("Where", chosen, soft, before, name=f"{name}.gates")
        left = graph.op("Where", chosen, never, left, name=f"{name}.left")
    return gates
