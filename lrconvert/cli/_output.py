# SPDX-License-Identifier: Apache-2.0
"""Output of the commands: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from lrconvert.machine import size as size

if TYPE_CHECKING:
    from rich.console import Console

    from lrconvert.engines.engine import Verdict


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
    """What to do next: stderr."""
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


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
