# SPDX-License-Identifier: Apache-2.0
"""What the tests of training and extending share: a pico model with a tokenizer that has words for keys, and texts."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.pico import write_pico
from support.vocabularies import STYLES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lrconvert.checkpoint import Model, open_model
from lrconvert.extending.api import ExtendResult, extend
from lrconvert.extending.plan import Evaluate, Plan, parse_plan
from lrconvert.rope import Tier
from lrconvert.training.keys import TRAINING_FORM, KeyMaker, LabelledForm

VOCAB = 512
SENTENCE = "the rain fell on grey stones and a cat slept until boats came back with nets full of herring"
WORDS = SENTENCE.split()


@cache
def tokenizer() -> Tokenizer:
    """Byte-level, one token a digit, with merges from the training form: a key and its question take 40 tokens or so,
    as they do in published tokenizers."""
    form = json.loads(TRAINING_FORM.read_text(encoding="utf-8"))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = STYLES["smollm"].pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*form["labelled_needles"] * 3, *form["labels"], *WORDS], trainer)
    return made


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def key_maker() -> KeyMaker:
    return KeyMaker(LabelledForm.read(TRAINING_FORM), encode)


def write_wordy(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A pico model with `tokenizer`, whose q and k are as narrow as those of a model that starts to learn."""
    write_pico(folder, family, widen=1.0, **{"vocab_size": VOCAB, **changes})
    (folder / "tokenizer.json").write_text(tokenizer().to_str(), encoding="utf-8")
    return folder


def prose(words: int, seed: int = 0) -> str:
    """Random words: every one can be guessed a little."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def any_text(length: int, seed: int = 0, vocab: int = VOCAB) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, vocab, length)


def scaled(model: Model, window: int, ratio: float = 4.0) -> Tier:
    """A set in which factors, start tokens and the attention factor all count."""
    return Tier(window, tuple(np.linspace(1.0, ratio, model.shape.rotary_dim // 2).tolist()), 4, 1.1)


def opened(folder: Path) -> Model:
    return open_model(folder)


# A plan with every kind of stage, for `write_wordy` and `prose(8000)`: two seconds.
PLAN = """
name = "tiny"

[[stage]]
kind = "search"
window = 256
budget = 3

[[stage]]
kind = "tune"
window = 256
length = 160
rows = 2
steps = 5
keys = 1
mixed_rows = 2
rank = 4
rate = 1e-2

[[stage]]
kind = "search"
window = "1k"
budget = 5
row_length = 160
rows = 2
keys = 1
objective = "mixed"
decide = 512
judged = 64
finalists = 2

[[stage]]
kind = "recover"
budget = 3

[[stage]]
kind = "evaluate"
perplexity = [64, 1024]
excerpts = 1
judged = 32
retrieval = [256]
keys = 2
passkey = [256]
depths = 2
"""


def extended(folder: Path, output: str, plan: Plan, **options: Any) -> ExtendResult:
    """The model `wordy` in a folder, extended on the text there."""
    given = {"texts": [folder / "text.txt"], "device": "cpu", **options}
    return extend(folder / "wordy", output=folder / output, plan=plan, **given)


def extended_wordy(folder: Path) -> ExtendResult:
    """`wordy` from 64 to 1024 tokens by the stages of `PLAN` but the evaluation: three sets and an adapter, in the
    folder `made` beside it."""
    write_wordy(folder / "wordy")
    (folder / "text.txt").write_text(prose(8000), encoding="utf-8")
    plan = parse_plan(PLAN, "plan.toml")
    stages = tuple(stage for stage in plan.stage if not isinstance(stage, Evaluate))
    return extended(folder, "made", replace(plan, stage=stages))
