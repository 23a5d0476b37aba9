# SPDX-License-Identifier: Apache-2.0
"""Passkey retrieval: a key of digits hidden in noise and asked for at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from lrconvert.checkpoint import read_json
from lrconvert.checkpoint.tokenizer import Encode
from lrconvert.data import DATA
from lrconvert.errors import InputError
from lrconvert.evals.figures import Figure, share_figure
from lrconvert.evals.perplexity import finite
from lrconvert.progress import Progress, Steps
from lrconvert.runtimes.base import Scoring
from lrconvert.training.keys import split_answer

PROTOCOL = (
    "a key of digits between sentences of noise, at depths from the start of the document to its end, asked for after "
    "it; found when greedy decoding writes every digit"
)


class _Written(BaseModel, strict=True):
    """The fields of a passkey.json; others are ignored."""

    filler: list[str] = Field(min_length=1)
    needle: str = Field(pattern=r"\{key\}")
    question: str
    key_digits: int = Field(ge=1, le=100)


@dataclass(frozen=True)
class PasskeyFormat:
    """The pieces of a document: sentences of noise, the needle with its `{key}`, the question."""

    filler: tuple[str, ...]
    needle: str
    question: str
    digits: int

    @classmethod
    def read(cls, path: Path) -> PasskeyFormat:
        """From a passkey.json. Raises `InputError` with everything that is missing or wrong in it."""
        try:
            found = _Written.model_validate(read_json(path))
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
            raise InputError.collect(path, problems) from error
        return cls(tuple(found.filler), found.needle, found.question, found.key_digits)


def form_of(folder: Path) -> Path:
    """The passkey.json of a model folder, else the one with plain English sentences."""
    own = folder / "passkey.json"
    return own if own.is_file() else DATA / "passkey.json"


def build_document(
    form: PasskeyFormat, encode: Encode, length: int, depth: float, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """A prompt with the key at `depth` (0 start, 1 end), and the key's tokens: exactly `length` of both together."""
    key = "".join(str(digit) for digit in rng.integers(0, 10, size=form.digits))
    needle = encode(form.needle.replace("{key}", key))
    question, answer = split_answer(encode, form.question, key)
    least = len(needle) + len(question) + len(answer)
    noise_tokens = length - least
    if noise_tokens < 0:
        raise InputError(f"a passkey document needs at least {least} tokens, not {length}")
    sentences = [encode(sentence) for sentence in form.filler]
    if not all(sentences) or not answer:
        raise InputError("a sentence of noise, or the key, has no tokens")
    before: list[list[int]] = []
    after: list[list[int]] = []
    target, at_start, at_end = depth * noise_tokens, 0, 0
    while at_start + at_end < noise_tokens:
        sentence = sentences[rng.integers(len(sentences))]
        if at_start < target:
            before.append(sentence)
            at_start += len(sentence)
        else:
            after.append(sentence)
            at_end += len(sentence)
    surplus = at_start + at_end - noise_tokens
    noise = [token for sentence in before for token in sentence]
    rest = [token for sentence in after for token in sentence]
    # Cut from the front of the document, never into the needle.
    prompt = noise[surplus:] + needle + rest if len(noise) >= surplus else needle + rest[surplus - len(noise) :]
    return prompt + question, answer


@dataclass(frozen=True)
class Found:
    """Keys found at one length, of how many trials."""

    length: int
    hits: int
    trials: int

    @property
    def share(self) -> Figure:
        return share_figure(self.hits, self.trials)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": asdict(self.share)}


@dataclass(frozen=True)
class PasskeyRow(Found):
    """At one length and depth (0 start, 1 end)."""

    depth: float


def by_length(rows: Sequence[PasskeyRow]) -> list[Found]:
    """All depths of each length together, the shortest length first."""
    found = []
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length]
        found.append(Found(length, sum(row.hits for row in here), sum(row.trials for row in here)))
    return found


def found_key(
    session: Scoring, form: PasskeyFormat, encode: Encode, length: int, depth: float, rng: np.random.Generator
) -> bool:
    """Whether greedy decoding gets the key exactly right.

    The key is fed after the prompt and every token of it must be the preferred one at its place, which is when
    greedy decoding without the key would write it: one forward pass instead of a decode.
    """
    prompt, answer = build_document(form, encode, length, depth, rng)
    (scores,) = session.score([prompt + answer], [len(answer)])
    return bool(finite(scores, length).preferred.all())


def passkey_accuracy(
    session: Scoring, form: PasskeyFormat, encode: Encode, length: int, depths: Sequence[float], seed: int = 0
) -> float:
    """Share of keys that are found (`found_key`), one trial per depth."""
    rngs = [np.random.default_rng([seed, length, index]) for index in range(len(depths))]
    trials = zip(depths, rngs, strict=True)
    return sum(found_key(session, form, encode, length, depth, rng) for depth, rng in trials) / len(depths)


def measure_passkey(
    session: Scoring,
    form: PasskeyFormat,
    encode: Encode,
    lengths: Sequence[int],
    *,
    depths: int = 10,
    trials: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[PasskeyRow]:
    """Keys found at every length and at `depths` depths from start to end, `trials` documents each."""
    rows, steps = [], Steps("documents", progress)
    for length in lengths:
        steps.expect(length, depths * trials)
    for length in sorted(lengths):
        for index, depth in enumerate(np.linspace(0.0, 1.0, depths).tolist()):
            rngs = [np.random.default_rng([seed, length, index, trial]) for trial in range(trials)]
            hits = 0
            for rng in rngs:
                steps.start(f"{length:,} tokens, depth {index + 1} of {depths}", length)
                hits += found_key(session, form, encode, length, depth, rng)
            rows.append(PasskeyRow(length, hits, trials, depth))
    steps.finish()
    return rows
