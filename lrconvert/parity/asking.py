# SPDX-License-Identifier: Apache-2.0
"""Asking a backend every case, and holding its answers against the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.artifact.checks import Row
from lrconvert.errors import InputError
from lrconvert.parity.cases import DECODED, Case, kept, stream
from lrconvert.parity.expected import lost
from lrconvert.parity.graph import graph_rows, placement_rows, rotary_rows
from lrconvert.parity.hypotheses import closest_hypothesis
from lrconvert.parity.judging import Asked, judged, rounding_notes
from lrconvert.parity.measures import divergences
from lrconvert.parity.opened import Opened
from lrconvert.parity.options import Options
from lrconvert.parity.questions import LOADING, Questions, case_cost, reference_cost
from lrconvert.parity.readings import Readings, shares
from lrconvert.parity.reference_runner import ReferenceRunner, kept_of_batch
from lrconvert.parity.report import Report
from lrconvert.parity.tokens import token_rows
from lrconvert.progress import Progress, Steps
from lrconvert.rope import Tier
from lrconvert.runtimes.answers import Answer, AnswersCached, AnswersShift
from lrconvert.runtimes.tolerances import Tolerance

# What some sessions answer besides the cases: how progress names it, and the rows that come of it.
CHECKS: dict[Answer, tuple[str, Callable[[Opened], Iterable[Row]]]] = {
    "graph": ("the graph itself", graph_rows),
    "rotary": ("the rotary function alone", rotary_rows),
    "placements": ("where operators ran", placement_rows),
    "tokens": ("tokenisation", token_rows),
}


@dataclass(frozen=True)
class Run:
    """A verification under way: its cases, its options, and the report so far."""

    artifact: Path
    options: Options
    report: Report
    progress: Progress
    steps: Steps  # of the checks


def ask_backend(run: Run, questions: Questions, reference: ReferenceRunner) -> None:
    """Every case for one backend, into the report."""
    options, report, steps, backend = run.options, run.report, run.steps, questions.backend

    steps.start(f"{backend.name} code: loading", LOADING)
    try:
        session = backend.open(run.artifact, replace(options, longest=options.budget.most(backend.accepts)))
    except InputError as error:
        report.rows.append(Row(backend.name, "loads", "fail", reason=error.message))
        return
    with closing(session):
        report.runtimes[backend.name] = session.info
        rounding = backend.rounding(run.artifact, options, questions.dtype)
        step = backend.capability(reference.model).context_step or 1
        readings = Readings(step, questions.cases)
        opened = Opened(run.artifact, backend, session, questions.spec, reference, questions.dtype, rounding, readings)
        _ask(run, questions, opened)
        report.notes += rounding_notes((row for row in report.rows if row.code == backend.name), opened)
    report.losses += questions.dropped
    if questions.lost is not None:
        steps.start(f"{backend.name} code: what it can't express", questions.lost)
        report.rows += lost(backend.name, questions.recipe, questions.spec, reference, options.budget)


def _ask(run: Run, questions: Questions, opened: Opened) -> None:
    """The cases, what else the session answers, and whether the recipe explains its answers best."""
    rows, steps = run.report.rows, run.steps
    checks = [check for answer, check in CHECKS.items() if answer in opened.session.answers]
    steps.expect(LOADING, len(checks))

    def start(tier: Tier, tokens: int) -> None:
        steps.start(f"reference, set for {tier.max_length} tokens", reference_cost(tokens))

    for case in questions.cases:
        # One pass of the reference for all lengths of a tier, when the first of them comes: rows don't wait for others.
        opened.reference.prepare(opened.spec, questions.sharing(case), start)
        steps.start(f"{opened.name} code: {case.name}", case_cost(case))
        rows += _case_rows(case, opened)
    for what, check in checks:
        steps.start(f"{opened.name} code: {what}", LOADING)
        rows += check(opened)
    if questions.hypotheses is not None:
        steps.start(f"{opened.name} code: is the recipe the closest hypothesis?", questions.hypotheses)
        try:
            rows += closest_hypothesis(opened, lambda case: _forward(case, opened))
        except InputError as error:
            rows.append(Row(opened.name, "closest hypothesis", "fail", reason=error.message))


# --- cases -----------------------------------------------------------------------------------------------


def _case_rows(case: Case, opened: Opened) -> list[Row]:
    skipped = case.skipped
    if case.answer is not None and case.answer not in opened.session.answers:
        skipped = f"the runtime can't answer it ({case.answer})"
    if skipped:
        return [Row(opened.name, case.name, "skipped", length=case.length, reason=skipped)]
    tolerance = opened.backend.tolerance(opened.dtype, case.length)
    try:
        if case.cached:
            return _cached_rows(case, opened, tolerance)
        asked = ASKED[case.kind](case, opened)
    except InputError as error:
        return [Row(opened.name, case.name, "fail", length=case.length, reason=error.message)]
    row = judged(opened.name, case.name, case.length, asked, opened, tolerance, known=case.known)
    return [replace(row, trace=_trace(case, asked, opened)) if case.kind == "forward" else row]


def _trace(case: Case, asked: Asked, opened: Opened) -> tuple[tuple[int, float], ...]:
    """KL at every compared position of one sequence. The reference has its answer ready."""
    (answer,), (expected,) = asked.answers, asked.expect(opened.reference)
    if not np.isfinite(answer).all():
        return ()
    positions = case.positions() if case.spread else np.arange(case.length)
    compared = positions[kept(len(positions))]
    return tuple(zip(compared.tolist(), divergences(expected, answer).tolist(), strict=True))


def _ask_forward(case: Case, opened: Opened) -> Asked:
    return Asked([_forward(case, opened)], lambda reference: [reference.forward(opened.spec, case)])


def _forward(case: Case, opened: Opened) -> np.ndarray:
    """What the artifact answers to a forward case."""
    if shares(case):
        return opened.readings.logits(case, lambda longest, indices: _read(longest, indices, opened))
    return _read(case, kept(case.count), opened)


def _read(case: Case, keep: np.ndarray, opened: Opened) -> np.ndarray:
    """The logits of a forward case's sequence at indices."""
    tokens = stream(opened.vocabulary, case.count).tolist()
    where = {"positions": case.positions().tolist() if case.spread else None}
    return _logits(opened, tokens, keep=keep.tolist(), **where, **_context(case))


