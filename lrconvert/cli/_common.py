# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click

from lrconvert.errors import EnvironmentFailure
from lrconvert.precision import LONG, short_name

_SUFFIX = {"": 1, "k": 1024, "m": 1024**2}


class Tokens(click.ParamType):
    """A number of tokens: 65536, 64k, 2048k or 2m (1k is 1024)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        matched = re.fullmatch(r"(\d{1,10})([km]?)", str(value).strip().lower())
        if not matched or int(matched.group(1)) == 0:
            self.fail(f"{value!r} is not a number of tokens; examples: 65536, 64k, 2m", param, ctx)
        return int(matched.group(1)) * _SUFFIX[matched.group(2)]


class Precision(click.Choice):
    """A float type by its short name or its long one, f32 or float32; or one of `more`."""

    def __init__(self, *names: str) -> None:
        super().__init__(names or tuple(LONG))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(short_name(value), param, ctx)


class Registered(click.Choice):
    """One of the names in a registry, looked up when needed, since the registry may grow."""

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names
        super().__init__(())

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(self._names())

    @choices.setter
    def choices(self, value: object) -> None:  # type: ignore[override]
        """Ignored: click sets its argument, but the names are the registry's."""


class Number(click.FloatRange):
    """A finite number above `least`, and at most `most` where that is given."""

    name = "number"

    def __init__(self, least: float, most: float | None = None) -> None:
        super().__init__(least, most, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number

    def _describe_range(self) -> str:
        """For the help and for errors of click, which would show every digit of a float."""
        return f"x>{self.min:g}" if self.max is None else f"{self.min:g}<x<={self.max:g}"


class OutputName(click.Path):
    """Where results are written, known before anything is computed: a name in a folder that is there or can be made,
    and `suffixes` that it gets there, none of which is a folder's."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path.name in ("", ".."):
            self.fail(f"{str(value)!r} does not name a file", param, ctx)
        for suffix in self.suffixes:
            if (file := path.with_name(path.name + suffix)).is_dir():
                self.fail(f"{file} is a folder", param, ctx)
        there = next(folder for folder in path.absolute().parents if folder.exists())
        if not there.is_dir():
            self.fail(f"{there} is not a folder", param, ctx)
        if not os.access(there, os.W_OK | os.X_OK):
            raise EnvironmentFailure(f"{there}: not writable")
        return path


TOKENS = Tokens()
SEED = click.IntRange(0)  # what numpy takes

model_argument = click.argument("model", metavar="MODEL")
revision_option = click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id.")
force_option = click.option("--force", is_flag=True, help="Replace an output that lrconvert wrote.")
_text = partial(
    click.option,
    "--text",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="Long text: a file, a folder of .txt, token ids (.npy), or rows of a data set, "
    "'hf:NAME[@REVISION][:[CONFIG:]SPLIT][?column=COLUMN][#ROWS]'. May be repeated.",
)
text_option = _text(required=True)
optional_text_option = _text()
trust_code_option = click.option(
    "--trust-code", is_flag=True, help="Run code that the folder brings even where it is not lrconvert's own."
)
