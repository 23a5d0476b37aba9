# SPDX-License-Identifier: Apache-2.0
"""`lrconvert eval benchmarks` on the embedded model: what it writes, and what it refuses."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from support.benchmark_files import write_questions

Run = Callable[..., Result]
TASKS = "arc_challenge,hellaswag,truthfulqa_mc2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


def asked(data: Path, *more: object) -> tuple[object, ...]:
    return "eval", "benchmarks", "demo", "--tasks", TASKS, "--data", data, "--limit", 6, "--threads", 1, *more


def test_a_result_and_its_difference_from_an_earlier_one(cli: Run, data: Path, tmp_path: Path) -> None:
    """Table, JSON and picture say how they came to be, nothing else is said; against a result with
    other scores that is what differs."""
    result = cli(*asked(data, "--shots", 2, "-o", tmp_path / "out" / "b"))
    assert result.code == 0, result.err
    assert result.err == "warning: --shots does not apply to truthfulqa_mc2, which has examples of its own\n"
    assert "score (95 %)" in result.out and "6 questions per task, drawn with the seed" in result.out
    assert (tmp_path / "out" / "b.png").read_bytes().startswith(b"\x89PNG")
    path = tmp_path / "out" / "b.json"
    kept = json.loads(path.read_text())
    assert kept["seed"] == 0 and kept["lm_eval"] == importlib.metadata.version("lm_eval")
    assert kept["files"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in data.glob("*.jsonl")}
    assert kept["truncated"] == 0 and kept["window"] == 4096 and kept["tokens"] > kept["requests"] > 18
    assert [(row["task"], row["shots"], row["metric"], row["questions"]) for row in kept["rows"]] == [
        ("arc_challenge", 2, "acc_norm", 6),
        ("hellaswag", 2, "acc_norm", 6),
        ("truthfulqa_mc2", 0, "acc", 6),
    ]
    for row in kept["rows"]:
        scores = [float(score) for score in row["scores"].split()]
        assert len(scores) == 6 and sum(scores) / 6 == pytest.approx(row["score"]["value"], abs=1e-6)
        assert row["score"]["low"] <= row["score"]["value"] <= row["score"]["high"] and row["stderr"] >= 0

    kept["rows"][0]["scores"] = "0 0 0 0 0 0"
    path.write_text(json.dumps(kept))
    other = json.loads(cli(*asked(data, "--shots", 2, "--against", path, "--json")).out)
    first, *rest = other["against"]["rows"]
    assert first["difference"]["value"] == pytest.approx(other["rows"][0]["score"]["value"]) != 0.0
    assert [row["difference"]["value"] for row in rest] == [0.0, 0.0]


def test_a_result_that_is_compared_with_is_not_overwritten(cli: Run, data: Path, tmp_path: Path) -> None:
    """However the two are spelled, and before anything is read."""
    (tmp_path / "before.json").write_text("kept")
    for stem in (tmp_path / "before", tmp_path / "." / "x" / ".." / "before"):
        said = cli(*asked(data, "--against", tmp_path / "before.json", "-o", stem))
        assert said.code == 2 and "which --against compares with" in said.err
    assert (tmp_path / "before.json").read_text() == "kept"


def test_results_of_other_questions_are_not_compared(cli: Run, data: Path, tmp_path: Path) -> None:
    """Everything that differs is named at once; damaged files are no results."""
    rows: list[dict[str, Any]] = [
        {"task": "arc_challenge", "metric": "acc_norm", "shots": 25, "questions": 9, "scores": "0 " * 9,
         "prompts_sha256": ""}
    ]  # fmt: skip
    earlier = {"evaluation": "benchmarks", "artifact": "before", "seed": 4, "files": {}, "truncated": 0, "rows": rows}
    path = tmp_path / "e.json"
    path.write_text(json.dumps(earlier))
    said = cli(*asked(data, "--shots", 2, "--against", path))
    assert said.code == 2
    for words in ("tasks: arc_challenge then", "seed: 4 then, 0 now", "shots of arc_challenge: 25 then, 2 now",
                  "questions of arc_challenge: 9 then, 6 now", "data in hellaswag_val.jsonl: None then"):  # fmt: skip
        assert words in said.err
    rows[0]["questions"] = 8
    for damage in ("{", "[]", json.dumps(earlier | {"evaluation": "passkey", "rows": []}), json.dumps(earlier)):
        path.write_text(damage)
        said = cli(*asked(data, "--shots", 2, "--against", path))
        assert said.code == 3 and "e.json: " in said.err, damage
    rows[0]["questions"] = 9
    for score in ("nan", "inf", "5", "-1"):
        rows[0]["scores"] = "0 " * 8 + score
        path.write_text(json.dumps(earlier))
        said = cli(*asked(data, "--shots", 2, "--against", path))
        assert said.code == 3 and "a score is not between 0 and 1" in said.err, score
    assert cli(*asked(data, "--against", tmp_path / "none.json")).code == 3


def test_bad_input(cli: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be asked is said before anything is loaded."""
    run = ("eval", "benchmarks", "demo")
    assert cli(*run, "--tasks", "arc_challenge,,", "--data", data).code == 2
    assert cli(*run, "--tasks", "hellaswag,hellaswag", "--data", data).code == 2
    assert cli(*run, "--tasks", "hellaswag", "--data", data, "--limit", 0).code == 2
    said = cli(*run, "--tasks", "chess", "--data", data)
    assert said.code == 2 and "chess" in said.err and "truthfulqa_mc2" in said.err
    said = cli(*run, "--tasks", "mmlu", "--data", data)
    assert said.code == 2 and "mmlu has no local file" in said.err
    said = cli(*run, "--tasks", "hellaswag", "--data", tmp_path)
    assert said.code == 3 and "hellaswag_val.jsonl: can't be read" in said.err
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "truthfulqa.jsonl").write_text('{"question": "a"\n')
    said = cli(*run, "--tasks", "truthfulqa_mc2", "--data", broken)
    assert said.code == 3 and "truthfulqa.jsonl, line 1: " in said.err and said.err.count("\n") == 1
    assert cli("eval", "benchmarks", tmp_path / "no", "--tasks", "hellaswag", "--data", data).code == 3
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = cli(*run, "--tasks", "hellaswag", "--data", data)
    assert said.code == 6 and "pip install 'lrconvert[eval]'" in said.err


@pytest.mark.parametrize("index", ["truthfulqa", pytest.param("all", marks=pytest.mark.slow)])
def test_without_the_hub_local_data_are_named(cli: Run, monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    """lm-eval's own tasks: one that it does not have, and one whose questions can't be had. Its index of all its tasks
    takes seconds to make; that of one folder does the same for this one."""
    pytest.importorskip("lm_eval", reason="the extra eval brings lm-eval")
    from lm_eval.tasks import TaskManager

    from lrconvert.evals import tasks

    if index != "all":
        folder = Path(sys.modules["lm_eval.tasks"].__path__[0], index)
        manager = TaskManager(include_path=folder, include_defaults=False)
        monkeypatch.setattr(tasks, "_manager", lambda: manager)
    said = cli("eval", "benchmarks", "demo", "--tasks", "truthfulqa_mc2,no_such_task")
    assert said.code == 2 and "\nlrconvert: no_such_task: lm-eval has no such task" in f"\n{said.err}"
    said = cli("eval", "benchmarks", "demo", "--tasks", "truthfulqa_mc2")
    assert said.code == 6 and "--data DIR" in said.err and said.err.count("\n") == 1
