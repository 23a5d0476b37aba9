# SPDX-License-Identifier: Apache-2.0
"""Measurements of an ONNX graph beyond its logits: is its rotary function exact at any position, and does a second
implementation of the operators agree? What the file alone shows is in the target's checks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from lrconvert.artifact.checks import Row
from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint
from lrconvert.errors import InputError
from lrconvert.parity.cases import stream
from lrconvert.parity.judging import Asked, judged
from lrconvert.parity.opened import Opened
from lrconvert.parity.tolerances import COS_SIN_ERROR
from lrconvert.runtimes.answers import AnswersGraph, AnswersPlacements, AnswersRotary

CODE = "graph"
EVALUATOR = "onnx.reference"
POSITIONS = (4096, 262144, 2097152)  # where float32 angles are off by 2.5e-5, 2.5e-3 and 7.7e-2
DENSE = 64  # positions before each of them
# onnx.reference computes with plain NumPy: seconds for a small model, minutes for a large one.
MOST_PARAMETERS = 2 * 10**8
EVALUATED = 48


def graph_rows(opened: Opened) -> list[Row]:
    """The graph evaluated by a second implementation of its operators, and a batch that it has to refuse."""
    return [
        *_evaluated(OnnxCheckpoint(opened.artifact), opened),
        *(() if opened.backend.accepts.padded else _padding(opened)),
    ]


def rotary_rows(opened: Opened) -> Iterator[Row]:
    """The function alone against the reference's float64, by the runtime and by onnx.reference."""
    session: AnswersRotary = opened.answering("rotary")
    stored, spec = OnnxCheckpoint(opened.artifact), opened.spec
    starts = [t.start_tokens for t in spec.tiers]
    for end in sorted({*(p for p in POSITIONS if p <= spec.window or stored.double), spec.window, *spec.boundaries}):
        near = {0, 1, *(place for start in starts for place in (start - 1, start, start + 1))}
        positions = sorted({*(p for p in near if 0 <= p < end), *range(max(0, end - DENSE), end)})
        expected = opened.reference.cos_sin(spec, np.array(positions))
        for evaluator in (False, True):
            name = f"cos and sin at {end}{f', by {EVALUATOR}' if evaluator else ''}"
            try:
                answered = session.cos_sin(positions, evaluator=evaluator)
            except InputError as error:
                yield Row(CODE, name, "fail", length=end, reason=error.message)
                continue
            if any(a.shape != b.shape for a, b in zip(expected, answered, strict=True)):
                yield Row(CODE, name, "fail", length=end, reason=f"{answered[0].shape[-1]} pairs of channels rotate")
                continue
            error = max(float(np.abs(a - b).max()) for a, b in zip(expected, answered, strict=True))
            good = error <= COS_SIN_ERROR  # NaN is not
            reason = f"off by {error:.1e}" + ("" if good else f"; {COS_SIN_ERROR:.0e} allowed")
            yield Row(CODE, name, "pass" if good else "fail", length=end, reason="" if good else reason)


def _evaluated(stored: OnnxCheckpoint, opened: Opened) -> Iterator[Row]:
    """The whole graph in onnx.reference, where it consists of standard operators."""
    count = sum(math.prod(info.shape) for info in stored.tensors.values())
    if stored.attention != "standard" or not stored.kinds <= {"F32", "F16"} or count > MOST_PARAMETERS:
        return
    session: AnswersGraph = opened.answering("graph")
    tokens = stream(opened.vocabulary, min(EVALUATED, opened.spec.tiers[0].max_length))
    keep = np.arange(len(tokens))
    name = f"the whole graph by {EVALUATOR}"
    try:
        answer = session.evaluated(tokens.tolist(), keep.tolist())
    except InputError as error:
        yield Row(CODE, name, "fail", length=len(tokens), reason=error.message)
        return
    asked = Asked([answer], lambda reference: [reference.answer(opened.spec, tokens, len(tokens), keep)])
    dtype = "F16" if "F16" in stored.kinds else "F32"
    tolerance = opened.backend.tolerance(dtype, len(tokens))
    yield judged(CODE, name, len(tokens), asked, opened, tolerance)


def _padding(opened: Opened) -> Iterator[Row]:
    """A batch padded on the left: an error, or no number, where attention would take padding for tokens."""
    rows = [stream(opened.vocabulary, length).tolist() for length in (8, 5)]
    name = "left-padded batch is refused"
    try:
        answers = opened.session.logits(rows, keep=[-1])
    except InputError:
        yield Row(CODE, name, "pass")
    else:
        refused = not np.isfinite(answers[1]).any()
        reason = "" if refused else "it answers, although GroupQueryAttention reads padding as tokens"
        yield Row(CODE, name, "pass" if refused else "fail", reason=reason)


def placement_rows(opened: Opened) -> Iterator[Row]:
    """A node that falls back to the CPU is right and slow, and says nothing of the GPU."""
    session: AnswersPlacements = opened.answering("placements")
    found, name = session.on_cpu(), "all products on the GPU"
    reason = f"on the CPU: {', '.join(found[:5])}" if found else ""
    yield Row(CODE, name, "fail" if found else "pass", reason=reason)
