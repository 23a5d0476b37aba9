# SPDX-License-Identifier: Apache-2.0
"""Output of the commands: data on stdout, everything else on stderr.

Names and texts of files may come from strangers, so nothing is shown that moves a terminal's cursor, turns the
direction of its text, or can't be encoded (`visible`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from lrconvert.machine import size as size

if TYPE_CHECKING:
    from rich.console import Console

    from lrconvert.engines.engine import Verdict


# Control characters but tab and end of line, marks of direction, lone surrogates.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text as it is shown: with escapes, those of JSON, for what a terminal would act on."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@cache
def console() -> Console:
    """For tables, on stdout; wide enough not to cut them where stdout is no terminal."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=160)


def data(value: Any) -> None:
    """JSON on stdout."""
    click.echo(visible(json.dumps(value, indent=2, ensure_ascii=False)))


def say(text: str = "") -> None:
    """A line of data on stdout."""
    click.echo(visible(text))


def hint(text: str) -> None:
    """What to do next: stderr."""
    click.echo(visible(text), err=True)


def warn(text: str) -> None:
    click.echo(visible(f"warning: {text}"), err=True)


def table(columns: Iterable[str], rows: Iterable[Sequence[str]], *, title: str = "", numbers: bool = True) -> None:
    """A table on stdout; `numbers` end at the right."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(visible(title)) if title else None)
    for name in columns:
        shown.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        shown.add_row(*(Text(visible(cell)) for cell in row))
    console().print(shown)


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
