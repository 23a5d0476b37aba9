# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: beside lm-eval's own adapter and task definitions, and on sessions whose scores are known."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from conftest import SHARED
from lm_eval import evaluate
from lm_eval import tasks as harness_tasks
from lm_eval.api.instance import Instance
from lm_eval.utils import apply_template
from support.benchmark_files import arc_line, hellaswag_line, truthfulqa_line, write_questions

from lrconvert.checkpoint import locate
from lrconvert.errors import InputError, UnsupportedError, UsageError
from lrconvert.evals import tasks
from lrconvert.evals.benchmarks import SessionModel, batches, measure_benchmarks, protocol, session_model
from lrconvert.evals.earlier import EarlierResult, changed_prompts, differences
from lrconvert.evals.figures import Figure, mean_figure
from lrconvert.evals.prompts import PromptTokenizer
from lrconvert.evals.scores import BenchmarkRow
from lrconvert.evals.tasks import (
    RESERVED,
    ArcLine,
    HellaSwagLine,
    PreparedBenchmark,
    TruthfulQaLine,
    _drawn,  # groups: their data are on the Hub
    draw,
    prepare,
    quiet,
)
from lrconvert.progress import Step
from lrconvert.runtimes.base import Scores
from lrconvert.runtimes.transformers import open_session

DEMO = locate("demo")
LOCAL = ("arc_challenge", "hellaswag", "truthfulqa_mc2")
HARNESS = Path(harness_tasks.__file__).parent


class Rater:
    """A session that finds a text as likely as it is told, and remembers what it was asked."""

    answers: frozenset[str] = frozenset()

    def __init__(self, likelihood: Callable[[str], float]) -> None:
        self.info: dict[str, Any] = {}
        self.tokenizer = PromptTokenizer.of(DEMO)
        self.likelihood = likelihood
        self.asked: list[list[int]] = []

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        found = []
        for row, count in zip(rows, judged, strict=True):
            self.asked.append(list(row))
            loss = -math.log(self.likelihood(self.tokenizer.tokenizer.decode(list(row))))
            found.append(Scores(np.full(count, loss / count), np.full(count, loss < 0.7)))
        return found

    def logits(self, rows: Any, *, positions: Any = None, keep: Any) -> Any:
        raise AssertionError("benchmarks score tokens")

    def generate(self, prompt: Any, new_tokens: int) -> Any:
        raise AssertionError("benchmarks score tokens")

    def close(self) -> None: ...


def instances(pairs: Sequence[tuple[str, ...]]) -> list[Instance]:
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=at)  # pyright: ignore[reportArgumentType]
        for at, pair in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def demo() -> Iterator[SessionModel]:
    """The embedded model in transformers."""
    with open_session(DEMO, custom=False, threads=1) as session:
        yield session_model(session, DEMO, 4096)


@pytest.fixture(scope="module")
def harness() -> Any:
    """The embedded model in lm-eval's own adapter."""
    from lm_eval.models import huggingface

    adapter: Any = huggingface.HFLM
    with quiet():
        return adapter(pretrained=str(DEMO), device="cpu", dtype="float32", batch_size=1)


