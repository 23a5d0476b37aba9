# SPDX-License-Identifier: Apache-2.0
"""The journal of a search: JSON lines, on the disk before the next evaluation begins.

The first line says which search it is. Every other line is one evaluation, or the machine on which a run of the search
began (`run`). A search that finds its journal asks the same questions again and takes the answers from it: it goes on
where it was killed. A last line that the kill left incomplete is dropped.

Each line ends in a digest of itself and of the digest before it (`chain`), so a line that was changed, taken out or put
in is found. It guards against accidents and edits by hand, not against who makes the digests anew. Journals of earlier
versions have none; they are read, and a note says so.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from functools import cache
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, MinLen

from lrconvert.errors import EnvironmentFailure, InputError, UsageError, first_problem
from lrconvert.searching.protocol import Answer, Question
from lrconvert.searching.space import Candidate

VERSION = 1
_CHAIN = re.compile(rb', "chain": "([0-9a-f]{32})"}\n')
_START = "0" * 32  # before the first line


@dataclass(frozen=True)
class Record:
    """One evaluation: of which tier, what was asked and answered."""

    tier: int  # the length that the set is searched for
    question: Question
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        """Infinite losses are null: JSON knows no infinity."""
        question, answer = self.question, self.answer
        values: dict[str, Any] = {
            "tier": self.tier,
            "made": question.made,
            "loss": answer.loss if math.isfinite(answer.loss) else None,
            "losses": answer.losses,
            "candidate": question.candidate.to_json(),
            "cost": question.cost,
        }
        if question.gradient:
            values["gradient"] = answer.gradient
        if answer.error is not None:
            values["error"] = answer.error
        return {**values, "seconds": round(answer.seconds, 3)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        """Raises `ValueError` for what `to_json` never makes."""
        from pydantic import ValidationError

        try:
            read = _line().validate_json(json.dumps(values))
        except ValidationError as error:
            raise ValueError(first_problem(error)) from error
        if read.loss is None and read.error is None:
            raise ValueError("neither a loss nor an error")
        loss = math.inf if read.loss is None else float(read.loss)
        gradient = None if read.gradient is None else tuple(read.gradient)
        answer = Answer(loss, read.losses, gradient, read.error, read.seconds)
        question = Question(Candidate.from_json(values["candidate"]), read.made, "gradient" in values)
        return cls(read.tier, question, answer)


# A journal may have been edited: nothing is coerced, and no number is anything else.
_READ: Any = {"strict": True, "allow_inf_nan": False}
_Factor = Annotated[float, Gt(0)]


@dataclass
class _Candidate:
    """What is read of a candidate."""

    __pydantic_config__: ClassVar = _READ

    factors: Annotated[list[_Factor], MinLen(1)]
    start_tokens: Annotated[int, Ge(0)]
    attention_factor: _Factor
    critical: int | None = None


@dataclass
class _Line:
    """What is read of an evaluation's line."""

    __pydantic_config__: ClassVar = _READ

    tier: Annotated[int, Ge(1)]
    made: str
    loss: Annotated[float, Ge(0)] | None
    losses: dict[str, float]
    candidate: _Candidate
    seconds: float
    gradient: list[float] | None = None
    error: str | None = None


@cache
def _line() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(_Line)


@dataclass
class Contents:
    """What a journal's file holds: `good` bytes of whole lines; `torn` says what was wrong with the last one,
    `chain` is the digest that the next line goes on from."""

    head: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    good: int = 0
    torn: str | None = None
    chain: str | None = _START  # of the last good line; None in a journal without digests


