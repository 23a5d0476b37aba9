# SPDX-License-Identifier: Apache-2.0
"""An earlier result of the same benchmarks, and the differences from it, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lrconvert.errors import InputError, UsageError, first_problem
from lrconvert.evals.figures import Figure, difference_figure
from lrconvert.evals.scores import BenchmarkRow, pack, unpack
from lrconvert.evals.tasks import PreparedBenchmark

MAX_RESULT = 64 * 2**20  # bytes; the scores of all questions of MMLU take a thousandth


class EarlierRow(BaseModel):
    """The fields of a result's row that are compared."""

    task: str
    metric: str
    shots: int
    questions: int
    scores: str
    prompts_sha256: str


class EarlierResult(BaseModel):
    """The fields of a result that are compared."""

    evaluation: str
    artifact: str
    seed: int
    files: dict[str, str]
    truncated: int
    rows: list[EarlierRow]


@dataclass(frozen=True)
class Difference:
    """This score minus the earlier one, with the paired standard error."""

    difference: Figure
    stderr: float


def read_earlier(path: Path) -> EarlierResult:
    """The JSON that this evaluation wrote. `InputError` for anything else."""
    try:
        if path.stat().st_size > MAX_RESULT:
            raise InputError(f"{path}: larger than any result of `lrconvert eval benchmarks`")
        found = EarlierResult.model_validate_json(path.read_bytes())
        for row in found.rows:
            if len(unpack(row.scores)) != row.questions:
                raise ValueError(f"{row.task} does not have a score for each of its questions")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error
    except ValidationError as error:
        problem = first_problem(error, "the file")
        raise InputError(f"{path}: not a result of `lrconvert eval benchmarks` ({problem})") from error
    except ValueError as error:
        raise InputError(f"{path}: not a result of `lrconvert eval benchmarks` ({error})") from error
    if found.evaluation != "benchmarks":
        raise InputError(f"{path}: a result of {found.evaluation}, not of benchmarks")
    return found


def check_comparable(
    earlier: EarlierResult, asked: Sequence[PreparedBenchmark], files: Mapping[str, str], seed: int
) -> None:
    """Before anything is loaded: raises `UsageError` with everything that differs in what was asked."""
    then = {row.task: row for row in earlier.rows}
    differing: list[tuple[str, Any, Any]] = [
        ("tasks", ", ".join(row.task for row in earlier.rows), ", ".join(found.name for found in asked)),
        ("seed", earlier.seed, seed),
    ]
    for now in asked:
        if (row := then.get(now.name)) is not None:
            differing += [
                (f"shots of {now.name}", row.shots, now.shots),
                (f"questions of {now.name}", row.questions, now.questions),
                (f"metric of {now.name}", row.metric, now.metric),
            ]
    names = sorted({*earlier.files, *files})
    differing += [(f"data in {name}", earlier.files.get(name), files.get(name)) for name in names]
    problems = [f"{what}: {old} then, {new} now" for what, old, new in differing if old != new]
    if problems:
        raise UsageError(f"{earlier.artifact} was evaluated differently: {'; '.join(problems)}")


def changed_prompts(earlier: EarlierResult, rows: Sequence[BenchmarkRow]) -> UsageError | None:
    """Why the results can't be compared after all, known once the questions are read: the data on the Hub or lm-eval
    changed in between."""
    then = {row.task: row for row in earlier.rows}
    if not (other := [row.task for row in rows if row.prompts_sha256 != then[row.task].prompts_sha256]):
        return None
    return UsageError(
        f"{earlier.artifact} was evaluated differently: other prompts in {', '.join(other)}",
        remedy="The data or lm-eval's version changed: evaluate the earlier artifact again",
    )


def differences(earlier: EarlierResult, rows: Sequence[BenchmarkRow]) -> list[Difference]:
    """One a row, for results with the same prompts (`changed_prompts`)."""
    then = {row.task: row for row in earlier.rows}
    # Both as they are stored, so that a result compared with itself differs by nothing.
    packed = [(then[row.task].scores, pack(row.scores)) for row in rows]
    return [Difference(*difference_figure(unpack(before), unpack(after))) for before, after in packed]
