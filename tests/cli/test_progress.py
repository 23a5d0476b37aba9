# SPDX-License-Identifier: Apache-2.0
"""How long steps are shown: count, elapsed time and time left, on a terminal and in a log."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lrconvert.cli import _progress
from lrconvert.cli._progress import Clock, show_progress
from lrconvert.progress import BYTES, Step


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now() -> Time:
    return Time()


def test_the_time_left_follows_the_work_not_the_count(now: Time) -> None:
    """A quarter of the work in 10 s: 30 s are left, whatever the number of steps. Between steps it runs down."""
    clock = Clock(now)
    clock.update(Step("checks", "far end", 0, 31, share=0.0))
    assert clock.left is None and clock.line == "checks: 0 of 31, far end (0:00)"
    now.seconds += 10
    clock.update(Step("checks", "decode", 3, 31, share=0.25))
    assert clock.line == "checks: 3 of 31, decode (0:10, about 30 s left)"
    now.seconds += 12
    assert clock.line == "checks: 3 of 31, decode (0:22, about 18 s left)"
    now.seconds += 60  # the estimate was wrong: nothing is better than "0 s left"
    assert clock.line == "checks: 3 of 31, decode (1:22)"


def test_each_task_has_its_own_rate(now: Time) -> None:
    clock = Clock(now)
    clock.update(Step("checksums", "model.safetensors", 0, 4_000_000_000, BYTES))
    now.seconds += 3
    clock.update(Step("checksums", "model.safetensors", 3_000_000_000, 4_000_000_000, BYTES))
    assert clock.line == "checksums: 3.0 GB of 4.0 GB, model.safetensors (0:03, about 1 s left)"
    clock.update(Step("checks", "far end", 0, 31))
    assert clock.line == "checks: 0 of 31, far end (0:03)"


def test_a_task_may_know_better(now: Time) -> None:
    """A search that continues from its journal is at 60 % at once; what is left is not told by that."""
    clock = Clock(now)
    clock.update(Step("set for 65,536 tokens", "best loss 2.3456", 12, unit="evaluations", share=0.6, left=600))
    now.seconds += 5
    assert clock.line == "set for 65,536 tokens: 12 evaluations, best loss 2.3456 (0:05, about 10 min left)"
    clock.update(Step("set for 65,536 tokens", "best loss 2.3456", 1, unit="evaluations", share=0.6, left=7500))
    assert "1 evaluation, " in clock.line and "about 2.1 h left" in clock.line
    now.seconds += 3700
    assert "(1:01:45, " in clock.line


def test_work_that_was_done_before_is_not_counted(now: Time) -> None:
    clock = Clock(now)
    clock.update(Step("writing", "", 50, 100))
    now.seconds += 10
    clock.update(Step("writing", "", 75, 100))
    assert clock.line == "writing: 75 of 100 (0:10, about 10 s left)"


def test_a_log_gets_lines_during_one_long_step(capfd: pytest.CaptureFixture[str]) -> None:
    """From time to time, also while no step ends; none once it is over."""
    with show_progress(every=0.02) as progress:
        progress(Step("checks", "far end", 3, 31))
        _until(lambda: capfd.readouterr().err.count("checks: 3 of 31, far end (") >= 1)
        _until(lambda: capfd.readouterr().err.count("checks: 3 of 31, far end (") >= 1)
    capfd.readouterr()
    time.sleep(0.1)
    assert capfd.readouterr() == ("", "")


def test_a_quiet_command_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with show_progress(quiet=True, every=0.001) as progress:
        progress(Step("checks", "far end", 3, 31))
        time.sleep(0.05)
    assert capfd.readouterr() == ("", "")


def _until(seen: object, limit: float = 20.0) -> None:
    assert callable(seen)
    started = time.monotonic()
    while not seen():
        assert time.monotonic() - started < limit
        time.sleep(0.01)


SCRIPT = """
import time
from lrconvert.cli._progress import show_progress
from lrconvert.progress import Step
with show_progress() as progress:
    progress(Step("checks", "native code: far end", 0, 31, share=0.0))
    time.sleep(2.2)
    progress(Step("checks", "native code: [decode]", 3, 31, share=0.1))
    time.sleep(0.8)
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar() -> None:
    """One line with count, step, elapsed and left; it goes away at the end. On a narrow terminal as on a wide one."""
    with ThreadPoolExecutor(2) as terminals:
        shown = dict(zip((80, 120), terminals.map(on_a_terminal, (80, 120)), strict=True))
    for width, output in shown.items():
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
        lines = [line for line in re.split(r"[\r\n]+", text) if "3 of 31" in line]
        assert lines and all(len(line) <= width for line in lines), lines
        assert re.search(r"checks .*3 of 31 +native code: (\[decode\]|\S*…) +0:0[23], about (19|2\d) s left", lines[-1])
        assert output.rstrip().endswith((b"\x1b[2K", b"\x1b[?25h")), width  # erased


def on_a_terminal(width: int) -> bytes:
    """What the script shows on a terminal of this width."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = io.BytesIO()
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 65536):
            shown.write(part)
    os.close(ours)
    assert process.wait() == 0
    return shown.getvalue()


def test_every_long_command_uses_it() -> None:
    """One place: no other file of the command line makes bars of its own."""
    folder = Path(_progress.__file__).parent
    for path in folder.glob("*.py"):
        if path.name != "_progress.py":
            assert "rich.progress" not in path.read_text(encoding="utf-8"), path.name
    for name in ("_bake", "_evals", "demo", "extend", "push", "search", "verify"):
        assert "show_progress(" in (folder / f"{name}.py").read_text(encoding="utf-8"), name