def _logits(opened: Opened, tokens: list[int], **how: Any) -> np.ndarray:
    (answer,) = opened.session.logits([tokens], **how)
    return answer


def _ask_batch(case: Case, opened: Opened) -> Asked:
    rows = [stream(opened.vocabulary, length, row).tolist() for row, length in enumerate(case.lengths)]
    count = len(kept_of_batch(case, 0))
    answered = opened.session.logits(rows, keep=list(range(-count, 0)), **_context(case))
    return Asked(
        answered, lambda reference: [reference.forward(opened.spec, case, row) for row in range(len(case.lengths))]
    )


def _ask_decode(case: Case, opened: Opened) -> Asked:
    prompt = stream(opened.vocabulary, case.lengths[0] - case.start)
    tokens, answers = opened.session.generate(prompt.tolist(), DECODED, **_context(case), **_start(case))
    where = {"context": case.context, "start": case.start}
    return Asked([answers], lambda ours: [ours.decoded(opened.spec, prompt, tokens, **where)])


def _cached_rows(case: Case, opened: Opened, tolerance: Tolerance) -> list[Row]:
    """Decoding with keys from before a boundary: against the reference that keeps them too, and the exact one."""
    session: AnswersCached = opened.answering("cached")
    prompt = stream(opened.vocabulary, case.lengths[0] - case.start)
    tokens, answers = session.generate(prompt.tolist(), DECODED, policy="cached", **_start(case))
    same, exact = (
        Asked(
            [answers],
            lambda ours, cached=cached: [ours.decoded(opened.spec, prompt, tokens, cached=cached, start=case.start)],
        )
        for cached in (True, False)
    )
    cost = "the cost of keeping a cache across the boundary, compared with the exact answer"
    name, length = f"{case.name}, against exact", case.length
    return [
        judged(opened.name, case.name, length, same, opened, tolerance),
        judged(opened.name, name, length, exact, opened, tolerance, known=cost),
    ]


def _ask_shift(case: Case, opened: Opened) -> Asked:
    session: AnswersShift = opened.answering("shift")
    tokens = stream(opened.vocabulary, case.lengths[0] + DECODED).tolist()
    read, more = tokens[: case.lengths[0]], tokens[case.lengths[0] :]
    answers = session.shifted(read, case.dropped, more, **_context(case))
    return Asked([answers], lambda reference: [reference.shifted(opened.spec, case)])


ASKED: dict[str, Callable[[Case, Opened], Asked]] = {
    "forward": _ask_forward,
    "batch": _ask_batch,
    "decode": _ask_decode,
    "shift": _ask_shift,
}


def _start(case: Case) -> dict[str, Any]:
    """The argument of sessions that decode anywhere."""
    return {"start": case.start} if case.start else {}


def _context(case: Case) -> dict[str, Any]:
    """The argument of sessions that answer "contexts"."""
    return {} if case.context is None else {"context": case.context}
