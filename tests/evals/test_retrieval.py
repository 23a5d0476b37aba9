# SPDX-License-Identifier: Apache-2.0
"""Many keys behind one reading: where they stand, who finds them, and a model in memory as a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from support.extending import any_text, encode, scaled

from lrconvert.checkpoint import Model
from lrconvert.data import DATA
from lrconvert.errors import InputError
from lrconvert.evals.in_memory import LoadedSession
from lrconvert.evals.perplexity import measure_perplexity
from lrconvert.evals.protocols import Plan
from lrconvert.evals.retrieval import build_text, measure_retrieval
from lrconvert.progress import Step
from lrconvert.rope import Tier
from lrconvert.runtimes.base import Scores
from lrconvert.training.keys import LabelledForm
from lrconvert.training.loaded import LoadedModel

FORM = LabelledForm.read(DATA / "passkey.json")
TEXT = any_text(3000, vocab=200)


def has(text: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(text[start : start + len(part)]) == list(part) for start in range(len(text) - len(part) + 1))


class Finder:
    """Finds a key where its sentence is in the last `reach` tokens of the text, and misses it elsewhere."""

    answers: frozenset[str] = frozenset()

    def __init__(self, reach: int = 10**9) -> None:
        self.reach = reach
        self.read: list[list[int]] = []
        self.info: dict[str, Any] = {}

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        return [self._found(row, count) for row, count in zip(rows, judged, strict=True)]

    def _found(self, row: Sequence[int], count: int) -> Scores:
        self.read.append(list(row))
        question = row[-count - 6 : -count]  # the end of it is the label, and what stands before the digits
        text = row[: -count - 6][-self.reach :]
        found = has(text, [*question, *row[-count:]])
        return Scores(np.zeros(count), np.array([True] * (count - 1) + [found]))


class Reader(Finder):
    """The same, behind one reading."""

    answers: frozenset[str] = frozenset(("behind",))

    def score_behind(self, prompt: Sequence[int], rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        found = [
            Finder(self.reach).score([[*prompt, *row]], [count])[0] for row, count in zip(rows, judged, strict=True)
        ]
        self.read.append(list(prompt))
        return found


def test_keys_stand_at_even_depths() -> None:
    """The first at the start, the last at the end; with the longest question the text has its length, and what is not a
    key is the haystack's beginning."""
    made = build_text(FORM, encode, TEXT, 1000, 5, np.random.default_rng(0))
    longest = max(len(key.question) + len(key.answer) for key in made.keys)
    assert len(made.prompt) + longest == 1000
    rest, places = list(made.prompt), []
    for key in made.keys:
        sentence = key.sentence.tolist()
        (place,) = [at for at in range(len(rest)) if rest[at : at + len(sentence)] == sentence]
        places.append(place)
        del rest[place : place + len(sentence)]
    assert rest == TEXT[: len(rest)].tolist() and places[0] == 0 and places[-1] == len(rest)
    np.testing.assert_allclose(np.diff(places), len(rest) / 4, atol=1)


def test_texts_without_room() -> None:
    with pytest.raises(InputError, match=r"100 tokens have no room for 20 keys\. Ask for fewer keys"):
        build_text(FORM, encode, TEXT, 100, 20, np.random.default_rng(0))
    with pytest.raises(InputError, match="the text has 300 tokens; 1000 tokens with 2 keys need 9"):
        build_text(FORM, encode, TEXT[:300], 1000, 2, np.random.default_rng(0))
    with pytest.raises(InputError, match="99 keys need as many labels; the form has 44"):
        build_text(FORM, encode, TEXT, 3000, 99, np.random.default_rng(0))


