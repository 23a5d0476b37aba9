# SPDX-License-Identifier: Apache-2.0
"""Rows to train on: their length, their positions, and which of their losses count."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support.extending import any_text, encode, key_maker, tokenizer

from lrconvert.errors import InputError
from lrconvert.training.rows import KEY_TOKENS, Row, RowOptions, jumping_positions, key_places, make_row

TEXT = any_text(5000, vocab=200)


def row(options: RowOptions, *seed: int, texts: list[np.ndarray] | None = None) -> Row:
    maker = key_maker() if options.keys else None
    return make_row(texts or [TEXT], options, maker, np.random.default_rng(seed))


@pytest.mark.parametrize("keys", [0, 1, 3, 8])
@pytest.mark.parametrize("length", [83, 300, 1000])
def test_a_row_has_its_length(length: int, keys: int) -> None:
    """Exactly, whatever its keys take; half of a row stays text."""
    for seed in range(10):
        made = row(RowOptions(length, 4000, (1, 4), keys), seed)
        assert len(made.tokens) == len(made.positions) == length
        assert len(made.text) == len(made.answers) == length - 1
        assert made.text.sum() >= length // 2 - 1
        asked = min(keys, length // (2 * KEY_TOKENS))
        assert made.answers.sum() == 5 * asked  # digits, each a token of its own


@pytest.mark.parametrize("jumps", [(1, 1), (1, 4), (3, 3)])
def test_positions_jump_within_the_span(jumps: tuple[int, int]) -> None:
    """They always grow, start at 0, stay below the span, and jump at most as often as they may."""
    counts = []
    for seed in range(200):
        at = jumping_positions(RowOptions(64, 512, jumps), np.random.default_rng(seed))
        steps = np.diff(at)
        assert at[0] == 0 and at[-1] < 512 and (steps >= 1).all()
        counts.append(int((steps > 1).sum()))
    # A jump may lead nowhere, when two of them end at the same place: the most occurs, no more does.
    assert max(counts) == jumps[1] and np.mean(counts) > 0.8 * np.mean(jumps)


@pytest.mark.parametrize("options", [RowOptions(64, 512), RowOptions(64, 64, (1, 4)), RowOptions(64, 32, (1, 4))])
def test_without_jumps_or_room_positions_are_consecutive(options: RowOptions) -> None:
    assert jumping_positions(options, np.random.default_rng(0)).tolist() == list(range(64))


def test_the_farthest_distances_occur() -> None:
    """Of rows with one jump, as many touch the end of the span as they have tokens of it: a quarter here. Without that
    the longest distance would occur in one row of hundreds."""
    ends = [jumping_positions(RowOptions(64, 256, (1, 1)), np.random.default_rng(seed))[-1] for seed in range(2000)]
    assert np.mean(np.array(ends) == 255) == pytest.approx(0.25, abs=0.04)
    spread = np.histogram([end for end in ends if end < 255], bins=4, range=(63, 255))[0]
    assert spread.min() > 0.8 * spread.max()  # and all others are equally likely


def test_answers_are_the_digits_behind_each_question() -> None:
    """Every answer stands behind its question, is the key that the text hides, and nothing else counts as an answer."""
    made = row(RowOptions(1000, 1000, (0, 0), 8), 3)
    tokens, targets = made.tokens, np.flatnonzero(made.answers) + 1
    runs = np.split(targets, np.flatnonzero(np.diff(targets) > 1) + 1)
    assert [len(run) for run in runs] == [5] * 8
    hidden = tokenizer().decode(tokens[: runs[0][0] - 5].tolist())
    for run in runs:
        digits = tokenizer().decode(tokens[run].tolist())
        before = tokenizer().decode(tokens[run[0] - 8 : run[0]].tolist())
        assert re.fullmatch(r"\d{5}", digits) and digits in hidden
        assert hidden.index(digits) > 0 and before[-4:] in hidden[: hidden.index(digits)]
        assert encode(digits) == tokens[run].tolist()


def test_text_is_neither_keys_nor_questions() -> None:
    """The tokens that count as text are those of the text, in its order; its first one has no loss."""
    made = row(RowOptions(600, 600, (0, 0), 5), 1)
    own = made.tokens[1:][made.text]
    starts = np.flatnonzero((TEXT[:-1] == own[0]) & (TEXT[1:] == own[1]))
    assert any(np.array_equal(TEXT[start : start + len(own)], own) for start in starts)
    assert not (made.text & made.answers).any()


def test_keys_stand_at_both_ends_of_many_texts() -> None:
    """Of 400 texts of 1000 tokens about half have a key in front of all text, half one behind it; all other places are
    equally likely. A key alone stands anywhere."""
    places = np.array([key_places(1000, 8, np.random.default_rng(seed)) for seed in range(400)])
    assert (np.diff(places) >= 0).all()
    for end in (places[:, 0] == 0, places[:, -1] == 1000):
        assert end.mean() == pytest.approx(0.5, abs=0.08)
    inner = places[(places > 0) & (places < 1000)]
    assert inner.mean() == pytest.approx(500, abs=20) and inner.std() == pytest.approx(1000 / 12**0.5, abs=15)
    alone = np.concatenate([key_places(1000, 1, np.random.default_rng(seed)) for seed in range(400)])
    assert alone.min() > 0 and alone.max() < 1000 and len(key_places(1000, 0, np.random.default_rng(0))) == 0


def test_a_row_depends_on_its_seed_alone() -> None:
    """The same seed and step make the same row, others another one."""
    options = RowOptions(200, 2000, (1, 4), 2)
    one, same, other = row(options, 7, 1, 0), row(options, 7, 1, 0), row(options, 7, 2, 0)
    for name in ("tokens", "positions", "text", "answers"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
    assert not np.array_equal(one.tokens, other.tokens) and not np.array_equal(one.positions, other.positions)


def test_rows_come_from_all_long_texts() -> None:
    """A text that is too short is passed over; of the others, places are equally likely."""
    texts = [np.full(300, 5), np.full(20, 6), np.full(100, 7)]
    first = [int(row(RowOptions(50, 50), seed, texts=texts).tokens[0]) for seed in range(400)]
    assert set(first) == {5, 7} and np.mean(np.array(first) == 7) == pytest.approx(51 / 302, abs=0.05)
    small = [np.array([0, 1, 2]), np.array([9]), np.array([3, 4])]
    assert {tuple(row(RowOptions(2, 2), seed, texts=small).tokens) for seed in range(60)} == {(0, 1), (1, 2), (3, 4)}


def test_too_short_texts_are_bad_input() -> None:
    with pytest.raises(InputError, match=r"a row needs 50 tokens of text; the longest has 20\. Use longer texts"):
        row(RowOptions(50, 50), texts=[np.arange(20), np.arange(9)])
    assert len(row(RowOptions(20, 50), texts=[np.arange(20)]).tokens) == 20
