# SPDX-License-Identifier: Apache-2.0
"""Short benchmarks: which count, with how many examples and by which metric, and where their questions come from.

Without a folder they are lm-eval's own tasks, whose data the Hub has. With one they are definitions of ours over JSON
lines, which ask what lm-eval's ask. Only what makes a task imports lm-eval.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from lrconvert.errors import EnvironmentFailure, InputError, UnsupportedError, UsageError, first_problem

MAX_LINE = 2**20  # bytes; the longest question of these benchmarks has a hundredth of that
SCORED = ("multiple_choice", "loglikelihood")  # what a task may ask: the likelihood of given answers
METRICS = ("acc_norm", "acc")  # of a task that is not in the table, the first that it has

# TruthfulQA's own examples: they come before each of its questions, whatever --shots says.
TRUTHFULQA_EXAMPLES = (
    ("What is human life expectancy in the United States?", "Human life expectancy in the United States is 78 years."),
    (
        "Who was president of the United States in 1955?",
        "Dwight D. Eisenhower was president of the United States in 1955.",
    ),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    (
        "How does a telescope work?",
        "Telescopes use lenses or mirrors to focus light and make objects appear closer.",
    ),
    ("Where were the 1992 Olympics held?", "The 1992 Olympics were held in Barcelona, Spain."),
)


class Question(BaseModel):
    """What lm-eval sees of a line: the prompt, the answers, the index of the right one, and of every answer whether
    it is true (for benchmarks with several that are)."""

    prompt: str
    choices: list[str] = Field(min_length=2)
    gold: int = 0
    true: list[int] = []


class Line(BaseModel, ABC):
    """A line of a benchmark's file; other fields are ignored."""

    @abstractmethod
    def asked(self) -> Question:
        """As lm-eval asks it."""


class ArcLine(Line):
    question: str
    choices: list[str] = Field(min_length=2)
    labels: list[str]
    answer: str

    def asked(self) -> Question:
        return Question(
            prompt=f"Question: {self.question}\nAnswer:", choices=self.choices, gold=self.labels.index(self.answer)
        )


class HellaSwagLine(Line):
    context: str
    endings: list[str] = Field(min_length=2)
    label: int = Field(ge=0)

    def asked(self) -> Question:
        return Question(
            prompt=_capitalised(_cleaned(self.context)), choices=list(map(_cleaned, self.endings)), gold=self.label
        )


class TruthfulQaLine(Line):
    question: str
    correct: list[str] = Field(min_length=1)
    incorrect: list[str] = Field(min_length=1)

    def asked(self) -> Question:
        shown = [f"Q: {question}\nA: {answer}" for question, answer in TRUTHFULQA_EXAMPLES]
        return Question(
            prompt="\n\n".join([*shown, f"Q: {self.question}\nA:"]),
            choices=self.correct + self.incorrect,
            true=[1] * len(self.correct) + [0] * len(self.incorrect),
        )


def _cleaned(text: str) -> str:
    """Without what WikiHow's pages left in brackets."""
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _capitalised(context: str) -> str:
    """With the beginning of the sentence that is to be ended as lm-eval writes it: its first letter alone is large."""
    matched = re.fullmatch(r"(.*[.!?] )([^.!?]+)", context, re.DOTALL)
    return matched[1] + matched[2].capitalize() if matched else context


@dataclass(frozen=True)
class Benchmark:
    """The paper's protocol of a benchmark, and its local files: `questions`, and `examples`, which may be the same
    file; `line` is what stands on a line."""

    shots: int
    metric: str
    questions: str | None = None
    examples: str | None = None
    line: type[Line] | None = None
    own_examples: bool = False  # its prompt has some, and --shots adds none


BENCHMARKS = {
    "arc_challenge": Benchmark(25, "acc_norm", "arc_challenge_test.jsonl", "arc_challenge_train.jsonl", ArcLine),
    "hellaswag": Benchmark(10, "acc_norm", "hellaswag_val.jsonl", "hellaswag_val.jsonl", HellaSwagLine),
    "mmlu": Benchmark(5, "acc"),
    "truthfulqa_mc2": Benchmark(0, "acc", "truthfulqa.jsonl", line=TruthfulQaLine, own_examples=True),
}
# Of a file without examples of its own, questions that are kept as such: a tenth of it, but enough for the shots.
RESERVED = 200


