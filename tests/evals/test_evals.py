# SPDX-License-Identifier: Apache-2.0
"""Perplexity and passkey: against their definitions, and on models that surely can or can't."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from support.evals_oracle import VOCAB, Oracle
from tokenizers import Tokenizer, models, pre_tokenizers

from lrconvert.checkpoint import locate
from lrconvert.errors import InputError
from lrconvert.evals.passkey import PasskeyFormat, build_document, measure_passkey, passkey_accuracy
from lrconvert.evals.perplexity import same_token_perplexity
from lrconvert.runtimes.base import Scores, scores_of


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
    assert len(prompt) + len(answer) == length and len(answer) == 5 and answer == encode(key)
    places = [i for i in range(length) if prompt[i : i + len(needle)] == needle]
    assert len(places) == 1
    room = length - len(needle) - len(question) - len(answer)
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
    with pytest.raises(InputError, match="not all numbers"):  # and not that it found none
        passkey_accuracy(Oracle(sharpness=np.nan), form, encode, 200, (0.1, 0.9))


def test_every_trial_is_a_document_of_its_own_and_all_of_its_key_counts(demo_format: tuple[PasskeyFormat, Any]) -> None:
    """Lengths, depths, trials and seeds all draw other keys; as many tokens are judged as the key has."""
    form, encode = demo_format
    counts: list[int] = []

    class Counting(Oracle):
        def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
            counts.extend(judged)
            return super().score(rows, judged)

    oracle = Counting()
    for seed in (0, 1):
        rows = measure_passkey(oracle, form, encode, (200, 300), depths=2, trials=3, seed=seed)
        assert [(row.length, row.hits, row.trials, row.depth) for row in rows] == [
            (length, 3, 3, depth) for length in (200, 300) for depth in (0.0, 1.0)
        ]
    assert counts == [5] * 24 and len({tuple(row[-5:]) for row in oracle.asked}) == 24
    assert [len(row) for row in oracle.asked] == ([200] * 6 + [300] * 6) * 2


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_the_key_is_read_behind_the_question(
    demo_format: tuple[PasskeyFormat, Any], scheme: Literal["always", "never"]
) -> None:
    """A SentencePiece tokenizer puts a space in front of what it reads alone, others join digits: the answer is what
    follows the question, and the document has its length all the same."""
    form, _ = demo_format
    vocab = {"▁": 0, **{chr(code): code for code in range(32, 127)}, "é": 127}
    vocab |= {f"{number:02}": 200 + number for number in range(100)}
    merges = [(f"{first}", f"{second}") for first in range(10) for second in range(10)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="é"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    prompt, answer = build_document(form, lambda text: tokenizer.encode(text).ids, 300, 0.5, np.random.default_rng(5))
    key = "".join(str(d) for d in np.random.default_rng(5).integers(0, 10, size=5))
    assert answer == [vocab[key[:2]], vocab[key[2:4]], vocab[key[4]]]
    assert len(prompt) + len(answer) == 300


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"filler": 5}, "filler"),
        ({"filler": []}, "filler"),
        ({"filler": [None]}, "filler.0"),
        ({"needle": "no place for it"}, "needle"),
        ({"needle": 5, "key_digits": "five"}, "needle: Input should be a valid string; key_digits"),
        ({"key_digits": 0}, "key_digits"),
        ({"key_digits": 10**12}, "key_digits"),
    ],
)
def test_a_damaged_form_is_an_error(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    form = tmp_path / "passkey.json"
    form.write_text(json.dumps(json.loads((locate("demo") / "passkey.json").read_text()) | change))
    with pytest.raises(InputError, match=said):
        PasskeyFormat.read(form)


def test_noise_without_tokens_is_an_error_and_braces_are_text(demo_format: tuple[PasskeyFormat, Any]) -> None:
    form, encode = demo_format
    with pytest.raises(InputError, match="no tokens"):  # it would never fill the document
        build_document(replace(form, filler=("",)), encode, 200, 0.5, np.random.default_rng(0))
    made = replace(form, needle="{ {key} {other}")
    prompt, _ = build_document(made, encode, 200, 0.0, np.random.default_rng(0))
    key = "".join(str(d) for d in np.random.default_rng(0).integers(0, 10, size=5))
    needle = encode(f"{{ {key} {{other}}")
    assert any(prompt[at : at + len(needle)] == needle for at in range(len(prompt)))
