# SPDX-License-Identifier: Apache-2.0
"""Output of the commands: data on stdout, everything else on stderr, progress bars only on a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from lrconvert.engines.table import Verdict


@cache
def console() -> Console:
    """For tables, on stdout; wide enough not to cut them where stdout is no terminal."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=160)


def data(value: Any) -> None:
    """JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def say(text: str = "") -> None:
    """A line of data on stdout."""
    click.echo(text)


def hint(text: str) -> None:
    """What to do next, or progress: stderr."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)


def count(number: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def engines(verdicts: Sequence[Verdict], *, detailed: bool) -> None:
    """One line per engine: its verdict and the first reason; everything with `detailed`."""
    width = max(len(verdict.engine) for verdict in verdicts)
    for verdict in verdicts:
        say(
            f"  {verdict}" if detailed else f"  {verdict.engine:<{width}}  {verdict.outcome:<8}{verdict.brief}".rstrip()
        )
    if not detailed:
        hint("details: --verbose and docs/engines.md")


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


EVERY = 15.0  # seconds between lines about a long step, where there is no terminal


@contextlib.contextmanager
def byte_progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yields `report(what, done, total)` over bytes: a bar on a terminal, a line now and then elsewhere."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        line = _now_and_then()
        yield lambda what, done, total: line(f"{size(done)} of {size(total)}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


@contextlib.contextmanager
def spinner(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Yields `say(what)`: the current step and its time, on a terminal; a line now and then elsewhere."""
    if quiet:
        yield lambda what: None
        return
    if not sys.stderr.isatty():
        yield _now_and_then()
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # On this stream, whatever a library's own noise is turned away from meanwhile. Rows on stdout appear above it.
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=what)


def _now_and_then() -> Callable[[str], None]:
    """Prints the current step at most every `EVERY` seconds, with the time since the start."""
    started = last = time.monotonic()

    def line(what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            hint(f"{what} ({now - started:.0f} s)")

    return line
