# SPDX-License-Identifier: Apache-2.0
"""`lrconvert extend` on a pico model: what it says and how it ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result
from support.extending import PLAN, prose, write_wordy

from lrconvert.extending import stages

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extend")
    write_wordy(folder / "wordy")
    (folder / "text.txt").write_text(prose(8000), encoding="utf-8")
    (folder / "plan.toml").write_text(PLAN)
    return folder


def arguments(folder: Path, output: Path, *more: object) -> list[object]:
    given = ["--text", folder / "text.txt", "--plan", folder / "plan.toml", "--device", "cpu"]
    return ["extend", folder / "wordy", *given, "-o", output, *more]


def test_help_names_stages_and_plans(cli: Run) -> None:
    found = cli("extend", "--help")
    assert found.code == 0
    for said in ("--text", "--plan", "--held-out", "--until", "--from", "--work", "--dry-run", "2-tune", "built-in"):
        assert said in found.out, said


def test_a_summary_and_what_comes_next(folder: Path, tmp_path: Path, cli: Run) -> None:
    """Each stage with its time, every figure of the evaluation, the recipe, and the command that bakes it: which works.
    A stop and the way on come before."""
    output = tmp_path / "wordy-1k"
    stopped = cli(*arguments(folder, output, "--until", "2-tune"))
    assert stopped.code == 0, stopped.err
    assert "1-search" in stopped.out and "2-tune" in stopped.out and "3-search" not in stopped.out
    assert "stopped after 2-tune" in stopped.err and not output.exists()
    found = cli(*arguments(folder, output))
    assert found.code == 0, found.err
    for name in ("1-search", "2-tune", "3-search", "4-recover", "5-evaluate"):
        assert name in found.out
    assert re.search(r"^base perplexity at 64: [\d.e+]+$", found.out, re.MULTILINE)
    assert re.search(r"^perplexity at 1,024: [\d.e+]+$", found.out, re.MULTILINE)
    assert re.search(r"^retrieval at 256: \d of 2$", found.out, re.MULTILINE)
    assert "3 tiers, up to 1,024" in found.out
    said = re.search(r"next: lrconvert (hf .*)", found.err)
    assert said is not None and str(output) in said[1]
    baked = cli("hf", folder / "wordy", "--recipe", output, "-o", tmp_path / "baked")
    assert baked.code == 0, baked.err
    again = cli(*arguments(folder, output))  # the same says the same
    assert again.code == 0 and re.sub(r"\d+ s", "", again.out) == re.sub(r"\d+ s", "", found.out)
    other = cli(*arguments(folder, output), "--seed", "1")
    assert other.code == 2 and "--force" in other.err


def test_an_interruption_says_how_to_go_on(
    folder: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(stages.STAGES, "search", interrupted)
    found = cli(*arguments(folder, tmp_path / "r"))
    assert found.code == 130
    assert "To continue, run the same command again" in found.err


def test_without_text_or_output_it_is_2(folder: Path, tmp_path: Path, cli: Run) -> None:
    found = cli("extend", folder / "wordy", "--text", folder / "text.txt")
    assert found.code == 2 and "--output" in found.err
    found = cli("extend", folder / "wordy", "-o", tmp_path / "r")
    assert found.code in (2, 3) and "--text" in found.err
    assert not list(tmp_path.iterdir())
