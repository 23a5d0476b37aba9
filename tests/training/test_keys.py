# SPDX-License-Identifier: Apache-2.0
"""Labelled keys: their forms, the tokens they become, and where they are hidden."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.extending import encode, key_maker

from lrconvert.checkpoint import locate
from lrconvert.data import DATA
from lrconvert.errors import InputError
from lrconvert.evals.passkey import PasskeyFormat
from lrconvert.evals.retrieval import evaluation_keys
from lrconvert.training.keys import TRAINING_FORM, KeyMaker, LabelledForm, hidden_in, split_answer, training_form

GOOD = {"labels": ["a", "b"], "labelled_needle": " {label} has {key}.", "key_digits": 3}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": ["a"]}, "labels"),
        ({"labels": [1, 2]}, "labels.0"),
        ({"labels": None}, "labels"),
        ({"key_digits": 0}, "key_digits"),
        ({"key_digits": "5"}, "key_digits"),
        ({"labelled_needle": None}, "no labelled_needle"),
        ({"labelled_needle": " {key} is {label}."}, "behind it, {key}"),
        ({"labelled_needle": " {label} alone."}, "' {label} alone.': a sentence needs"),
        ({"labelled_needles": [" {label} {key}", "nothing"]}, "'nothing': a sentence needs"),
    ],
)
def test_a_form_that_is_off_names_what_is_wrong(change: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "form.json"
    path.write_text(json.dumps(GOOD))
    assert LabelledForm.read(path) == LabelledForm((" {label} has {key}.",), ("a", "b"), 3)
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        LabelledForm.read(path)
    assert str(path) in str(raised.value)


def test_training_and_evaluation_share_no_words_to_learn() -> None:
    """No sentence, question or label of the training form is one of an evaluation, the embedded model's included;
    otherwise an evaluation would measure what was learnt by heart."""
    training = LabelledForm.read(TRAINING_FORM)
    for path in (DATA / "passkey.json", locate("demo") / "passkey.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        evaluated = [PasskeyFormat.read(path).needle, PasskeyFormat.read(path).question]
        evaluated += [values[key] for key in ("labelled_needle",) if key in values]
        asked = {sentence.partition("{key}")[0].strip() for sentence in evaluated}
        assert asked.isdisjoint(sentence.partition("{key}")[0].strip() for sentence in training.sentences)
        labels = {label.lower() for label in values.get("labels", [])}
        assert labels.isdisjoint(label.lower() for label in training.labels)
    plain = LabelledForm.read(DATA / "passkey.json")
    assert set(plain.sentences).isdisjoint(training.sentences) and len(set(training.labels)) == len(training.labels)


def test_a_model_may_bring_a_form_of_its_own(tmp_path: Path) -> None:
    """Its passkey.json counts where it has labelled keys; otherwise there are the forms in English."""
    assert training_form(tmp_path) == LabelledForm.read(TRAINING_FORM)
    assert evaluation_keys(tmp_path) == DATA / "passkey.json"
    (tmp_path / "passkey.json").write_text(json.dumps({"filler": ["x"], "needle": "{key}", "key_digits": 3}))
    assert training_form(tmp_path) == LabelledForm.read(TRAINING_FORM)
    (tmp_path / "passkey.json").write_text(json.dumps(GOOD))
    assert training_form(tmp_path) == LabelledForm.read(tmp_path / "passkey.json")
    assert evaluation_keys(tmp_path) == tmp_path / "passkey.json"


def test_a_key_is_its_question_its_answer_and_an_end() -> None:
    """Different labels for all keys of a text, so that every question has one answer."""
    keys = key_maker().make(40, np.random.default_rng(0))
    for key in keys:
        assert key.sentence.tolist() == [*key.question, *key.answer, *key.end] and len(key.answer) == 5
    assert len({tuple(key.answer) for key in keys}) > 30
    maker = KeyMaker(LabelledForm((" {label} has {key}.",), tuple("abcdefgh"), 3), encode)
    assert len({tuple(key.question) for key in maker.make(8, np.random.default_rng(0))}) == 8


def test_more_keys_than_labels_are_refused() -> None:
    maker = KeyMaker(LabelledForm((" {label} has {key}.",), ("a", "b"), 3), encode)
    assert len(maker.make(2, np.random.default_rng(0))) == 2
    with pytest.raises(InputError, match="3 keys need as many labels; the form has 2"):
        maker.make(3, np.random.default_rng(0))


def test_an_answer_has_the_tokens_that_follow_its_question() -> None:
    """Of a tokenizer that puts a space before every text, the answer begins without it."""

    def spaced(text: str) -> list[int]:
        return [ord(letter) for letter in "_" + text]

    assert split_answer(spaced, "no. ", "12") == ([ord(c) for c in "_no. "], [ord("1"), ord("2")])

    def merging(text: str) -> list[int]:  # the space goes into the next token: encoded alone then
        return [1] if text == "x " else [2, 3] if text == "x 12" else [4]

    assert split_answer(merging, "x ", "12") == ([1], [4])


def test_keys_are_hidden_before_the_named_places() -> None:
    """In any order, at both ends too; the text's own tokens stay, in order."""
    text, keys = np.arange(100, 110), key_maker().make(3, np.random.default_rng(1))
    tokens, own = hidden_in(text, keys, [10, 0, 4])
    assert tokens[own].tolist() == text.tolist()
    assert tokens.tolist() == [
        *keys[1].sentence, *text[:4], *keys[2].sentence, *text[4:], *keys[0].sentence
    ]  # fmt: skip
    same, all_own = hidden_in(text, [], [])
    assert same.tolist() == text.tolist() and all_own.all()