@dataclass(frozen=True)
class PreparedBenchmark:
    """A benchmark, ready to be asked: lm-eval's tasks (several where it is a group), of each the indices of the
    questions that are drawn (None: all), and the files that these come from, by name and SHA-256."""

    name: str
    shots: int
    metric: str
    tasks: dict[str, Any]
    questions: int
    drawn: dict[str, list[int]] | None = None
    files: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of lm-eval and what it calls; we report progress ourselves."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@quiet()
def prepare(
    names: Sequence[str], *, folder: Path | None, shots: int | None, limit: int | None, seed: int
) -> list[PreparedBenchmark]:
    """Every benchmark, with `limit` questions drawn by `seed` (None: all) after `shots` examples (None: the paper's).

    Raises `UsageError` for one that isn't known or can't be asked so, `UnsupportedError` for one that has to generate
    text, `InputError` for a file that is missing or damaged, `EnvironmentFailure` where the Hub can't be reached.
    """
    if unknown := [name for name in names if folder is not None and name not in BENCHMARKS]:
        raise UsageError(f"{', '.join(unknown)}: no such benchmark", remedy=f"With --data: {', '.join(BENCHMARKS)}")
    if folder is None:
        return list(_from_harness(names, shots, limit, seed))
    return [_from_files(name, folder, shots, limit, seed) for name in names]


def draw(total: int, count: int | None, seed: int) -> list[int]:
    """Indices of `count` of `total` questions, in order; of all where there are no more."""
    if count is None or count >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, size=count, replace=False).tolist())


def _shots(name: str, shots: int | None, own: int | None = None) -> int:
    """What was asked for, or the paper's; of a task that is not in the table `own`, what lm-eval asks it with. A task
    with examples of its own keeps to them, as in lm-eval, which marks it by 0."""
    row = BENCHMARKS.get(name)
    fixed = own == 0 if row is None else row.own_examples
    default = own or 0 if row is None else row.shots
    return default if fixed or shots is None else shots


# --- local files -----------------------------------------------------------------------------------------


def _from_files(name: str, folder: Path, shots: int | None, limit: int | None, seed: int) -> PreparedBenchmark:
    row, wanted = BENCHMARKS[name], _shots(name, shots)
    if row.questions is None or row.line is None:
        raise UsageError(f"{name} has no local file", remedy="Omit it, or run it without --data")
    rows, digest = read_lines(folder / row.questions, row.line)
    files, examples = {row.questions: digest}, []
    if row.examples == row.questions:
        rows, examples = _reserved(folder / row.questions, rows, wanted, seed)
    elif row.examples is not None and wanted:
        examples, files[row.examples] = read_lines(folder / row.examples, row.line)
    if len(examples) < wanted:
        raise UsageError(f"{name}: {wanted} examples are needed; {folder / str(row.examples)} has {len(examples)}")
    asked = [rows[index] for index in draw(len(rows), limit, seed)]
    if len(asked) < 2:
        raise InputError(f"{folder / row.questions}: {len(asked)} questions; two are needed for an interval")
    return PreparedBenchmark(
        name, wanted, row.metric, {name: _task(name, asked, examples, wanted)}, len(asked), files=files
    )


def read_lines(path: Path, line: type[Line]) -> tuple[list[Question], str]:
    """The questions of a file of JSON lines, and its SHA-256. `InputError` names the line that is damaged."""
    digest, found = hashlib.sha256(), []
    try:
        with path.open("rb") as file:
            for number, text in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
                digest.update(text)
                if text.strip():
                    found.append(_read_line(f"{path}, line {number}", text, line))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error
    return found, digest.hexdigest()


def _read_line(where: str, text: bytes, line: type[Line]) -> Question:
    try:
        found = line.model_validate_json(text, strict=True).asked()
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error)}") from error
    except ValueError as error:
        raise InputError(f"{where}: the answer is none of the labels") from error
    if not found.gold < len(found.choices):
        raise InputError(f"{where}: answer {found.gold} of {len(found.choices)}")
    if not all(choice.strip() for choice in found.choices):
        raise InputError(f"{where}: an answer is empty")
    return found


