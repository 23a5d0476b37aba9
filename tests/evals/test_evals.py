# SPDX-License-Identifier: Apache-2.0
"""Perplexity and passkey: against their definitions, and on models that surely can or can't."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evals_oracle import VOCAB, Oracle
from tokenizers import Tokenizer

from lrconvert.checkpoint import locate
from lrconvert.errors import InputError
from lrconvert.evals.passkey import PasskeyFormat, build_document, passkey_accuracy
from lrconvert.evals.perplexity import same_token_perplexity
from lrconvert.runtimes.base import scores_of


def test_losses_are_negative_log_probabilities() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]) + 3.0
    found = scores_of(logits, np.array([0, 2]))
    np.testing.assert_allclose(found.losses, -np.log([0.5, 0.1]))
    assert found.preferred.tolist() == [True, False]


def test_perplexity_judges_the_same_tokens_at_every_length() -> None:
    """Uniform guesses have the vocabulary as perplexity, an oracle has 1; only the context grows."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, size=300)
    assert same_token_perplexity(Oracle(sharpness=0.0), tokens, 200, judged=50) == pytest.approx(VOCAB)
    oracle = Oracle(sharpness=60.0)
    assert same_token_perplexity(oracle, tokens, 100, judged=50) == pytest.approx(1.0)
    assert same_token_perplexity(oracle, tokens, 300, judged=50) == pytest.approx(1.0)
    assert [len(row) for row in oracle.asked] == [100, 300]
    assert list(oracle.asked[0][-50:]) == list(oracle.asked[1][-50:])
    with pytest.raises(InputError, match="300 tokens"):
        same_token_perplexity(oracle, tokens, 301, judged=50)


@pytest.fixture(scope="module")
def demo_format() -> tuple[PasskeyFormat, Any]:
    folder = locate("demo")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return PasskeyFormat.read(folder / "passkey.json"), lambda text: tokenizer.encode(text).ids


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [64, 257, 1000])
def test_documents_have_the_length_and_the_key_where_it_was_asked(
    demo_format: tuple[PasskeyFormat, Any], length: int, depth: float
) -> None:
    """Exactly N tokens, the whole needle once, near its depth, the question last, five answer tokens."""
    form, encode = demo_format
    prompt, answer = build_document(form, encode, length, depth, np.random.default_rng(5))
    key = "".join(str(d) for d in np.random.default_rng(5).integers(0, 10, size=5))
    needle = encode(form.needle.format(key=key))
    question = encode(form.question)
    assert len(prompt) == length and len(answer) == 5 and answer == encode(key)
    places = [i for i in range(length) if prompt[i : i + len(needle)] == needle]
    assert len(places) == 1
    room = length - len(needle) - len(question)
    assert abs(places[0] - depth * room) <= 16  # a sentence
    assert prompt[-len(question) :] == question


def test_a_document_too_short_for_its_pieces_is_an_error(demo_format: tuple[PasskeyFormat, Any]) -> None:
    form, encode = demo_format
    with pytest.raises(InputError, match="at least"):
        build_document(form, encode, 10, 0.5, np.random.default_rng(0))


def test_passkey_counts_keys_that_are_right_in_every_digit(demo_format: tuple[PasskeyFormat, Any]) -> None:
    form, encode = demo_format
    assert passkey_accuracy(Oracle(), form, encode, 200, (0.1, 0.9)) == 1.0
    assert passkey_accuracy(Oracle(blind=True), form, encode, 200, (0.1, 0.9)) == 0.0
    assert passkey_accuracy(Oracle(slips=True), form, encode, 200, (0.1, 0.9)) == 0.0
