# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet, each with its exit code.

    LrconvertError            1   our own bug, when nothing below fits
    ├── UsageError            2   the request is off: an option, a window, an existing output
    ├── InputError            3   the input is off: a file, a key, a tensor
    ├── UnsupportedError      4   the input is fine, the target can't express it
    ├── ParityError           5   the artifact does not compute what its recipe says
    └── EnvironmentFailure    6   the machine: a missing extra, no network, too little disk or memory

A message says what was found, what is needed, where, and what to do. Several problems in one input are
reported together (`InputError.collect`).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import Any


def first_problem(error: Any, whole: str = "") -> str:
    """Where and what, of a pydantic `ValidationError`; `whole` is what no key is named for."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or whole
    return f"{where}: {first['msg']}" if where else first["msg"]


class LrconvertError(Exception):
    """Base of everything lrconvert raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


class UsageError(LrconvertError):
    """The request can't be carried out as asked."""

    exit_code = 2


class InputError(LrconvertError):
    """A file the user gave is not what it has to be."""

    exit_code = 3

    @classmethod
    def collect(cls, where: object, problems: Iterable[str]) -> InputError:
        """One error for all `problems` found in `where`."""
        return cls(f"{where}: " + "; ".join(problems))


class UnsupportedError(LrconvertError):
    """The target can't express what the input asks for."""

    exit_code = 4


class ParityError(LrconvertError):
    """The artifact and the reference disagree."""

    exit_code = 5


class EnvironmentFailure(LrconvertError):
    """The machine lacks something: an extra, the network, room on the disk or in memory."""

    exit_code = 6


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or say which extra brings it (exit code 6)."""
    try:
        return import_module(module)
    except ImportError as error:
        raise EnvironmentFailure(
            f"{purpose} needs {module.partition('.')[0]}, which can't be imported ({error})",
            remedy=f"pip install 'lrconvert[{extra}]'",
        ) from error