def test_log_likelihoods_are_those_of_lm_evals_adapter(demo: SessionModel, harness: Any) -> None:
    """Spaces at the end of prompts, answers of many tokens, empty prompts, a BOS that is written out, whole texts."""
    pairs = [
        ("In the beginning", " God created the heaven and the earth."),
        ("In the beginning ", "God"),
        ("And God said, \n\n", "Let there be light"),
        ("", " light"),
        ("", "<s> light"),
        ("<s> In the", "beginning"),
        ("In the beginning", " God"),
        ("And it came to", " pass"),
    ]
    with quiet():
        wanted = harness.loglikelihood(instances(pairs))
        texts = instances([("In the beginning God created the heaven and the earth.",), ("Light.",)])
        whole = harness.loglikelihood_rolling(texts)
    found = demo.loglikelihood(instances(pairs))
    assert [log for log, _ in found] == pytest.approx([log for log, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert {greedy for _, greedy in found} == {False, True}
    assert demo.loglikelihood_rolling(texts) == pytest.approx(whole, abs=1e-3)


def test_scores_are_those_of_lm_evals_adapter(demo: SessionModel, harness: Any, data: Path) -> None:
    """The same tasks with the same seed: every question's metrics and its answers' likelihoods."""
    asked, again = (prepare(LOCAL, folder=data, shots=2, limit=8, seed=3) for _ in range(2))
    rows, run = measure_benchmarks(demo, asked, seed=3), cast(Any, evaluate)
    for row, benchmark in zip(rows, again, strict=True):
        (task,) = benchmark.tasks.values()
        task.set_fewshot_seed(3)
        with quiet():
            wanted: Any = run(harness, {"tasks": benchmark.tasks}, bootstrap_iters=1000)
        (result,) = wanted["results"].values()
        assert row.score.value == pytest.approx(result[f"{row.metric},none"], abs=1e-4)
        assert row.stderr == pytest.approx(result[f"{row.metric}_stderr,none"], abs=1e-4)
        samples = wanted["samples"][benchmark.name]
        assert row.scores == pytest.approx([sample[row.metric] for sample in samples], abs=1e-4)


@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("template", [False, True])
def test_special_tokens_are_those_of_transformers(tmp_path: Path, template: bool, add_bos: bool | None) -> None:
    """The tokenizer's own template decides, whatever its config says beside that."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    folder = shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("*.txt", "*.md"))
    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)  # asked for nowhere, so it has to mean nothing
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = "In the beginning God created"
    wanted = AutoTokenizer.from_pretrained(folder).encode(text)
    assert len(wanted) > 4
    assert PromptTokenizer.of(folder).encode([text])[text].tolist() == wanted


def test_local_prompts_are_those_of_lm_evals_definitions() -> None:
    """Its own templates, filled with the same questions in its own format."""
    arc = yaml.safe_load((HARNESS / "arc" / "arc_easy.yaml").read_text())
    for number in range(3):
        line = arc_line(number)
        doc = line | {"choices": {"text": line["choices"], "label": line["labels"]}, "answerKey": line["answer"]}
        asked = ArcLine.model_validate(line).asked()
        assert asked.prompt == apply_template(arc["doc_to_text"], doc)
        assert str(asked.gold) == apply_template(arc["doc_to_target"], doc)
    truthfulqa = yaml.safe_load((HARNESS / "truthfulqa" / "truthfulqa_mc1.yaml").read_text())
    line = truthfulqa_line(1)
    asked = TruthfulQaLine.model_validate(line).asked()
    assert asked.prompt == apply_template(truthfulqa["doc_to_text"], line)
    assert asked.true == [1, 1, 0, 0, 0]


def test_hellaswag_is_cleaned_as_lm_eval_cleans_it() -> None:
    """Its own function, on the two halves of a context: the second begins large, brackets go."""
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs  # pyright: ignore[reportMissingImports]

    halves = [("A man sits on a roof.", "he in the T-shirt"), ("How to sit [substeps] still. Take a  chair.", "")]
    docs = [
        {"ctx_a": a, "ctx_b": b, "activity_label": "Roofs", "endings": ["goes [now] home.", "b"], "label": "1"}
        for a, b in halves
    ]
    with quiet():
        wanted: Any = process_docs(Dataset.from_list(docs))
    for (first, second), theirs in zip(halves, wanted, strict=True):
        line = {"context": f"Roofs: {first} {second}".strip(), "endings": ["goes [now] home.", "b"], "label": 1}
        ours = HellaSwagLine.model_validate(line).asked()
        assert (ours.prompt, ours.choices, ours.gold) == (theirs["query"].strip(), theirs["choices"], theirs["gold"])


def on_the_hub(path: str, name: str | None = None, **_: Any) -> dict[str, Any]:
    """The questions of `data` as the Hub has them, and two of every subject of MMLU."""
    from datasets import Dataset

    lines: dict[str, list[dict[str, Any]]] = {}
    if path == "allenai/ai2_arc":
        for split, first in (("test", 0), ("train", 1000), ("validation", 0)):
            lines[split] = [
                {
                    "question": line["question"],
                    "choices": {"text": line["choices"], "label": line["labels"]},
                    "answerKey": line["answer"],
                }
                for line in map(arc_line, range(first, first + 30))
            ]
    elif path == "Rowan/hellaswag":
        found = [hellaswag_line(number) for number in range(30)]
        lines["train"] = lines["validation"] = [
            {"activity_label": label, "ctx_a": rest.removesuffix(" he"), "ctx_b": "he"}
            | {"endings": line["endings"], "label": str(line["label"])}
            for line in found
            for label, _, rest in [line["context"].partition(": ")]
        ]
    elif path == "truthfulqa/truthful_qa":
        lines["validation"] = [
            {"question": line["question"]}
            | {"mc2_targets": {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}}
            for line in map(truthfulqa_line, range(30))
            for right, wrong in [(line["correct"], line["incorrect"])]
        ]
    else:
        assert path == "cais/mmlu"
        questions = [
            {"question": f"{name} {number}?", "choices": ["a", "b", "c", "d"], "answer": number % 4}
            for number in range(12)
        ]
        lines = {"test": questions[:2], "dev": questions[2:]}
    return {split: Dataset.from_list(rows) for split, rows in lines.items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own tasks, with questions that come from no network; the index of all its tasks would take seconds."""
    folders: list[str | Path] = [HARNESS / name for name in ("arc", "hellaswag", "truthfulqa", "mmlu/default")]
    manager = harness_tasks.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(tasks, "_manager", lambda: manager)
    monkeypatch.setattr("datasets.load_dataset", on_the_hub)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("name", "shots"), [("arc_challenge", 2), ("hellaswag", 0), ("truthfulqa_mc2", 0)])
def test_local_questions_are_asked_and_scored_as_by_lm_evals_own_tasks(data: Path, name: str, shots: int) -> None:
    """Of the same data: the same prompts to the last character, the same score of every question."""
    model = session_model(Rater(lambda text: 0.1 + 0.8 * (len(text) % 7) / 7), DEMO, 4096)
    (ours,), (theirs,) = (
        measure_benchmarks(model, prepare([name], folder=folder, shots=shots, limit=None, seed=5), 5)
        for folder in (data, None)
    )
    assert ours.prompts_sha256 == theirs.prompts_sha256
    assert (ours.metric, ours.shots) == (theirs.metric, theirs.shots)
    assert len(ours.scores) == 30 and ours.scores == pytest.approx(theirs.scores, abs=1e-12)
    assert 0 < ours.score.value < 1


@pytest.mark.usefixtures("hub")
def test_mmlu_is_drawn_from_all_its_subjects() -> None:
    """Five examples in the order of the file; so many questions in all, and nothing of subjects that have none."""
    session = Rater(lambda text: 0.9 if text.endswith("A") else 0.1)
    (asked,) = prepare(["mmlu"], folder=None, shots=None, limit=20, seed=1)
    (row,) = measure_benchmarks(session_model(session, DEMO, 4096), [asked], 1)
    assert len(row.scores) == asked.questions == 20 and (row.shots, row.metric) == (5, "acc")
    assert row.score.value == sum(index % 2 == 0 for index in draw(114, 20, 1)) / 20
    assert all(prompt.count("Answer:") == 6 and " 2?" in prompt for prompt, _ in _arguments(asked))
    (whole,) = prepare(["mmlu"], folder=None, shots=0, limit=None, seed=1)
    assert (whole.questions, whole.shots, whole.drawn) == (114, 0, None)


@pytest.mark.parametrize("right", [True, False])
def test_knowing_the_answers_scores_one_and_denying_them_zero(data: Path, right: bool) -> None:
    ends = {f"Question: {line['question']}\nAnswer: {_answer(line)}" for line in map(arc_line, range(30))}
    for number in range(30):
        line = hellaswag_line(number)
        ends.add(line["context"].replace(". he", ". He") + " " + line["endings"][line["label"]])
    session = Rater(lambda text: 0.9 if any(text.endswith(end) for end in ends) == right else 1e-9)
    rows = measure_benchmarks(
        session_model(session, DEMO, 4096), prepare(LOCAL[:2], folder=data, shots=1, limit=None, seed=0), 0
    )
    assert [row.score.value for row in rows] == [float(right)] * 2
    assert [len(row.scores) for row in rows] == [30, 27]


def _answer(line: dict[str, Any]) -> str:
    return line["choices"][line["labels"].index(line["answer"])]


def test_mc2_is_the_share_of_probability_on_true_answers(tmp_path: Path) -> None:
    """By hand: (0.5 + 0.2) / 0.8 and 0.1 / 0.4; behind six examples of the benchmark's own, whatever --shots says."""
    likely = {"a b": 0.5, "c d": 0.2, "e f": 0.1, "g h": 0.1, "i j": 0.3}
    lines = [
        {"question": "One?", "correct": ["a b", "c d"], "incorrect": ["e f"]},
        {"question": "Two?", "correct": ["g h"], "incorrect": ["i j"]},
    ]
    (tmp_path / "truthfulqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    session = Rater(lambda text: likely[text.rpartition("A: ")[2]])
    asked = prepare(["truthfulqa_mc2"], folder=tmp_path, shots=5, limit=None, seed=0)
    (row,) = measure_benchmarks(session_model(session, DEMO, 4096), asked, 0)
    assert row.scores == pytest.approx((0.875, 0.25)) and row.score.value == pytest.approx(0.5625)
    assert row.stderr == pytest.approx(0.3125) and row.shots == 0
    assert row.score.low == 0.0 and row.score.high == 1.0
    assert all(prompt.count("Q: ") == 7 for prompt, _ in _arguments(asked[0]))


def _arguments(asked: PreparedBenchmark) -> list[tuple[str, str]]:
    return [instance.args for task in asked.tasks.values() for instance in task.instances]


def test_shots_are_examples_in_front_of_a_question(data: Path) -> None:
    """So many, from the file of examples; of HellaSwag from questions that are never asked. Seeds draw others."""
    model = session_model(Rater(lambda text: 0.5), DEMO, 4096)
    asked = {seed: prepare(LOCAL[:2], folder=data, shots=3, limit=6, seed=seed) for seed in (0, 1)}
    rows = {seed: measure_benchmarks(model, asked[seed], seed) for seed in asked}
    arc, hellaswag = asked[0]
    assert len(_arguments(arc)) > 6 * 3
    for prompt, _ in _arguments(arc):
        *examples, question = prompt.split("\n\n")
        assert len(examples) == 3 and question.endswith("\nAnswer:")
        assert all(" on day 10" in example for example in examples)
    shown = {line for prompt, _ in _arguments(hellaswag) for line in prompt.split("\n\n")[:-1]}
    questions = {prompt.split("\n\n")[-1] for prompt, _ in _arguments(hellaswag)}
    assert len(questions) == 6 and not [line for line in shown if line.startswith(tuple(questions))]
    assert all(len(prompt.split("\n\n")) == 4 for prompt, _ in _arguments(hellaswag))
    again = measure_benchmarks(model, prepare(LOCAL[:2], folder=data, shots=3, limit=6, seed=0), 0)
    assert again == rows[0]
    assert all(a.prompts_sha256 != b.prompts_sha256 for a, b in zip(rows[0], rows[1], strict=True))
    said = protocol(asked[0], 6)
    assert "those of hellaswag are questions of the same file" in said and "6 questions per task" in said
    assert "hellaswag" not in protocol(prepare(LOCAL, folder=data, shots=0, limit=None, seed=0), None)


def test_a_limit_draws_questions() -> None:
    assert draw(1000, 10, 0) == sorted(set(draw(1000, 10, 0))) != draw(1000, 10, 1)
    assert max(draw(1000, 10, 0)) > 100
    assert draw(5, 5, 0) == draw(5, 9, 3) == draw(5, None, 0) == [0, 1, 2, 3, 4]


class Leaf:
    """What of a task of lm-eval's `_drawn` looks at."""

    def __init__(self, size: int, asks: str = "multiple_choice", own: int | None = None, metric: str = "acc") -> None:
        self.OUTPUT_TYPE, self.eval_docs, self.own, self.metric, self.set = asks, range(size), own, metric, {}

    def get_config(self, key: str) -> int | None:
        return self.own

    def set_config(self, key: str, value: int) -> None:
        self.set[key] = value

    def aggregation(self) -> dict[str, Any]:
        return {self.metric: None}


def test_a_limit_draws_from_all_tasks_of_a_group() -> None:
    """One of which none is drawn is not asked: lm-eval takes an empty list for all. Tasks that generate are refused."""
    leaves = {f"mmlu_{number}": Leaf(size) for number, size in enumerate((3, 500, 2))}
    asked = _drawn("mmlu", leaves, None, 5, 0)
    assert asked.drawn is not None and set(asked.tasks) == set(asked.drawn) == {"mmlu_1"}
    assert (asked.questions, asked.shots, asked.metric) == (5, 5, "acc")
    assert asked.tasks["mmlu_1"].set == {"num_fewshot": 5}
    assert [at + 3 for at in asked.drawn["mmlu_1"]] == draw(505, 5, 0)
    assert _drawn("mmlu", leaves, 2, None, 0).drawn is None
    with pytest.raises(UnsupportedError, match="gsm8k generates text or scores whole texts"):
        _drawn("gsm8k", {"gsm8k": Leaf(9, "generate_until")}, None, None, 0)
    zero = Leaf(9, own=0)
    assert _drawn("own", {"own": zero}, 3, None, 0).shots == 0
    with pytest.raises(UsageError, match="tasks have 0 to 3 shots"):
        _drawn("both", {"one": Leaf(9), "two": zero}, 3, None, 0)
    with pytest.raises(UnsupportedError, match="neither of acc_norm, acc"):
        _drawn("other", {"other": Leaf(9, metric="bleu")}, None, None, 0)


def test_prompts_beyond_the_window_lose_their_start_and_are_counted() -> None:
    session = Rater(lambda text: 0.5)
    model = SessionModel(session, PromptTokenizer.of(DEMO), window=24)
    long = "In the beginning God created the heaven and the earth. " * 5
    model.loglikelihood(instances([(long, " And"), ("In the", " beginning"), (long, " And the earth")]))
    assert model.effort.truncated == 2 and model.effort.requests == 3
    lengths = [len(row) for row in session.asked]
    assert sorted(lengths)[1:] == [24, 24] and model.effort.tokens == sum(lengths)
    whole = model.tokenizer.encode([long.rstrip() + "  And"])[long.rstrip() + "  And"].tolist()
    assert whole[-24:] in session.asked
    with pytest.raises(InputError, match="does not fit into a window of 24"):
        model.loglikelihood(instances([("In the", " " + long)]))
    with pytest.raises(InputError, match="no tokens of its own"):
        model.loglikelihood(instances([("In the", "")]))


def test_a_long_text_is_judged_in_windows_that_fit() -> None:
    """Every token once, behind at least one token, in rows of at most the window."""
    session = Rater(lambda text: 0.25)
    model = replace(session_model(session, DEMO, 4096), window=16)
    text = "In the beginning God created the heaven and the earth. " * 5
    (ids,) = model.tokenizer.encode([text]).values()
    (found,) = model.loglikelihood_rolling(instances([(text,)]))
    assert len(ids) > 3 * 16 and max(map(len, session.asked)) == 16 and len(session.asked) == -(-len(ids) // 15)
    assert found == pytest.approx(len(session.asked) * math.log(0.25))


def test_identical_requests_are_asked_once() -> None:
    session = Rater(lambda text: 0.25)
    steps: list[Step] = []
    model = session_model(session, DEMO, 4096, progress=steps.append)
    found = model.loglikelihood(instances([("In the", " beginning"), ("In the", " end"), ("In the", " beginning")]))
    assert len(session.asked) == model.effort.requests == 2
    assert [log for log, _ in found] == pytest.approx([math.log(0.25)] * 3)
    assert (steps[-1].done, steps[-1].total, steps[-1].unit) == (0, 2, "requests")
    with pytest.raises(UnsupportedError, match="generates no text"):
        model.generate_until([])


def test_a_broken_model_has_no_score() -> None:
    """nan is larger than nothing and smaller than nothing: answers of such a model would count as wrong."""
    with pytest.raises(InputError, match="not all numbers"):
        session_model(Rater(lambda text: math.nan), DEMO, 4096).loglikelihood(instances([("In the", " beginning")]))


def test_batches_hold_what_fits_on_one_side_of_the_boundary() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=200).tolist()
    made = list(batches(lengths, 500, boundary=50))
    assert sorted(at for batch in made for at in batch) == list(range(200))
    for batch in made:
        longest = max(lengths[at] for at in batch)
        assert longest * len(batch) <= 500
        assert (longest > 50) == (min(lengths[at] for at in batch) > 50)
    assert lengths[made[0][0]] == max(lengths)
    assert list(batches([7, 9], 5)) == [[1], [0]] and list(batches([], 5)) == []


BAD = [
    ("arc_challenge", "arc_challenge_test.jsonl", '{"question": "a"}', "line 2: choices: Field required"),
    ("arc_challenge", "arc_challenge_train.jsonl", "[1", "line 2: Invalid JSON"),
    ("arc_challenge", "arc_challenge_test.jsonl",
     '{"question": "a", "choices": ["b", "c"], "labels": ["A", "B"], "answer": "C"}', "line 2: the answer is none"),
    ("arc_challenge", "arc_challenge_test.jsonl",
     '{"question": "a", "choices": ["b", ""], "labels": ["A", "B"], "answer": "A"}', "line 2: an answer is empty"),
    ("arc_challenge", "arc_challenge_test.jsonl",
     '{"question": "a", "choices": ["b", "d"], "labels": ["A", "B", "C"], "answer": "C"}', "line 2: answer 2 of 2"),
    ("hellaswag", "hellaswag_val.jsonl", '{"context": "a", "endings": ["b", "c"], "label": "1"}', "line 2: label: "),
    ("truthfulqa_mc2", "truthfulqa.jsonl", '{"question": "a", "correct": [], "incorrect": ["b"]}', "line 2: correct: "),
]  # fmt: skip


@pytest.mark.parametrize(("task", "name", "line", "said"), BAD)
def test_a_damaged_line_is_named(tmp_path: Path, task: str, name: str, line: str, said: str) -> None:
    folder = write_questions(tmp_path, 5)
    lines = (folder / name).read_text().splitlines()
    (folder / name).write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(InputError, match=f"{name}, {said}"):
        prepare([task], folder=folder, shots=1, limit=None, seed=0)


def test_too_few_questions_are_reported(tmp_path: Path) -> None:
    write_questions(tmp_path, 5)
    with pytest.raises(UsageError, match=r"25 examples are needed; .* has 5"):
        prepare(["arc_challenge"], folder=tmp_path, shots=None, limit=None, seed=0)
    with pytest.raises(UsageError, match="5 questions can't be asked after 4"):
        prepare(["hellaswag"], folder=tmp_path, shots=4, limit=None, seed=0)
    write_questions(tmp_path, 1)
    with pytest.raises(InputError, match="two are needed"):
        prepare(["truthfulqa_mc2"], folder=tmp_path, shots=None, limit=None, seed=0)


def test_the_real_files_run_end_to_end(demo: SessionModel) -> None:
    """Five questions of each, behind fewer examples than the paper's, which are there too."""
    folder = SHARED / "benchmarks"
    if not folder.is_dir():
        pytest.skip("the benchmarks' questions (../shared/benchmarks) are not on this machine")
    paper = prepare(LOCAL, folder=folder, shots=None, limit=None, seed=0)
    assert [(found.shots, found.metric, found.questions) for found in paper] == [
        (25, "acc_norm", 1172),
        (10, "acc_norm", 10042 - RESERVED),
        (0, "acc", 817),
    ]
    rows = measure_benchmarks(demo, prepare(LOCAL, folder=folder, shots=1, limit=5, seed=0), 0)
    assert [(row.shots, len(row.scores)) for row in rows] == [(1, 5), (1, 5), (0, 5)]
    assert all(0 <= score <= 1 for row in rows for score in row.scores)


def test_a_difference_is_paired() -> None:
    """By hand: scores that differ on one question of four, twice; other prompts are not compared."""
    then = BenchmarkRow("a", "acc", 0, mean_figure(0.5, 0.1), 0.1, (1.0, 0.0, 1.0, 0.0), "same")
    earlier = EarlierResult.model_validate(
        {"evaluation": "benchmarks", "artifact": "before", "seed": 0, "files": {}, "truncated": 0}
        | {"rows": [then.to_json()]}
    )
    (none,) = differences(earlier, [then])
    assert (none.difference, none.stderr) == (Figure(0.0, 0.0, 0.0), 0.0)
    (found,) = differences(earlier, [replace(then, scores=(1.0, 1.0, 1.0, 0.0))])
    assert found.difference.value == 0.25 and found.stderr == pytest.approx(0.25)
    assert found.difference.low == pytest.approx(0.25 - 1.96 * 0.25, abs=1e-4)
    assert changed_prompts(earlier, [then]) is None
    assert "other prompts in a" in str(changed_prompts(earlier, [replace(then, prompts_sha256="other")]))
