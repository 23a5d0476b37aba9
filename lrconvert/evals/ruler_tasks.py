# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks as lm-eval's generators make them: with our number of samples, and only where they come to an end.

Its generators are called, not its task functions: those make 500 samples. They load a tokenizer by its name on the Hub;
the artifact's own is given instead.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lrconvert.checkpoint.tokenizer import read_tokenizer
from lrconvert.errors import InputError

PACKAGE = "lm_eval.tasks.ruler"
SLACK = 1.1  # samples differ by a few tokens: no length is taken that only the luckiest would fit


class Sized:
    """The artifact's tokenizer as lm-eval's generators call it: what is counted are tokens, special ones included."""

    def __init__(self, artifact: Path) -> None:
        self._tokenizer = read_tokenizer(artifact)

    def __call__(self, text: str) -> Sized.Encoded:
        return self.Encoded(self._tokenizer.encode(text).ids)

    @dataclass(frozen=True)
    class Encoded:
        input_ids: list[int]

    def count(self, text: str) -> int:
        return len(self(text).input_ids)


Make = Callable[[Sized, int, int], list[dict[str, Any]]]  # tokenizer, length, samples


# --- lm-eval's generators: what its task functions call, with our number of samples ------------------------


def _needles(haystack: str, keys: str, values: str, **counts: int) -> Make:
    """Needles in repeated sentences, in other needles, or in essays."""

    def make(tokenizer: Sized, length: int, samples: int) -> list[dict[str, Any]]:
        with _nothing_fetched():
            niah: Any = import_module(f"{PACKAGE}.prepare_niah")
        if haystack == "essay":
            _need_sentences(niah.nltk)
        kinds = {"type_haystack": haystack, "type_needle_k": keys, "type_needle_v": values}
        return niah.generate_samples(
            niah.get_haystack(type_haystack=haystack), TOKENIZER=tokenizer, max_seq_length=length,
            template=import_module(f"{PACKAGE}.niah_utils").TEMPLATE, num_samples=samples, **kinds, **counts,
        )  # fmt: skip

    return make


def _chains(tokenizer: Sized, length: int, samples: int) -> list[dict[str, Any]]:
    tracking: Any = import_module(f"{PACKAGE}.vt_utils")
    make = tracking.sys_vartrack_w_noise_random
    (example,) = make(tokenizer=tokenizer, num_samples=1, max_seq_length=EXAMPLE, incremental=5)
    return make(tokenizer=tokenizer, num_samples=samples, max_seq_length=length, icl_example=example)


def _common_words(tokenizer: Sized, length: int, samples: int) -> list[dict[str, Any]]:
    common: Any = import_module(f"{PACKAGE}.cwe_utils")
    state = common.RNG.getstate()
    common.RNG.seed(random.getrandbits(64))  # a generator of its own, which goes on from task to task
    try:
        return common.sys_word_pair_random(num_samples=samples, max_seq_length=length, tokenizer=tokenizer)
    finally:
        common.RNG.setstate(state)


def _frequent_words(tokenizer: Sized, length: int, samples: int) -> list[dict[str, Any]]:
    frequent: Any = import_module(f"{PACKAGE}.fwe_utils")
    return frequent.sys_kwext(tokenizer=tokenizer, max_seq_length=length, num_samples=samples)


def _questions(read: str) -> Make:
    def make(tokenizer: Sized, length: int, samples: int) -> list[dict[str, Any]]:
        questions: Any = import_module(f"{PACKAGE}.qa_utils")
        asked, documents = getattr(questions, read)()
        return questions.generate_samples(tokenizer, documents, asked, length, num_samples=samples)

    return make


# --- the least lengths: below these, lm-eval's generators of words and chains never end ----------------------

EXAMPLE = 500  # tokens that the example in a prompt of vt may have, whatever the tokenizer


