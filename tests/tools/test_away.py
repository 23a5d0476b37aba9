# SPDX-License-Identifier: Apache-2.0
"""benchmarks/away.py: answers that were stopped go on where they were, and are those of one that was not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import away
import numpy as np
import pytest

from lrconvert.runtimes.base import Scores

CALLS: list[away.Call] = [
    ("score", [[5, 6, 7], [8, 9]], [2, 1]),
    ("generate", [[1, 2, 3]], [2]),
    ("score", [[4, 4, 4, 4]], [3]),
]


class Counting:
    """A session whose answers follow from what it is asked."""

    def __init__(self) -> None:
        self.info, self.asked = {"runtime": "counting"}, 0

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        self.asked += 1
        return [
            Scores(np.arange(count) + float(sum(row)), np.arange(count) % 2 == 0)
            for row, count in zip(rows, judged, strict=True)
        ]

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
        self.asked += 1
        return [sum(prompt)] * new_tokens, np.eye(10)[[sum(prompt)] * new_tokens]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Counting:
    made = Counting()

    @contextlib.contextmanager
    def opened(*_: Any, **__: Any) -> Iterator[Any]:
        yield made, None

    monkeypatch.setattr(away, "opened", opened)
    return made


def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, *options: str) -> int:
    """The exit code of `away.py answer`."""
    arguments = ["away.py", "answer", str(tmp_path / "asked.npz"), "demo", "-o", str(tmp_path / name), *options]
    monkeypatch.setattr("sys.argv", arguments)
    try:
        away.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def write_asked(path: Path, calls: list[away.Call]) -> None:
    packed: dict[str, Any] = dict(away._packed(calls))
    np.savez_compressed(path, **packed)


def test_answers_that_were_stopped_go_on(tmp_path: Path, session: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    write_asked(tmp_path / "asked.npz", CALLS)
    assert answered(tmp_path, monkeypatch, "whole.npz") == 0
    codes = [answered(tmp_path, monkeypatch, "parts.npz", "--seconds", "-1") for _ in CALLS]
    assert codes == [75, 75, 0]
    assert session.asked == 2 * len(CALLS)  # nothing was asked twice
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "parts.npz") as parts:
        for name in ("rows", "lengths", "asked", "first", "second"):
            np.testing.assert_array_equal(whole[name], parts[name])


def test_answers_to_other_questions_are_not_continued(
    tmp_path: Path, session: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_asked(tmp_path / "asked.npz", CALLS)
    assert answered(tmp_path, monkeypatch, "answers.npz", "--seconds", "-1") == 75
    write_asked(tmp_path / "asked.npz", CALLS[::-1])
    monkeypatch.setattr("sys.argv", ["away.py", "answer", *map(str, (tmp_path / "asked.npz", "demo")), "-o",
                                     str(tmp_path / "answers.npz")])  # fmt: skip
    with pytest.raises(SystemExit, match="answers other questions"):
        away.main()
    assert session.asked == 1
