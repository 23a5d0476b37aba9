# SPDX-License-Identifier: Apache-2.0
"""Labelled keys: sentences such as " The number for amber is 58213.", hidden in a text and asked for behind it.

The same sentence, cut before its digits, is the question. Training and evaluation use forms with different sentences
and labels, so that an evaluation measures retrieval and not one learnt sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrconvert.checkpoint import read_json
from lrconvert.checkpoint.tokenizer import Encode
from lrconvert.data import DATA
from lrconvert.errors import InputError

TRAINING_FORM = DATA / "training_keys.json"
Tokens = NDArray[np.int64]
# Of the texts that are made, with all their keys in one sentence. None was too few: SmolLM2-135M found 18 of 20 keys of
# an evaluation, which is made so, at 8k and 64k, and 20 after it was trained with half. Other parts were not tried.
ALIKE = 0.5


class _Written(BaseModel):
    """The fields of a form's file; others are ignored. A passkey.json may have them too."""

    model_config = ConfigDict(strict=True)

    labels: list[str] = Field(min_length=2)
    labelled_needles: list[str] = []
    labelled_needle: str | None = None
    key_digits: int = Field(ge=1, le=100)


@dataclass(frozen=True)
class LabelledForm:
    """`sentences` have one `{label}` and, behind it, one `{key}` of `digits` digits."""

    sentences: tuple[str, ...]
    labels: tuple[str, ...]
    digits: int

    @classmethod
    def read(cls, path: Path) -> LabelledForm:
        """From JSON with labels, key_digits, and labelled_needle or labelled_needles.

        Raises `InputError` with everything that is missing or wrong in it.
        """
        try:
            found = _Written.model_validate(read_json(path))
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise InputError.collect(path, problems) from error
        sentences = [*found.labelled_needles, *([found.labelled_needle] if found.labelled_needle else [])]
        if not sentences:
            raise InputError(f"{path}: no labelled_needle")
        if wrong := [text for text in sentences if not 0 <= text.find("{label}") < text.find("{key}")]:
            raise InputError(f"{path}: {wrong[0]!r}: a sentence needs {{label}} and, behind it, {{key}}")
        return cls(tuple(sentences), tuple(found.labels), found.key_digits)


def keys_file(folder: Path, other: Path) -> Path:
    """A model folder's own passkey.json, where that has labelled keys; else `other`."""
    own = folder / "passkey.json"
    has = own.is_file() and any(name in read_json(own) for name in ("labelled_needle", "labelled_needles"))
    return own if has else other


def training_form(folder: Path) -> LabelledForm:
    """The keys to train a model on, and to search with."""
    return LabelledForm.read(keys_file(folder, TRAINING_FORM))


@dataclass(frozen=True, eq=False)
class Key:
    """One key in tokens: `sentence` is hidden in the text, `question` asks for it, `answer` are the digits, `end` is
    what closes the sentence."""

    sentence: Tokens
    question: Tokens
    answer: Tokens
    end: Tokens


class KeyMaker:
    """Makes keys of a form in a model's tokens."""

    def __init__(self, form: LabelledForm, encode: Encode) -> None:
        self.form, self._encode = form, encode

    def make(self, count: int, rng: np.random.Generator) -> list[Key]:
        """`count` keys with different labels, in any sentence of the form; every other time all in the same one, where
        the labels alone tell them apart. Raises `InputError` for too few labels."""
        form = self.form
        if count > len(form.labels):
            raise InputError(f"{count} keys need as many labels; the form has {len(form.labels)}")
        labels = rng.permutation(len(form.labels))[:count]
        sentences = form.sentences
        if len(sentences) > 1 and rng.random() < ALIKE:
            sentences = (sentences[int(rng.integers(len(sentences)))],)
        return [self._key(form.labels[label], sentences, rng) for label in labels]

    def _key(self, label: str, sentences: Sequence[str], rng: np.random.Generator) -> Key:
        sentence = sentences[int(rng.integers(len(sentences)))].replace("{label}", label)
        question, _, end = sentence.partition("{key}")
        digits = "".join(str(digit) for digit in rng.integers(0, 10, self.form.digits))
        asked, answer = split_answer(self._encode, question, digits)
        closing = self._encode(end) if end else []
        return Key(*(np.asarray(part, dtype=np.int64) for part in (asked + answer + closing, asked, answer, closing)))


def split_answer(encode: Encode, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a question, and of the answer as it follows it. Encoded alone, an answer may begin with a token that no
    model writes there: the space that SentencePiece puts in front of every text."""
    before, whole = encode(question), encode(question + answer)
    return before, whole[len(before) :] if whole[: len(before)] == before else encode(answer)


def hidden_in(text: Tokens, keys: Sequence[Key], places: Sequence[int]) -> tuple[Tokens, NDArray[np.bool_]]:
    """`text` with the keys' sentences inserted before the tokens at `places`, and which tokens are the text's own."""
    order = sorted(range(len(keys)), key=lambda index: places[index])
    parts, own, last = [], [], 0
    for index in order:
        parts += [text[last : places[index]], keys[index].sentence]
        own += [np.ones(places[index] - last, bool), np.zeros(len(keys[index].sentence), bool)]
        last = places[index]
    return np.concatenate([*parts, text[last:]]), np.concatenate([*own, np.ones(len(text) - last, bool)])
