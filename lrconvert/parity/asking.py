# SPDX-License-Identifier: Apache-2.0
"""Asking a piece of code every case, and holding its answers against the reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.errors import InputError
from lrconvert.parity.cases import DECODED, Case, build_cases, kept, stream
from lrconvert.parity.codes import Code, Options
from lrconvert.parity.graph import graph_rows
from lrconvert.parity.judge import Judge, kept_of_batch
from lrconvert.parity.measures import Measures, compare, merge
from lrconvert.parity.nearest import nearest
from lrconvert.parity.promise import lost
from lrconvert.parity.report import Report, Row, judged
from lrconvert.parity.tokens import tokenisation_of
from lrconvert.parity.tolerances import Tolerance, tolerance_for
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.base import Session
from lrconvert.runtimes.llama_cpp import LlamaSession
from lrconvert.runtimes.onnxruntime import OnnxSession

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A verification under way: what is asked, how, and the report that grows."""

    artifact: Path
    options: Options
    report: Report
    say: Progress


def ask_code(run: Run, code: Code, spec: RopeSpec, judge: Judge, dtype: str) -> None:
    """Every case for one code, into the report. `dtype` is what its products are computed in (`tolerances`)."""
    artifact, options, report = run.artifact, run.options, run.report
    capability = code.capability(judge.model.family)
    projected, losses = capability.fit(spec)
    projected = capability.round_boundaries(projected)
    edges = spec.boundaries[:1] if capability.once else None
    cases = list(build_cases(projected, capability, options.budget, asking=code.asking, edges=edges))
    run.say(f"{code.name} code: reference")
    judge.prepare(projected, [case for case in cases if not case.skipped])
    run.say(f"{code.name} code: loading")
    try:
        session = code.open(artifact, options)
    except InputError as error:
        report.rows.append(Row(code.name, "loads", "fail", reason=error.message))
        return
    with session:
        report.runtimes[code.name] = session.info
        for case in cases:
            run.say(f"{code.name} code: {case.name}")
            report.rows += _rows(code, case, projected, judge, session, dtype)
        if isinstance(session, OnnxSession):
            run.say(f"{code.name} code: the graph itself")
            report.rows += graph_rows(artifact, session, projected, judge, device=options.device)
        if isinstance(session, LlamaSession):
            run.say(f"{code.name} code: tokenisation")
            report.rows += tokenisation_of(judge.model.checkpoint, session)
        if code.coarse(dtype):
            run.say(f"{code.name} code: is the recipe nearest?")
            contexts = isinstance(session, LlamaSession)
            try:
                report.rows += nearest(
                    code.name, projected, judge, lambda case: _logits(case, judge, session), contexts=contexts
                )
            except InputError as error:
                report.rows.append(Row(code.name, "nearest to the recipe", "fail", reason=error.message))
    for loss in losses:
        report.losses.append(loss)
    if losses:
        run.say(f"{code.name} code: what it can't express")
        report.rows += lost(code.name, spec, projected, judge, options.budget)


def _rows(code: Code, case: Case, spec: RopeSpec, judge: Judge, session: Session, dtype: str) -> list[Row]:
    if case.skipped:
        return [Row(code.name, case.name, "skipped", length=case.length, reason=case.skipped)]
    tolerance = tolerance_for(code.name, dtype, case.length)
    try:
        if case.cached:
            return _cached_rows(code, case, spec, judge, session, tolerance)
        measures = _ask(case, spec, judge, session)
    except InputError as error:
        return [Row(code.name, case.name, "fail", length=case.length, reason=error.message)]
    return [judged(code.name, case.name, case.length, measures, tolerance, known=case.known)]


def _cached_rows(
    code: Code, case: Case, spec: RopeSpec, judge: Judge, session: Session, tolerance: Tolerance
) -> list[Row]:
    """Decoding with keys from before a boundary: against the reference that keeps them too, and what that costs."""
    assert isinstance(session, OnnxSession)
    prompt = stream(judge.model.shape.vocab, case.lengths[0])
    tokens, answers = session.generate(prompt.tolist(), DECODED, policy="cached")
    same, exact = (compare(judge.decoded(spec, prompt, tokens, cached=kept), answers) for kept in (True, False))
    cost = "what a cache costs that is kept across the boundary, against the exact answer"
    return [
        judged(code.name, case.name, case.length, same, tolerance),
        Row(code.name, f"{case.name}, against exact", "known", length=case.length, reason=cost, **vars(exact)),
    ]


def _ask(case: Case, spec: RopeSpec, judge: Judge, session: Session) -> Measures:
    vocabulary = judge.model.shape.vocab
    room = _room(case)
    if case.kind == "shift":
        assert isinstance(session, LlamaSession)
        tokens = stream(vocabulary, case.lengths[0] + DECODED).tolist()
        read, more = tokens[: case.lengths[0]], tokens[case.lengths[0] :]
        return compare(judge.shifted(spec, case), session.shifted(read, case.dropped, more, **room))
    if case.kind == "decode":
        prompt = stream(vocabulary, case.lengths[0])
        tokens, answers = session.generate(prompt.tolist(), DECODED, **room)
        return compare(judge.decoded(spec, prompt, tokens, context=case.context), answers)
    if case.kind == "batch":
        rows = [stream(vocabulary, length, row).tolist() for row, length in enumerate(case.lengths)]
        count = len(kept_of_batch(case, 0))
        answered = session.logits(rows, keep=list(range(-count, 0)), **room)
        parts = [compare(judge.forward(spec, case, row), answer) for row, answer in enumerate(answered)]
        return merge(parts, [count] * len(parts))
    return compare(judge.forward(spec, case), _logits(case, judge, session))


def _logits(case: Case, judge: Judge, session: Session) -> np.ndarray:
    """What the artifact answers to a forward case."""
    positions = case.positions() if case.spread else None
    tokens = stream(judge.model.shape.vocab, case.length if positions is None else len(positions))
    (answer,) = session.logits(
        [tokens.tolist()],
        positions=None if positions is None else positions.tolist(),
        keep=kept(len(tokens)).tolist(),
        **_room(case),
    )
    return answer


def _room(case: Case) -> dict[str, Any]:
    """What code with contexts is asked besides; others know none."""
    return {} if case.context is None else {"context": case.context}
