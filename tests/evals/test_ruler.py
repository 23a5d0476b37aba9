# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks: lm-eval's samples and prompts, its score, and lengths at which its generators would not end."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from lrconvert.checkpoint import locate
from lrconvert.checkpoint.tokenizer import read_tokenizer
from lrconvert.errors import EnvironmentFailure, InputError, UsageError

pytest.importorskip("wonderwords", reason="the extra eval brings wonderwords")

from lrconvert.cli.eval_ruler import DEFAULT
from lrconvert.evals.prompts import PromptTokenizer
from lrconvert.evals.ruler import FOLDER, PreparedRuler, answer_of, end_tokens, measure_ruler, prepare_ruler, seeded
from lrconvert.evals.ruler_tasks import OFFLINE, PACKAGE, TASKS, Sized

DEMO = locate("demo")
TOKENIZER = read_tokenizer(DEMO)
VOCAB = TOKENIZER.get_vocab_size()
LENGTH = 2048


@pytest.fixture(scope="module", autouse=True)
def fewer_words() -> None:
    """Importing lm-eval's needles sorts every pair of an adjective and a noun, millions, of which a sample takes some:
    here they are a part of both, for lm-eval as for us."""
    import wonderwords

    class Some(wonderwords.RandomWord):
        def __init__(self) -> None:
            super().__init__()
            self._categories = {name: words[::20] for name, words in self._categories.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", Some)
        patch.setenv("LOCAL_RANK", "1")  # nothing is fetched
        lm_eval_of("prepare_niah")


def lm_eval_of(name: str) -> Any:
    return import_module(f"{PACKAGE}.{name}")


# --- samples ---------------------------------------------------------------------------------------------

# lm-eval's own task: the module and function of its data, and what that calls with 500 samples.
OWN = {name: ("niah_utils", name, "generate_samples") for name in TASKS if name.startswith("niah")} | {
    "vt": ("vt_utils", "get_vt_dataset", "sys_vartrack_w_noise_random"),
    "cwe": ("cwe_utils", "get_cw_dataset", "sys_word_pair_random"),
    "fwe": ("fwe_utils", "fwe_download", "sys_kwext"),
    "qa_squad": ("qa_utils", "get_squad", "generate_samples"),
    "qa_hotpot": ("qa_utils", "get_hotpotqa", "generate_samples"),
}


def own_samples(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What lm-eval's task function makes with transformers' tokenizer, three samples instead of 500."""
    module, function, generator = OWN[name]
    found = lm_eval_of(module)
    plain: Callable[..., Any] = getattr(found, generator)

    def few(*arguments: Any, **given: Any) -> Any:
        if given.get("num_samples", 500) == 500:
            given["num_samples"] = 3
        return plain(*arguments, **given)

    monkeypatch.setattr(found, generator, few)
    with seeded(seed, LENGTH):
        if name == "cwe":
            found.RNG.seed(random.getrandbits(64))
        return list(getattr(found, function)(tokenizer=str(DEMO), max_seq_lengths=[LENGTH])["test"])


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of what is fetched: essays and questions of ours, and sentences that end with a full stop."""
    import nltk

    needles, questions = lm_eval_of("prepare_niah"), lm_eval_of("qa_utils")
    plain, essay = needles.get_haystack, [f"Word {number}." for number in range(3000)]

    def haystack(type_haystack: Any) -> Any:
        return essay if type_haystack == "essay" else plain(type_haystack=type_haystack)

    documents = [f"Document {number} is about {number * number}. " * 9 for number in range(60)]
    asked = [
        {"query": f"{at}?", "outputs": [str(at), "both"], "context": [at], "more_context": [at + 9]} for at in range(9)
    ]
    for module in (needles, lm_eval_of("niah_utils")):
        monkeypatch.setattr(module, "get_haystack", haystack)
    monkeypatch.setattr(needles, "cached_sent_tokenize", lambda text: text.split(". "))
    monkeypatch.setattr(nltk.data, "find", lambda *_: None)
    for read in ("read_squad", "read_hotpotqa"):
        monkeypatch.setattr(questions, read, lambda: (asked, documents))


def test_every_definition_of_lm_eval_is_a_task() -> None:
    assert {task.definition for task in TASKS.values()} == {path.stem for path in FOLDER.glob("*.yaml")} - {"ruler"}
    assert set(OWN) == set(TASKS) and DEFAULT.split(",") == list(OFFLINE)


@pytest.mark.parametrize("name", TASKS)
def test_samples_and_prompts_are_lm_eval_s_own(name: str, texts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same seed: every field of every sample; its text with the beginning of the answer behind it."""
    (found,) = prepare_ruler([name], [LENGTH], 3, DEMO, seed=5)
    wanted = own_samples(name, 5, monkeypatch)
    assert [dict(sample) for sample in found.samples] == wanted
    for prompt, sample in zip(found.prompts, wanted, strict=True):
        assert prompt.startswith(sample["input"]) and prompt.endswith(sample["gen_prefix"])
        assert len(prompt) - len(sample["input"]) - len(sample["gen_prefix"]) in (0, 1, 2)  # a delimiter
        assert len(TOKENIZER.encode(prompt).ids) + found.new_tokens <= LENGTH + 60  # fwe counts the prompt alone


def test_samples_depend_on_nothing_but_seed_and_length() -> None:
    """Neither on what else is asked nor on the state of the global generators, which go on as before."""
    alone, other = (prepare_ruler(["cwe"], [LENGTH], 2, DEMO, seed=seed)[0].sha256 for seed in (0, 1))
    assert alone != other
    random.seed(1)
    np.random.seed(1)
    wanted = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    several = prepare_ruler(["fwe", "cwe"], [LENGTH, 1500], 2, DEMO)
    assert (random.random(), np.random.random()) == wanted
    assert [(found.name, found.length) for found in several] == [
        ("fwe", 1500), ("cwe", 1500), ("fwe", LENGTH), ("cwe", LENGTH)
    ]  # fmt: skip
    assert several[-1].sha256 == alone


@pytest.mark.parametrize(("name", "length"), [("vt", 1000), ("cwe", 600), ("cwe", 4096), ("fwe", 300)])
def test_a_length_without_room_is_refused_before_a_generator_starts(
    name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some would never end. What is refused names the length that is enough, and that one is."""
    made: list[str] = []
    monkeypatch.setattr("lrconvert.evals.ruler._made", lambda *given: made.append(given[0]))
    with pytest.raises(
        UsageError, match=f"{name} needs at least .* tokens with this tokenizer, not {length}"
    ) as caught:
        prepare_ruler([name], [length], 2, DEMO)
    assert not made
    monkeypatch.undo()
    enough = int(str(caught.value).split("at least ")[1].split()[0]) + 40
    (found,) = prepare_ruler([name], [enough], 8, DEMO)
    assert len(found.prompts) == 8 and all(sample["outputs"] for sample in found.samples)


def test_a_tokenizer_whose_example_does_not_fit_is_refused() -> None:
    class Coarse(Sized):
        def count(self, text: str) -> int:
            return len(text)

    with pytest.raises(InputError, match=r"its example has .* tokens; lm-eval makes room for 500"):
        least = TASKS["vt"].least
        assert least is not None
        least(Coarse(DEMO), 10**6)


def test_needles_without_room_and_unknown_tasks() -> None:
    with pytest.raises(UsageError, match="niah_single_1 has no sample of 150 tokens"):
        prepare_ruler(["niah_single_1"], [150], 2, DEMO)
    with pytest.raises(UsageError, match="niah_9: RULER has no such task"):
        prepare_ruler(["niah_9"], [LENGTH], 2, DEMO)


@pytest.mark.parametrize("name", sorted(set(TASKS) - set(OFFLINE)))
def test_texts_that_cannot_be_fetched_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 6, with the tasks that need none."""
    import nltk
    import requests

    def unreachable(*_: Any, **__: Any) -> Any:
        raise requests.ConnectionError("no network")

    def missing(*_: Any) -> Any:
        raise LookupError("a page of advice")

    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(nltk.data, "find", missing)
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    with pytest.raises(EnvironmentFailure, match=f"{name} needs .*, which can't be fetched .*need none: ") as caught:
        prepare_ruler([name], [LENGTH], 2, DEMO)
    assert "advice" not in str(caught.value)


# --- answers ---------------------------------------------------------------------------------------------


class Scripted:
    """Writes what it was told for each prompt, then the end, then the wanted words of everything."""

    answers: frozenset[str] = frozenset()

    def __init__(self, told: dict[tuple[int, ...], str], end: int | None = None, after: str = "") -> None:
        self.told, self.end, self.after, self.info = told, end, after, {}
        self.asked: list[tuple[int, int]] = []

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
        self.asked.append((len(prompt), new_tokens))
        written = TOKENIZER.encode(self.told[tuple(prompt)], add_special_tokens=False).ids
        behind = TOKENIZER.encode(self.after, add_special_tokens=False).ids
        tokens = [*written, 7, *behind, *[7] * new_tokens][:new_tokens]
        preferred = list(tokens)
        if self.end is not None:
            preferred[len(written)] = self.end  # it was suppressed: the next best stands there
        return tokens, np.eye(VOCAB)[preferred]


def told(found: PreparedRuler, words: Callable[[Any], str]) -> dict[tuple[int, ...], str]:
    encoded = PromptTokenizer.of(DEMO).encode(found.prompts)
    pairs = zip(found.prompts, found.samples, strict=True)
    return {tuple(encoded[prompt].tolist()): words(sample["outputs"]) for prompt, sample in pairs}


@pytest.mark.parametrize("name", ["vt", "fwe", "cwe"])
def test_right_answers_score_one_and_wrong_ones_nothing(name: str) -> None:
    """Half of the wanted words are half a score; and what is written counts, not what case it is in."""
    prepared = prepare_ruler([name], [LENGTH], 4, DEMO)
    for words, score in (
        (lambda wanted: " and ".join(wanted), 1.0),
        (lambda wanted: " ".join(wanted).upper(), 1.0),
        (lambda wanted: "none of these", 0.0),
        (lambda wanted: " ".join(wanted[:1]), 1 / len(prepared[0].samples[0]["outputs"])),
    ):
        session: Any = Scripted(told(prepared[0], words))
        (row,) = measure_ruler(session, prepared, DEMO)
        assert row.score.value == pytest.approx(score) and row.scores == pytest.approx([score] * 4)
        assert row.score.low < row.score.high and row.truncated == 0
        assert max(length for length, _ in session.asked) == row.prompt_tokens
        assert {count for _, count in session.asked} == {prepared[0].new_tokens}
    assert row.to_json()["samples"] == 4 and row.to_json()["prompts_sha256"] == prepared[0].sha256


def test_what_follows_the_end_does_not_count() -> None:
    """A runtime that may not end writes the next best token: the logits say where the end was."""
    (end,) = end_tokens(DEMO)
    ended: Any = Scripted({(1, 2): "one"}, end, after=" two")
    assert answer_of(ended, TOKENIZER, [1, 2], 30, frozenset([end])).strip() == "one"
    assert "two" in answer_of(ended, TOKENIZER, [1, 2], 30, frozenset())


def test_a_prompt_beyond_the_window_loses_its_start() -> None:
    prepared = prepare_ruler(["fwe"], [1024], 2, DEMO)
    session: Any = Scripted({})
    session.told = type("Any", (dict,), {"__missing__": lambda self, key: ""})()
    (row,) = measure_ruler(session, prepared, DEMO, window=600)
    assert row.truncated == 2 and session.asked == [(550, 50)] * 2 and row.prompt_tokens == 550
    (row,) = measure_ruler(session, prepared, DEMO, window=4096)
    assert row.truncated == 0


def test_logits_that_are_no_numbers_are_refused() -> None:
    session: Any = Scripted({})
    session.generate = lambda prompt, count: ([0] * count, np.full((count, 4), np.nan))
    with pytest.raises(InputError, match="not all numbers"):
        answer_of(session, TOKENIZER, [1], 2, frozenset())
