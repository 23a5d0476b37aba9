# SPDX-License-Identifier: Apache-2.0
"""Which tokens count, and what they see, in every protocol: by hand, and by what has to hold whatever is asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.evals_oracle import VOCAB, Oracle

from lrconvert.errors import InputError, UsageError
from lrconvert.evals.perplexity import measure_perplexity
from lrconvert.evals.protocols import Plan, document_starts, excerpt_ends


def spans(plan: Plan, texts: list[int], length: int) -> list[tuple[int, int, int]]:
    """Start, end and judged tokens of every pass."""
    return [(context.start, context.end, context.judged) for context in plan.contexts(texts, length)]


def test_excerpts_share_no_judged_tokens() -> None:
    """As many as were asked for where they fit, over all texts that are long enough."""
    assert excerpt_ends([10_000], 4096, 3) == [(0, 10_000), (0, 7048), (0, 4096)]
    assert excerpt_ends([5000, 100, 9000], 4096, 4) == [(0, 5000), (2, 9000), (2, 4096)]
    assert excerpt_ends([4096], 4096, 4) == [(0, 4096)]


def test_the_default_is_the_same_tokens_behind_every_length() -> None:
    """Ends don't move with the length; what counts is less than the shortest context."""
    plan = Plan((100, 400), excerpts=1)
    assert spans(plan, [1000], 400) == [(600, 1000, 99)]
    assert spans(plan, [1000], 100) == [(900, 1000, 99)]
    assert Plan((2048, 4096)).counted == 1024 and "last 1024 tokens" in Plan((2048, 4096)).sentence


def test_whole_documents_are_cut_at_each_length() -> None:
    """They begin where the texts begin; several of one text share nothing; too short a text has none."""
    plan = Plan((50, 100), whole=True, excerpts=4)
    assert spans(plan, [120, 99, 350], 100) == [(0, 100, 99), (0, 100, 99), (250, 350, 99)]
    assert spans(plan, [120, 99, 350], 50) == [(0, 50, 49), (0, 50, 49), (250, 300, 49)]
    assert document_starts(plan, [1000]) == [(0, 0), (0, 300), (0, 600), (0, 900)]


def test_a_sliding_window_counts_what_it_is_the_first_to_reach() -> None:
    """By hand: contexts of 8 that move by 3 over 16 tokens; the last one has only two new tokens left."""
    plan = Plan((8,), step=3, document_tokens=16, excerpts=1)
    assert spans(plan, [40], 8) == [(0, 8, 7), (3, 11, 3), (6, 14, 3), (8, 16, 2)]


@given(
    length=st.integers(2, 60),
    step=st.integers(1, 60),
    more=st.integers(0, 100),
    excerpts=st.integers(1, 5),
    spare=st.integers(0, 300),
)
def test_sliding_windows_count_every_token_once(length: int, step: int, more: int, excerpts: int, spare: int) -> None:
    """All but the first token of each document, at most once, and exactly once where contexts overlap."""
    step = min(step, length)
    plan = Plan((length,), step=step, document_tokens=length + more, excerpts=excerpts)
    texts = [plan.needed + spare, plan.needed - 1]
    starts = [start for _, start in document_starts(plan, texts)]
    counted: list[int] = []
    for context in plan.contexts(texts, length):
        assert context.text == 0 and context.end - context.start == length
        assert 1 <= context.judged <= (length - 1 if context.start in starts else min(step, length - 1))
        counted += range(context.end - context.judged, context.end)
    wanted = {place for start in starts for place in range(start + 1, start + plan.needed)}
    # Contexts that share nothing have a first token each, which nothing precedes.
    lost = (
        {start + chunk for start in starts for chunk in range(length, plan.needed, length)} if step == length else set()
    )
    assert len(counted) == len(set(counted)) and wanted - lost <= set(counted) <= wanted


def test_contexts_that_share_nothing_do_not_count_their_first_tokens() -> None:
    assert spans(Plan((8,), step=8, document_tokens=20, excerpts=1), [20], 8) == [(0, 8, 7), (8, 16, 7), (12, 20, 4)]


def test_cut_at_the_length_a_sliding_window_is_the_whole_document() -> None:
    """Nothing is left to move over; so both options together are LongRoPE's protocol."""
    texts = [500, 700]
    whole = Plan((64, 256), whole=True, excerpts=2)
    assert spans(Plan((256,), step=64, excerpts=2), texts, 256) == spans(whole, texts, 256)
    both = Plan((64, 256), whole=True, step=64, document_tokens=400, excerpts=2)
    assert both.protocol(64).name == "whole" and both.protocol(256).name == "sliding window"
    assert spans(both, texts, 64) == spans(whole, texts, 64)
    assert both.sentence.startswith("up to 64 tokens: perplexity of whole documents")
    assert "; beyond: perplexity of the first 400 tokens" in both.sentence


def test_figures_of_every_protocol_say_what_they_are_made_of() -> None:
    """Uniform guesses have the vocabulary as perplexity whatever counts; tokens, excerpts and protocol are kept."""
    text = np.random.default_rng(0).integers(1, VOCAB, size=700)
    guesses = Oracle(sharpness=0.0)
    for plan, name, tokens, excerpts in (
        (Plan((100,), judged=64, excerpts=2), "same tokens", 64, 1),
        (Plan((100,), whole=True, excerpts=3), "whole", 3 * 99, 3),
        (Plan((100,), step=40, document_tokens=300, excerpts=3), "sliding window", 2 * 299, 2),
    ):
        (row,) = measure_perplexity(guesses, [text], plan)
        assert (row.protocol, row.tokens, row.excerpts) == (name, tokens, excerpts)
        assert row.perplexity.value == pytest.approx(VOCAB)
        assert row.perplexity.low <= row.perplexity.value <= row.perplexity.high


def test_the_passes_are_those_of_the_plan() -> None:
    """Of every text its own tokens, from where a context starts to where it ends."""
    texts, oracle = [np.arange(1, 401), np.arange(1001, 1301)], Oracle()
    plan = Plan((100,), step=40, document_tokens=180, excerpts=3)
    measure_perplexity(oracle, texts, plan)
    contexts = plan.contexts([400, 300], 100)
    assert {context.text for context in contexts} == {0, 1} and any(context.start for context in contexts)
    assert oracle.asked == [texts[each.text][each.start : each.end].tolist() for each in contexts]


def test_losses_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="not all numbers"):
        measure_perplexity(Oracle(sharpness=np.nan), [np.ones(100, dtype=int)], Plan((50,), whole=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lengths": (1,)}, "no token to predict"),
        ({"lengths": (8,), "whole": True, "judged": 4}, "--judged can't be combined with"),
        ({"lengths": (8,), "document_tokens": 9}, "--document-tokens needs --sliding-window"),
        ({"lengths": (8, 32), "step": 9}, "--sliding-window 9 is longer than the contexts of 8 tokens"),
        ({"lengths": (8, 32), "step": 8, "document_tokens": 31}, "less than the longest length, 32"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(wrong: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Plan(**wrong)


def test_texts_that_are_too_short_say_by_how_much() -> None:
    with pytest.raises(InputError, match="the longest text has 80 tokens; 90 are needed"):
        Plan((50,), step=50, document_tokens=90).contexts([20, 80], 50)
