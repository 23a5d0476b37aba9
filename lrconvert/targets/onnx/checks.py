# SPDX-License-Identifier: Apache-2.0
"""What is read off an ONNX folder before it runs: is the graph well formed, are its tiers the recipe's?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lrconvert.artifact.checks import Row, rows_of
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.statements import Facts
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.base import FLOAT_DTYPES
from lrconvert.checkpoint.onnx_folder import GRAPH, OnnxCheckpoint
from lrconvert.errors import require
from lrconvert.families import ModelShape
from lrconvert.rope import RopeSpec, Tier, inverse_frequencies
from lrconvert.targets.onnx.statements import json_rows

CODE = "graph"


def checks(artifact: Path, stored: OnnxCheckpoint, model: Model, spec: RopeSpec, record: BakeRecord) -> list[Row]:
    """What the JSON files say; the graph by onnx's own checker, and tier by tier."""
    assert stored.tiers is not None  # our own graphs have them
    problems = tier_problems(stored.tiers, spec) + plain_problems(stored, model)
    dtype = stored.computing if stored.computing in FLOAT_DTYPES else "F32"
    return [
        *json_rows(Facts(artifact, model, spec, record, dtype, stored), stored),
        *_well_formed(artifact),
        *rows_of(CODE, "tiers are the recipe's", [(problem.partition(":")[0], problem) for problem in problems]),
        *rows_of(
            CODE,
            "attention and rotation are the model's",
            [(problem.partition(":")[0][:60], problem) for problem in operator_problems(stored, model)],
        ),
    ]


# What an attribute is where an operator does not say it.
_DEFAULTS = {
    "local_window_size": -1, "softcap": 0.0, "smooth_softmax": 0, "do_rotary": 0, "rotary_interleaved": 0, "scale": 0.0,
    "qk_output": 0, "is_causal": 0, "qk_matmul_output_mode": 0, "interleaved": 0, "rotary_embedding_dim": 0,
}  # fmt: skip
_LAYER = re.compile(r"layers\.(\d+)\.")


def operator_problems(stored: OnnxCheckpoint, model: Model) -> list[str]:
    """Attributes of attention and rotation that are not the model's. Some show in no short prompt: a window does where
    a prompt is longer than it."""
    problems = []
    for node in stored.graph.graph.node:
        found = {each.name: getattr(each, "f" if each.type == each.FLOAT else "i") for each in node.attribute}
        layer = _LAYER.match(node.name)
        wanted = _attributes(node.op_type, node.name, model.shape, int(layer[1]) if layer else 0)
        if wanted is None:
            continue
        for key in sorted(found.keys() | wanted.keys()):
            value, right = (each.get(key, _DEFAULTS.get(key)) for each in (found, wanted))
            if value is None or right is None or not math.isclose(value, right, rel_tol=1e-6):
                told = "has none" if right is None else f"needs {right:g}"
                problems.append(f"{node.name}: {key} is {value!r:.20}; the model {told}")
    return problems


def _attributes(kind: str, name: str, shape: ModelShape, layer: int) -> Mapping[str, float] | None:
    """Of an operator, those that the model decides; None where it decides nothing."""
    if kind == "RotaryEmbedding":
        heads = {"num_heads": shape.kv_heads if name.endswith("k.rotated") else shape.heads}
        part = {"rotary_embedding_dim": shape.rotary_dim} if shape.rotary_dim != shape.head_dim else {}
        return heads | part | {"interleaved": int(shape.neighbours)}
    factor = shape.multipliers.attention
    scale = {} if factor == 1.0 else {"scale": factor / shape.head_dim**0.5}
    if kind == "Attention":
        return {"q_num_heads": shape.heads, "kv_num_heads": shape.kv_heads} | scale
    if kind == "GroupQueryAttention":
        reach = shape.sliding[layer] if layer < len(shape.sliding) else 0
        heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
        return heads | {"local_window_size": reach or -1} | scale
    return None


def _well_formed(artifact: Path) -> list[Row]:
    checker = require("onnx", "onnx", "checking a graph").checker
    if any(path.is_symlink() for path in (artifact / GRAPH).parent.iterdir()):
        reason = "onnx takes no data files that are links, as those in the Hub's cache are"
        return [Row(CODE, "onnx.checker, full check", "skipped", reason=reason)]
    try:
        checker.check_model(str(artifact / GRAPH), full_check=True)
    except Exception as error:  # ValidationError, InferenceError: whatever onnx finds wrong
        return [Row(CODE, "onnx.checker, full check", "fail", reason=" ".join(str(error).split())[:300])]
    return [Row(CODE, "onnx.checker, full check", "pass")]


def plain_problems(stored: OnnxCheckpoint, model: Model) -> list[str]:
    """Rotations besides the recipe's: those of layers with a θ of their own, unscaled, each once."""
    shape = model.shape
    wanted = [inverse_frequencies(shape.rotary_dim, theta) for theta in dict.fromkeys(filter(None, shape.own_theta))]
    found = stored.plain
    if len(found) != len(wanted):
        return [f"the graph has {len(found)} rotations besides the recipe's; the model's layers need {len(wanted)}"]
    problems = []
    for right, (frequencies, tiers) in zip(wanted, found, strict=True):
        if frequencies.shape != right.shape or not np.allclose(frequencies, right, rtol=1e-12, atol=0):
            problems.append("plain rotation: another θ than the model's layers have")
        if any(set(t.factors) != {1.0} or t.attention_factor != 1.0 for t in tiers):
            problems.append("plain rotation: it is scaled")
    return problems


def tier_problems(found: tuple[Tier, ...], spec: RopeSpec) -> list[str]:
    """Every tier of the graph that differs from the recipe's."""
    problems = []
    if len(found) != len(spec.tiers):
        return [f"the graph has {len(found)} tiers; the recipe has {len(spec.tiers)}"]
    for ours, theirs in zip(spec.tiers, found, strict=True):
        where = f"tier up to {ours.max_length}"
        if ours.max_length != theirs.max_length:
            problems.append(f"{where}: the graph's ends at {theirs.max_length}")
        if ours.start_tokens != theirs.start_tokens:
            problems.append(f"{where}: {theirs.start_tokens} start tokens; the recipe has {ours.start_tokens}")
        if not math.isclose(ours.attention_factor, theirs.attention_factor, rel_tol=1e-12):
            problems.append(f"{where}: attention factor {theirs.attention_factor:.9g}, not {ours.attention_factor:.9g}")
        if len(ours.factors) != len(theirs.factors) or not np.allclose(
            ours.factors, theirs.factors, rtol=1e-12, atol=0
        ):
            problems.append(f"{where}: other factors than the recipe's")
    return problems
