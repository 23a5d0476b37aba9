# SPDX-License-Identifier: Apache-2.0
"""One reading answers the lengths below and at a boundary, and nothing else that it should not."""

from __future__ import annotations

import numpy as np
import pytest

from lrconvert.engines.capability import LLAMA_CPP
from lrconvert.parity.cases import CPU, SPREAD_TOKENS, Case, build_cases, kept
from lrconvert.parity.readings import Readings, shares
from lrconvert.rope import RopeSpec, Tier
from lrconvert.runtimes.backend import Accepts

STEP = 256
BELOW = Case("below 512", "forward", (511,), context=511)
AT = Case("at 512", "forward", (512,), context=512)
PAST = Case("one past 512", "forward", (513,), context=513)
SHORT = Case("short prompt, long context", "forward", (256,), context=768)
AGAIN = Case("closest hypothesis, context of 513", "forward", (256,), context=513)


class Session:
    """Answers index, tokens and context in place of logits, so that an answer tells where it came from."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, case: Case, indices: np.ndarray) -> np.ndarray:
        assert case.context is not None
        self.asked.append((case.count, case.context))
        return np.array([[index, case.count, case.context] for index in indices])


@pytest.fixture
def session() -> Session:
    return Session()


def test_below_and_at_a_boundary_are_one_reading(session: Session) -> None:
    """Each gets the logits at its own indices."""
    readings = Readings(STEP, [BELOW, AT, PAST])
    for case in (BELOW, AT):
        np.testing.assert_array_equal(readings.logits(case, session)[:, 0], kept(case.length))
    assert session.asked == [(512, 512)]
    readings.logits(PAST, session)
    assert session.asked == [(512, 512), (513, 513)]  # another size of context: another set


def test_in_whatever_order_they_come(session: Session) -> None:
    readings = Readings(STEP, [BELOW, AT])
    readings.logits(AT, session)
    np.testing.assert_array_equal(readings.logits(BELOW, session)[:, 0], kept(511))
    assert len(session.asked) == 1


def test_a_prompt_that_is_asked_again_is_not_read_again(session: Session) -> None:
    """Contexts of 513 and of 768 tokens are one size: the search for mistakes has the case's answer."""
    readings = Readings(STEP, [SHORT])
    first = readings.logits(SHORT, session)
    np.testing.assert_array_equal(readings.logits(AGAIN, session), first)
    assert len(session.asked) == 1


def test_a_short_prompt_is_a_question_of_its_own(session: Session) -> None:
    """A program might choose by the tokens that it was given: a longer prompt would not show that."""
    long = Case("one past 512", "forward", (700,), context=768)
    readings = Readings(STEP, [long, SHORT])
    readings.logits(long, session)
    readings.logits(SHORT, session)
    assert session.asked == [(700, 768), (256, 768)]


def test_so_are_the_tokens_before_a_far_boundary(session: Session) -> None:
    """Those below begin where those at it do, and lack the last one. One past it is another context."""
    spec = RopeSpec("llama", 2, 10000.0, 8192, 65536, (Tier(8192, (1.0,)), Tier(65536, (2.0,))))
    cases = list(build_cases(spec, LLAMA_CPP, CPU, accepts=Accepts("consecutive", decodes_anywhere=True)))
    below, at, past = (
        next(case for case in cases if case.name == f"{where} 8192") for where in ("below", "at", "one past")
    )
    assert below.consecutive and at.consecutive and past.consecutive
    np.testing.assert_array_equal(below.positions(), np.arange(8192 - SPREAD_TOKENS, 8191))
    np.testing.assert_array_equal(at.positions(), np.arange(8192 - SPREAD_TOKENS, 8192))
    np.testing.assert_array_equal(past.positions(), np.arange(8193 - SPREAD_TOKENS, 8193))
    readings = Readings(STEP, cases)
    for case in (below, at, past):
        np.testing.assert_array_equal(readings.logits(case, session)[:, 0], kept(case.count))
    assert session.asked == [(SPREAD_TOKENS, 8192), (SPREAD_TOKENS, 8193)]


def test_a_skipped_case_is_not_read_for_another(session: Session) -> None:
    skipped = Case("at 512", "forward", (512,), context=512, skipped="too long")
    readings = Readings(STEP, [BELOW, skipped])
    readings.logits(BELOW, session)
    assert session.asked == [(511, 511)]


def test_only_consecutive_tokens_in_contexts_share() -> None:
    """Code that chooses by length is asked at every length, and spread positions are no prefix."""
    assert shares(AT)
    assert not shares(Case("at 512", "forward", (512,)))
    assert not shares(Case("far end", "forward", (9000,), spread=True, context=9000))
    assert not shares(Case("decode", "decode", (512,), context=520))
