# SPDX-License-Identifier: Apache-2.0
"""How long steps are shown: count, elapsed time and time left; a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import click

from lrconvert.cli._output import count, duration, size
from lrconvert.progress import BYTES, Progress, Step, silent

EVERY = 15.0  # seconds between two lines, where there is no terminal
# The time left is shown once this part of a task is done and this time has passed.
KNOWN_PART, KNOWN_SECONDS = 0.02, 2.0


class Clock:
    """Elapsed time and time left. Each task has a rate of its own; the elapsed time is that of all."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._started = now, now()
        self._began = self._updated = self._started  # the task, its last step
        self._first_part = 0.0  # of the task that was done when it was first seen
        self.step: Step | None = None

    def update(self, step: Step) -> None:
        self._updated = self._now()
        if self.step is None or step.task != self.step.task:
            self._began, self._first_part = self._updated, step.part
        self.step = step

    @property
    def elapsed(self) -> float:
        return self._now() - self._started

    @property
    def left(self) -> float | None:
        """Seconds until the task is done, at its rate so far. None while that is unknown, or proved wrong."""
        if self.step is None:
            return None
        since, left = self._now() - self._updated, self.step.left
        if left is None:
            done, took = self.step.part - self._first_part, self._updated - self._began
            if done < KNOWN_PART or took < KNOWN_SECONDS:
                return None
            left = took * (1 - self.step.part) / done
        return left - since if left > since else None

    @property
    def line(self) -> str:
        """`checks: 12 of 31, native code: far end (0:45, about 70 s left)`."""
        if self.step is None:
            return ""
        details = ", ".join(filter(None, [counted(self.step), self.step.what]))
        times = clock_face(self.elapsed) + ("" if self.left is None else f", {about(self.left)}")
        return f"{self.step.task}{': ' if details else ''}{details} ({times})"


def counted(step: Step) -> str:
    """`12 of 31`, `1.2 GB of 4.0 GB`, `3 evaluations`; empty where nothing is counted."""
    if step.unit == BYTES:
        return size(step.done) if step.total is None else f"{size(step.done)} of {size(step.total)}"
    if step.total is None:
        return count(step.done, step.unit.removesuffix("s")) if step.unit else ""
    return f"{step.done:,} of {step.total:,} {step.unit}".rstrip()


def clock_face(seconds: float) -> str:
    """0:45, 12:05, 3:20:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def about(left: float) -> str:
    return f"about {duration(left)} left"


@contextlib.contextmanager
def show_progress(quiet: bool = False, every: float | None = None, bar: bool = True) -> Iterator[Progress]:
    """Yields a function that gets every `Step`. Without a terminal, it prints a line `every` so many seconds.

    `bar`: show one on a terminal.
    """
    if quiet or (sys.stderr.isatty() and not bar):
        yield silent
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        with _lines(EVERY if every is None else every) as show:
            yield show


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column
    from rich.text import Text

    clock = Clock()

    class Times(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            left = "" if clock.left is None else f", {about(clock.left)}"
            return Text(f"{clock_face(clock.elapsed)}{left}", no_wrap=True)

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[counted]}", markup=False),
        TextColumn(
            "{task.fields[what]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        ),
        Times(),
    )
    # On this stream, whatever a library's own noise is turned away from meanwhile. Rows on stdout appear above it.
    console = Console(file=sys.stderr)
    with Bar(*columns, console=console, transient=True, expand=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=None, counted="", what="")

        def show(step: Step) -> None:
            clock.update(step)
            known = step.total is not None or step.share is not None
            bar.update(
                task,
                description=step.task,
                completed=step.part,
                total=1.0 if known else None,
                counted=counted(step),
                what=step.what,
            )

        yield show


@contextlib.contextmanager
def _lines(every: float) -> Iterator[Progress]:
    """From a thread of their own, so that a step of minutes is not silent."""
    clock, over, stream = Clock(), threading.Event(), sys.stderr

    def watch() -> None:
        while not over.wait(every):
            if line := clock.line:
                click.echo(line, file=stream)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield clock.update
    finally:
        over.set()
        thread.join()