def _reserved(path: Path, rows: list[Question], shots: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Questions to ask and questions to show as examples, which are never asked."""
    count = max(shots, min(RESERVED, len(rows) // 10)) if shots else 0
    if count + 2 > len(rows):
        raise UsageError(f"{path}: {len(rows)} questions can't be asked after {shots} of them as examples")
    kept = set(draw(len(rows), count, seed)) if count else set()
    return [row for at, row in enumerate(rows) if at not in kept], [rows[at] for at in sorted(kept)]


def _task(name: str, asked: list[Question], examples: list[Question], shots: int) -> Any:
    """The task that lm-eval runs. Fields of a question are named, so no template has to be filled."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    splits = {"test": asked} | ({"train": examples} if shots else {})
    # In memory: nothing is written into a cache.
    data = {split: Dataset.from_list([row.model_dump() for row in rows]) for split, rows in splits.items()}
    several = bool(asked[0].true)
    metrics = ("acc",) if several else ("acc", "acc_norm")
    config = {
        "task": name,
        "custom_dataset": lambda **_: data,
        "output_type": "multiple_choice",
        "test_split": "test",
        "training_split": "train" if shots else None,
        "fewshot_split": "train" if shots else None,
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "num_fewshot": shots,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "process_results": mass_on_true if several else None,
    }
    return ConfigurableTask(config=config)


def mass_on_true(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Share of the probability of all answers that lies on true ones."""
    logs = np.array([log for log, _ in results])
    shares = np.exp(logs - logs.max())
    return {"acc": float(shares[np.array(doc["true"]) == 1].sum() / shares.sum())}


# --- lm-eval's own ---------------------------------------------------------------------------------------


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _from_harness(names: Sequence[str], shots: int | None, limit: int | None, seed: int) -> Iterator[PreparedBenchmark]:
    manager = _manager()
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UsageError(f"{', '.join(unknown)}: lm-eval has no such task", remedy=f"Some: {', '.join(BENCHMARKS)}")
    for name in names:
        try:
            tasks: dict[str, Any] = manager.load([name])["tasks"]
        except Exception as error:  # whatever a task's own code and the Hub's client raise
            raise EnvironmentFailure(
                f"{name}: its questions can't be loaded from the Hub ({type(error).__name__}: {error})",
                remedy="Check the network, or read local files with --data DIR",
            ) from error
        yield _drawn(name, tasks, shots, limit, seed)


def _drawn(name: str, tasks: dict[str, Any], shots: int | None, limit: int | None, seed: int) -> PreparedBenchmark:
    """Questions drawn from all tasks of a group together. A task of which none is drawn is left out: an empty list
    would mean all to lm-eval."""
    if generating := [task for task, found in tasks.items() if found.OUTPUT_TYPE not in SCORED]:
        raise UnsupportedError(
            f"{name} generates text or scores whole texts ({generating[0]}); only the likelihood of given answers is "
            "measured here"
        )
    wanted, *others = sorted({_shots(name, shots, found.get_config("num_fewshot")) for found in tasks.values()})
    if others:
        raise UsageError(f"{name}: its tasks have {wanted} to {others[-1]} shots", remedy="Name its tasks one by one")
    metric = _metric(name, tasks.values())
    sizes = [len(found.eval_docs) for found in tasks.values()]
    chosen = np.array(draw(sum(sizes), limit, seed))
    starts = np.cumsum([0, *sizes])
    parts = [chosen[(chosen >= low) & (chosen < low + size)] - low for low, size in zip(starts, sizes, strict=False)]
    drawn = {task: part.tolist() for task, part in zip(tasks, parts, strict=True) if len(part)}
    kept = {task: tasks[task] for task in drawn}
    for found in kept.values():
        found.set_config("num_fewshot", wanted)
    return PreparedBenchmark(name, wanted, metric, kept, len(chosen), drawn if len(chosen) < sum(sizes) else None)


def _metric(name: str, tasks: Any) -> str:
    known = [BENCHMARKS[name].metric] if name in BENCHMARKS else list(METRICS)
    for metric in known:
        if all(metric in found.aggregation() for found in tasks):
            return metric
    raise UnsupportedError(f"{name} is measured by neither of {', '.join(known)}")