@pytest.mark.parametrize("session", [Finder, Reader])
def test_who_sees_the_end_finds_what_stands_there(session: type[Finder]) -> None:
    """All keys, or those of the last half; behind one reading of each text as with a reading for every key."""
    asked: dict[str, Any] = {"keys": 5, "seed": 1}
    whole = measure_retrieval(session(), FORM, encode, [TEXT], [600, 1200], **asked)
    assert [(row.length, row.hits, row.trials) for row in whole] == [(600, 1, 1)] * 5 + [(1200, 1, 1)] * 5
    assert [row.depth for row in whole[:5]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    half = session(450)
    found = measure_retrieval(half, FORM, encode, [TEXT], [1200], **asked)
    assert [row.hits for row in found] == [0, 0, 0, 1, 1]
    assert len(half.read) == (1 if session is Reader else 5)


def test_every_long_text_has_keys_of_its_own() -> None:
    """Texts that are too short for a length are left out of it; progress counts readings."""
    reader, steps = Reader(), list[Step]()
    texts = [TEXT[:700], TEXT[700:1300], TEXT[1300:]]
    found = measure_retrieval(reader, FORM, encode, texts, [1500, 650], keys=2, progress=steps.append)
    assert [(row.length, row.trials) for row in found] == [(650, 2), (650, 2), (1500, 1), (1500, 1)]
    assert len(reader.read) == 3 and len({tuple(prompt) for prompt in reader.read}) == 3
    assert [(step.what, step.done, step.total) for step in steps] == [
        ("650 tokens", 0, 3), ("650 tokens", 1, 3), ("1,500 tokens", 2, 3), ("", 3, 3)
    ]  # fmt: skip


def test_losses_that_are_no_numbers_are_an_error() -> None:
    class Broken(Finder):
        def _found(self, row: Sequence[int], count: int) -> Scores:
            return Scores(np.full(count, np.nan), np.ones(count, bool))

    with pytest.raises(InputError, match="not all numbers"):
        measure_retrieval(Broken(), FORM, encode, [TEXT], [600], keys=2)


# --- a model in memory ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(pico: Callable[..., Model]) -> LoadedSession:
    """With a tier for 64 tokens and one for 256."""
    model = pico("llama")
    return LoadedSession(LoadedModel(model, device="cpu"), (Tier(64, (1.0,) * 8), scaled(model, 256)))


def test_each_row_has_the_tier_for_its_length(session: LoadedSession) -> None:
    """Rows are scored one by one: a short one under the short set, whatever stands beside it."""
    tokens = any_text(200, vocab=101)
    short, long = session.score([tokens[:60].tolist(), tokens.tolist()], [10, 10])
    model = session.model
    for scores, row, tier in ((short, tokens[:60], session.tiers[0]), (long, tokens, session.tiers[1])):
        model.rotation = tier
        np.testing.assert_allclose(scores.losses, model.losses(row[None])[0, -10:], atol=1e-6)
    model.rotation = session.tiers[1]
    assert np.abs(model.losses(tokens[None, :60])[0, -10:] - short.losses).max() > 1e-3


def test_rows_behind_a_text_have_the_tier_of_the_whole(session: LoadedSession) -> None:
    """60 tokens of text and a row of ten are 70 tokens: beyond the short set. As with a reading for every row."""
    tokens = any_text(100, vocab=101)
    prompt, rows = tokens[:60].tolist(), [tokens[60:70].tolist(), tokens[70:80].tolist()]
    found = session.score_behind(prompt, rows, [4, 2])
    wanted = session.score([prompt + row for row in rows], [4, 2])
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, atol=1e-4)
        assert one.preferred.tolist() == other.preferred.tolist()
    assert session.info["class"] == "LlamaForCausalLM" and "behind" in session.answers


def test_a_team_reads_the_text_anew_for_every_key(session: LoadedSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process may not have the memory for the cache of a text that needs two."""
    monkeypatch.setattr(session.model.workers, "team", 2)
    shared = LoadedSession(session.model, session.tiers)
    monkeypatch.undo()
    read: list[int] = []
    real = LoadedModel.scores
    monkeypatch.setattr(LoadedModel, "scores", lambda *given: read.append(len(given[1])) or real(*given))
    measure_retrieval(shared, FORM, lambda text: [token % 101 for token in encode(text)], [TEXT % 101], [256], keys=2)
    assert len(read) == 2 and max(read) == 256


def test_perplexity_at_some_of_the_lengths(session: LoadedSession) -> None:
    """`only` measures the same figure as the whole plan: an interrupted evaluation goes on with what is missing."""
    plan, texts = Plan((64, 128, 200), judged=32, excerpts=1), [any_text(400, vocab=101)]
    whole = measure_perplexity(session, texts, plan)
    assert [row.length for row in whole] == [64, 128, 200]
    assert measure_perplexity(session, texts, plan, only=(128,)) == [whole[1]]
    assert measure_perplexity(session, texts, plan, only=(200, 64)) == [whole[0], whole[2]]