def read_journal(path: Path) -> Contents:
    """Everything up to the last whole line.

    Raises `InputError` for a file that isn't a journal and for damage before the last line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error
    found = Contents()
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
            values = json.loads(line, parse_constant=_no_number)
            json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # nothing that can't be written again
            if number == 1:
                _check_head(path, values)
                found.head = values
            found.chain = _checked_chain(path, number, line, found.chain)
            if "run" in values:
                found.runs.append(values["run"])
            elif number > 1:
                found.records.append(Record.from_json(values))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            if number == 1 and (line.endswith(b"\n") or len(lines) > 1 or not _head_start(line)):
                raise InputError(f"{path}: not the journal of a search") from error
            if number < len(lines):
                raise InputError(f"{path}: line {number} is damaged ({error})") from error
            found.torn = f"{path}: the last line ({len(line)} bytes) is incomplete and is dropped"
            break
        found.good += len(line)
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _checked_chain(path: Path, number: int, line: bytes, before: str | None) -> str | None:
    """The digest of a whole line; None in a journal whose first line has none. `InputError` where it does not fit."""
    found = _CHAIN.search(line)
    if found is None and (number == 1 or before is None):
        return None
    if found is None or before is None or found[1].decode() != (chain := _chained(before, line[: found.start()])):
        raise InputError(
            f"{path}: line {number} does not fit the digest of its line: it, or the one before it, was changed",
            remedy="Restore the file, or name another --journal to search again",
        )
    return chain


def _chained(before: str, body: bytes) -> str:
    """The digest of a line, given the one before it and its text up to its own."""
    return hashlib.sha256(before.encode() + body).hexdigest()[:32]


def _check_head(path: Path, values: Any) -> None:
    if values["journal"] != "lrconvert search" or not isinstance(values["identity"], dict):
        raise ValueError
    if values["version"] != VERSION:
        raise InputError(f"{path}: a journal of version {values['version']}; this lrconvert reads version {VERSION}")


def _head_start(line: bytes) -> bool:
    """Whether a single torn line can be the beginning of a head."""
    start = b'{"journal": "lrconvert search"'
    return line.startswith(start) or start.startswith(line)


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Where two identities differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = [differences(before.get(k), now.get(k), f"{key}.{k}" if key else k) for k in {**before, **now}]
        return [line for lines in inner for line in lines]
    return [] if before == now else [f"{key} was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


class Journal:
    """An open journal: what it holds already (`found`), and `append`. One process writes it at a time."""

    def __init__(self, path: Path, found: Contents, file: FileIO) -> None:
        self.path, self.found = path, found
        self._file = file

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> Journal:
        """Open or begin the journal of a search; `identity` is what makes two searches the same.

        A journal of another search that has no evaluations begins anew. Raises `InputError` (exit code 3) when it has
        some, with all that differs, and
        `UsageError` when another process writes it.
        """
        identity = json.loads(json.dumps(identity))  # as it comes back from a file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        except OSError as error:
            raise EnvironmentFailure(f"{path}: can't be written ({error.strerror or error})") from error
        try:
            _lock(file, path)
            found = read_journal(path)
            differ = differences(found.head["identity"], identity) if found.head else []
            if differ and not found.records:  # nothing that was computed would be lost
                found = Contents()
            elif differ:
                raise InputError(
                    f"{path} is the journal of another search: {'; '.join(differ)}",
                    remedy="Name another --journal, or remove this one to start again",
                )
            file.truncate(found.good)
            file.seek(found.good)
            journal = cls(path, found, file)
            if not found.head:
                found.chain = _START
                journal._write({"journal": "lrconvert search", "version": VERSION, "identity": identity})
        except BaseException:
            file.close()
            raise
        return journal

    def append(self, record: Record) -> None:
        """Write an evaluation; it is on the disk when this returns."""
        self._write(record.to_json())

    def begin(self, environment: dict[str, Any]) -> None:
        """Record the machine of the evaluations that follow, and when they began (seconds since 1970)."""
        self._write({"run": {**environment, "began": round(time.time(), 2)}})

    def _write(self, values: dict[str, Any]) -> None:
        """A line, whole and on the disk, or none: what of it was written is taken back."""
        line, chain = json.dumps(values, ensure_ascii=False, allow_nan=False).encode(), self.found.chain
        if chain is not None:
            chain = _chained(chain, line[:-1])
            line = line[:-1] + f', "chain": "{chain}"}}'.encode()
        start = self._file.tell()
        try:
            _write_all(self._file, line + b"\n")
            os.fsync(self._file.fileno())
            self.found.chain = chain
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
                self._file.seek(start)
            raise EnvironmentFailure(f"{self.path}: can't be written ({error.strerror or error})") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _write_all(file: FileIO, data: bytes) -> None:
    """A write without a buffer may take less than it was given; the rest says why."""
    while data:
        count = file.write(data)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = data[count:]


def digest(identity: dict[str, Any], records: list[Record]) -> str:
    """sha256 of what a journal says, without how long anything took: the same for a resumed search."""
    found = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for record in records:
        values = record.to_json()
        del values["seconds"]
        found.update(json.dumps(values, sort_keys=True).encode())
    return found.hexdigest()


def _lock(file: FileIO, path: Path) -> None:
    with contextlib.suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{path}: another process is writing this journal", remedy="Wait for it to end") from error


def journal_path(output: Path) -> Path:
    """Beside the recipe: RECIPE.journal.jsonl."""
    return output.with_name(f"{output.name.removesuffix('.json')}.journal.jsonl")
