# SPDX-License-Identifier: Apache-2.0
"""What is read off an ONNX folder before it runs: is the graph well formed, are its tiers the recipe's?"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from lrconvert.artifact.checks import Row, rows_of
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.statements import Facts
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.base import FLOAT_DTYPES
from lrconvert.checkpoint.onnx_folder import GRAPH, OnnxCheckpoint
from lrconvert.errors import require
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
    ]


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
