# SPDX-License-Identifier: Apache-2.0
"""tools/torture: a few kills lose nothing, and what it looks for is found where it is planted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.forks import ForkedCommands
from support.staging import linux_only
from torturing import trials
from torturing.scenarios import NEW, NOTHING, OLD, SCENARIOS, Mixed, whole
from torturing.trials import kills, races, trial

BEFORE = {"out/a": b"old", "out/b": b"old", "text": b"x"}
AFTER = {"out/a": b"new", "out/b": b"new", "text": b"x"}


def test_what_lies_there_is_old_or_new_or_nothing() -> None:
    state = whole("out/")
    assert (state(BEFORE, BEFORE, AFTER), state(AFTER, BEFORE, AFTER)) == (OLD, NEW)
    assert state({"text": b"x"}, BEFORE, AFTER) == NOTHING
    for mixed in ({**AFTER, "out/b": b"old"}, {"out/a": b"new"}, {**AFTER, "out/c": b""}):
        with pytest.raises(Mixed):
            state(mixed, BEFORE, AFTER)


@linux_only
def test_a_few_kills_and_a_race_lose_nothing_and_what_is_left_behind_is_found(
    tmp_path: Path, commands: ForkedCommands
) -> None:
    """`tools/torture --kills 100` tries every command so."""
    with trial(SCENARIOS["hf"], tmp_path, commands) as tried:
        for found in (kills(tried, 3), races(tried, 1)):
            assert found.findings == [] and found.outcomes.total() > 0
        tried.listing.discard("out/config.json")
        (finding,) = kills(tried, 1).findings
        assert "['out/config.json'] left behind" in finding


@linux_only
def test_folders_and_processes_that_a_kill_leaves_are_found(
    tmp_path: Path, commands: ForkedCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "WORKER_ENDS", 0.1)
    with trial(SCENARIOS["hf"], tmp_path, commands) as tried:
        (tried.temporary / "lrconvert-run-abandons").mkdir()
        (finding,) = kills(tried, 1).findings
        assert "left in the folder for temporary files" in finding
        with subprocess.Popen(["sleep", "60"], cwd=tried.temporary / "lrconvert-run-abandons") as living:
            (finding,) = kills(tried, 1).findings
            assert f"[{living.pid}] live on" in finding
            living.kill()