def _least_chains(tokenizer: Sized, length: int) -> float:
    tracking: Any = import_module(f"{PACKAGE}.vt_utils")
    drawn = [tracking.generate_input_output(5, 1, 4, is_icl=True) for _ in range(8)]
    example = SLACK * max(tokenizer.count(f"{text} {answer}") for text, answer in drawn) + 30
    if example > EXAMPLE:
        raise InputError(
            f"vt: with this tokenizer its example has {example:.0f} tokens; lm-eval makes room for {EXAMPLE}",
            remedy="Omit vt from --tasks",
        )
    drawn = [tracking.generate_input_output(10, 1, 4) for _ in range(8)]
    return EXAMPLE + SLACK * max(tokenizer.count(f"{text} {answer}") for text, answer in drawn) + 30


def _least_common(tokenizer: Sized, length: int) -> float:
    """The ten common words and ten others, beside an example that is measured and not asked."""
    common: Any = import_module(f"{PACKAGE}.cwe_utils")
    drawn = [common.generate_input_output(20, length) for _ in range(4)]
    return SLACK * max(tokenizer.count(f"{example}\n{text} {answer}") for example, text, answer in drawn) + 120


def _least_frequent(tokenizer: Sized, length: int) -> float:
    """A hundred words, of which the fourth stands there three times and the fifth twice; six words to choose from."""
    frequent: Any = import_module(f"{PACKAGE}.fwe_utils")
    letters = frequent.string.ascii_lowercase
    words = ["".join(random.choices(letters, k=6)) for _ in range(100)]
    return max(300.0, SLACK * tokenizer.count(frequent.TEMPLATE.format(context=" ".join(words), query="")))


@dataclass(frozen=True)
class RulerTask:
    """`definition`: the file of lm-eval's. `least`: the tokens that it needs at a length, for generators that would
    not end; None: they say so by themselves. `fetched` is what it needs from the network."""

    definition: str
    make: Make
    least: Callable[[Sized, int], float] | None = None
    fetched: str | None = None


ESSAYS, PAPERS = "essays (a data set on the Hub, and NLTK's punkt_tab)", "questions with documents"
TASKS = {
    "niah_single_1": RulerTask("niah_single_1", _needles("repeat", "words", "numbers")),
    "niah_single_2": RulerTask("niah_single_2", _needles("essay", "words", "numbers"), fetched=ESSAYS),
    "niah_single_3": RulerTask("niah_single_3", _needles("essay", "words", "uuids"), fetched=ESSAYS),
    "niah_multikey_1": RulerTask(
        "niah_multikey_1", _needles("essay", "words", "numbers", num_needle_k=4), fetched=ESSAYS
    ),
    "niah_multikey_2": RulerTask("niah_multikey_2", _needles("needle", "words", "numbers")),
    "niah_multikey_3": RulerTask("niah_multikey_3", _needles("needle", "uuids", "uuids")),
    "niah_multivalue": RulerTask(
        "niah_multivalue", _needles("essay", "words", "numbers", num_needle_v=4), fetched=ESSAYS
    ),
    "niah_multiquery": RulerTask(
        "niah_multiquery", _needles("essay", "words", "numbers", num_needle_q=4), fetched=ESSAYS
    ),
    "vt": RulerTask("vt", _chains, _least_chains),
    "cwe": RulerTask("cwe", _common_words, _least_common),
    "fwe": RulerTask("fwe", _frequent_words, _least_frequent),
    "qa_squad": RulerTask("qa_squad", _questions("read_squad"), fetched=PAPERS),
    "qa_hotpot": RulerTask("qa_hotpot", _questions("read_hotpotqa"), fetched=PAPERS),
}
OFFLINE = tuple(name for name, task in TASKS.items() if task.fetched is None)


@contextlib.contextmanager
def _nothing_fetched() -> Iterator[None]:
    """Importing the module of needles downloads NLTK's sentences, which only essays need; not on other ranks."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        yield
    finally:
        os.environ.pop("LOCAL_RANK")
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def _need_sentences(nltk: Any) -> None:
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        if not nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO()):
            raise OSError("NLTK's punkt_tab is not there") from error
