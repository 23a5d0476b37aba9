# SPDX-License-Identifier: Apache-2.0
"""Objectives: which tokens count, with which weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lrconvert.errors import InputError
from lrconvert.evals.passkey import PasskeyFormat
from lrconvert.evals.texts import Text
from lrconvert.searching.objective import NEEDLES, Kind, Objective, build_objective, needle_documents, text_documents

FORM = PasskeyFormat((" some noise.", " more of it!"), " key {key}.", " the key is ", 5)


def encode(text: str) -> list[int]:
    """Letters as tokens."""
    return list(text.encode())


def text(length: int, name: str = "a.txt") -> Text:
    return Text(name, "0" * 64, np.arange(length) % 251)


def build(kind: Kind, weights: dict[int, float], texts: Sequence[Text], documents: int = 1) -> Objective:
    return build_objective(
        kind,
        weights,
        original_window=64,
        texts=texts,
        documents=documents,
        needles=lambda lengths: needle_documents(FORM, encode, lengths, 3),
    )


def test_prefixes_are_scored_from_one_document() -> None:
    """The objective is the weighted mean; every length between is recorded beside it."""
    objective = build("perplexity", {64: 1, 256: 3}, [text(300)])
    losses = np.linspace(1, 5, 255)
    loss, parts = objective.score([losses])
    assert objective.weights == {64: 0.25, 256: 0.75}
    assert parts == pytest.approx({"text@64": losses[:63].mean(), "text@128": losses[:127].mean(), "text@256": 3.0})
    assert loss == pytest.approx(0.25 * losses[:63].mean() + 0.75 * 3.0)


@pytest.mark.parametrize("kind", ["perplexity", "needle", "mixed"])
def test_token_weights_are_the_objective_s_derivative(kind: Kind) -> None:
    objective = build(kind, {128: 1, 256: 2}, [text(600)], documents=2)
    rng = np.random.default_rng(0)
    losses = [rng.uniform(1, 5, len(document.tokens) - 1) for document in objective.documents]
    weighted = sum(float((objective.token_weights(i) * row).sum()) for i, row in enumerate(losses))
    assert objective.score(losses)[0] == pytest.approx(weighted)
    total = sum(objective.token_weights(index).sum() for index in range(len(losses)))
    assert total == pytest.approx(1.0)


def test_needle_counts_only_the_answer() -> None:
    """Five digits at the end, the same ones for the same seed, at every weighted length and several depths."""
    objective = build("needle", {128: 1, 256: 1}, [])
    assert len(objective.documents) == 2 * NEEDLES
    for document in objective.documents:
        (length, first, end) = document.spans[0]
        assert len(document.tokens) == length
        answer = bytes(document.tokens[first + 1 : end + 1].tolist()).decode()
        assert answer.isdigit() and len(answer) == 5
        assert f" key {answer}." in bytes(document.tokens.tolist()).decode()
    again = build("needle", {128: 1, 256: 1}, [])
    assert [d.tokens.tolist() for d in again.documents] == [d.tokens.tolist() for d in objective.documents]
    depths = [bytes(d.tokens.tolist()).decode().index(" key ") / 128 for d in objective.documents[:NEEDLES]]
    assert depths == sorted(depths) and depths[0] < 0.3 and depths[-1] > 0.5


def test_mixed_is_the_mean_of_both() -> None:
    objective = build("mixed", {128: 1}, [text(200)])
    losses = [np.full(127, 2.0 if document.part == "text" else 6.0) for document in objective.documents]
    loss, parts = objective.score(losses)
    assert loss == pytest.approx(4.0)
    assert {name.partition("@")[0] for name in parts} == {"text", "needle"}


def test_documents_are_spread_without_overlap() -> None:
    made = text_documents([text(1000), text(50), text(700)], 256, 5, [256], join=False)
    assert [len(document.tokens) for document in made] == [256] * 5
    longest = text_documents([text(1000)], 256, 9, [256], join=False)
    assert len(longest) == 3  # no more fit without overlap
    # Tokens are their places, modulo 251.
    assert [int(document.tokens[0]) for document in longest] == [start % 251 for start in (0, 372, 744)]


def test_short_texts_say_by_how_much_and_what_helps() -> None:
    texts = [text(100), text(200)]
    with pytest.raises(InputError, match="longest text has 200 tokens, 56 fewer than the 256") as error:
        text_documents(texts, 256, 1, [256], join=False)
    assert "--allow-concatenate" in str(error.value)
    assert len(text_documents(texts, 256, 1, [256], join=True)[0].tokens) == 256
    with pytest.raises(InputError, match="all texts together have 300") as error:
        text_documents(texts, 512, 1, [512], join=True)
    assert "--target of at most 300" in str(error.value)
    with pytest.raises(InputError, match="longest text has 0 tokens"):
        text_documents([], 512, 1, [512], join=True)
