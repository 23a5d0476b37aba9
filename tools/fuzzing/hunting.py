# SPDX-License-Identifier: Apache-2.0
"""Inputs by number, tried in processes that are forked from a warm one, and what they found.

    found = hunt(READERS["manifest"], world, range(1000), seed=0)

A finding is any of: an error that is not the project's own; exit code 6 for a file; a second line of errors; a warning
of a library; what `limits` forbids; a process that died; files that a refusal left behind; an accepted value that is
none (NaN, an infinity, a lone surrogate), in what is returned, printed or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.formats import FORMATS
from fuzzing.limits import MEMORY, SECONDS, Trespass, Watch, at_most, bound_memory
from lrconvert import cli
from lrconvert.errors import LrconvertError

Call = Sequence[str] | Callable[[], Any]  # arguments of the command line, or a function; both in the world's folder
RECYCLED = 1000  # inputs of one process
GRACE = 3  # times SECONDS after which a process that says nothing is ended
REFUSED = (2, 3, 4, 5)


@dataclass(frozen=True)
class Target:
    """A file to damage, of a kind of `FORMATS`, and who reads it: one of `calls` for each input."""

    file: str
    kind: str
    calls: Sequence[Call]


@dataclass(frozen=True)
class Reader:
    """`outputs`: what its calls write. `hidden`: errors that only the machine without a network makes."""

    name: str
    targets: Sequence[Target]
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """`where`: the innermost line of lrconvert, or what was seen: what makes two findings the same."""

    reader: str
    number: int
    file: str
    call: str
    kind: str
    where: str
    detail: str = field(compare=False, default="")

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.where


@dataclass
class Hunt:
    """What a reader answered: how often, by outcome, and what should not be."""

    reader: str
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        return self.outcomes.total()


# --- one input -------------------------------------------------------------------------------------------


class World:
    """A copy of the healthy files, in which a reader works; `mend` makes it what it was."""

    def __init__(self, healthy: Path, folder: Path) -> None:
        shutil.copytree(healthy, folder)
        self.folder = folder
        self._contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self._stamps = {path: self._stamp(path) for path in self._contents}
        self._folders = {path for path in folder.rglob("*") if path.is_dir()}

    @staticmethod
    def _stamp(path: Path) -> tuple[int, int, int]:
        status = path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ino

    def healthy(self, file: str) -> bytes:
        return self._contents[self.folder / file]

    def added(self) -> list[Path]:
        """What was not here."""
        known = self._contents.keys() | self._folders
        return [path for path in self.folder.rglob("*") if path not in known]

    def mend(self) -> None:
        for path in self.added():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path, data in self._contents.items():
            try:
                same = self._stamp(path) == self._stamps[path]
            except OSError:
                same = False
            if not same:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.write_bytes(data)
                self._stamps[path] = self._stamp(path)


def input_of(reader: Reader, seed: int, number: int) -> tuple[Target, random.Random, Call]:
    """What input `number` damages, how, and who reads it."""
    rng = random.Random(f"{seed}/{reader.name}/{number}")
    target = rng.choice(reader.targets)
    return target, rng, rng.choice(target.calls)


def attempt(reader: Reader, world: World, watch: Watch, seed: int, number: int, seconds: float) -> str | Finding:
    """The outcome of one input: `accepted`, `exit 3`, or a finding."""
    target, rng, call = input_of(reader, seed, number)
    (world.folder / target.file).write_bytes(FORMATS[target.kind](rng, world.healthy(target.file)))

    def found(kind: str, where: str, detail: str = "") -> Finding:
        return Finding(reader.name, number, target.file, _named(call), kind, where, detail)

    try:
        with at_most(seconds), watch.watching(), warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = _command(call) if not callable(call) else _function(call)
            if outcome == "accepted":
                _check_written(world, reader.outputs, target.file)
            else:
                _check_left(world)
    except Trespass as error:
        return found(
            error.kind, str(error) if error.kind not in ("hang", "memory") else _innermost(error), _trace(error)
        )
    except Wrong as error:
        return found(error.kind, error.where, error.detail)
    except MemoryError as error:
        return found("memory", _innermost(error), _trace(error))
    except BaseException as error:
        return found(type(error).__name__, _innermost(error), _trace(error))
    return outcome


class Wrong(Exception):
    def __init__(self, kind: str, where: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {where}")
        self.kind, self.where, self.detail = kind, where, detail


def _named(call: Call) -> str:
    return getattr(call, "__name__", "function") if callable(call) else " ".join(call)


def _function(call: Callable[[], Any]) -> str:
    try:
        value = call()
    except LrconvertError as error:
        if not str(error).strip() or error.exit_code not in REFUSED:
            raise
        return f"exit {error.exit_code}"
    if (what := unsound(value)) is not None:
        raise Wrong("accepted", what)
    return "accepted"


def _command(arguments: Sequence[str]) -> str:
    out, said, caught = io.StringIO(), io.StringIO(), []
    fail = cli._fail

    def remember(message: str, code: int, debug: bool) -> int:
        caught.append(sys.exc_info()[1])
        return fail(message, code, debug)

    cli._fail = remember
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = cli.run(list(arguments))
    finally:
        cli._fail = fail
    if code not in (0, *REFUSED):
        if code == 6 and "Hub" in said.getvalue():  # a damaged name may be one of the Hub's
            return "exit 6"
        raise caught[-1] if caught and caught[-1] is not None else Wrong("exit code", str(code), said.getvalue())
    lines = said.getvalue().splitlines()
    if code in (2, 3, 4) and not lines[-1].startswith("lrconvert: "):
        raise Wrong("errors", f"the last line is not one of ours: {lines[-1:]}", said.getvalue())
    for text in (out.getvalue(), said.getvalue()):
        _encoded(text)
    if code == 0 and "--json" in arguments and (what := unsound(_strict(out.getvalue()))) is not None:
        raise Wrong("printed", what)
    return "accepted" if code == 0 else f"exit {code}"


def _encoded(text: str) -> None:
    """What is shown can be shown: no lone surrogates, nothing that moves a terminal's cursor."""
    text.encode()
    if odd := {letter for letter in text if ord(letter) < 32 and letter not in "\n\t"}:
        raise Wrong("printed", f"control characters {sorted(odd)!r}", text[:500])


def _check_left(world: World) -> None:
    """A refusal leaves nothing, hidden or not."""
    if left := [path.relative_to(world.folder).as_posix() for path in world.added() if not _is_lock(path)]:
        raise Wrong("left behind", f"{sorted(left)[:3]}")


def _is_lock(path: Path) -> bool:
    return path.name.endswith(".lock") or "__pycache__" in path.parts


def _check_written(world: World, outputs: Sequence[str], damaged: str) -> None:
    """JSON that is written is JSON, where it is not a copy of what was given."""
    given = (world.folder / damaged).read_bytes() if (world.folder / damaged).is_file() else b""
    for output in outputs:
        place = world.folder / output
        for path in place.rglob("*.json") if place.is_dir() else [place] if place.suffix == ".json" else []:
            if (data := path.read_bytes()) != given and (what := unsound(_strict(data.decode()))) is not None:
                raise Wrong("written", f"{path.name}: {what}")


def _strict(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise Wrong("written", f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def unsound(value: Any, depth: int = 0) -> str | None:
    """What in a value is none, in words; None where all is sound."""
    if isinstance(value, bool | int | None) or depth > 40:
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else repr(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "a lone surrogate"
        return None
    if isinstance(value, np.ndarray):
        return None if value.dtype.kind not in "fc" or bool(np.isfinite(value).all()) else "an array that is not finite"
    if dataclasses.is_dataclass(value):
        return unsound({item.name: getattr(value, item.name) for item in dataclasses.fields(value)}, depth + 1)
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return next((what for item in value if (what := unsound(item, depth + 1)) is not None), None)
    return None


def _innermost(error: BaseException) -> str:
    """The last frame of lrconvert, without its line's number: that moves."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/lrconvert/" in frame.filename] or frames[-1:]
    if not own:
        return type(error).__name__
    inside = Path(own[-1].filename).as_posix().rpartition("/lrconvert/")[2]
    return f"{type(error).__name__} in {inside}: {own[-1].name}"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]


def warm(reader: Reader, healthy: Path) -> list[str]:
    """Make every call on healthy files, so that all modules are there; the calls that did not accept them."""
    folder = healthy.with_name(f"{healthy.name}-warm")
    world, refused = World(healthy, folder / "work"), []
    with contextlib.chdir(world.folder):
        for call in {_named(call): call for target in reader.targets for call in target.calls}.values():
            try:
                outcome = _function(call) if callable(call) else _command(call)
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            if outcome != "accepted":
                refused.append(f"{reader.name}: {_named(call)}: {outcome}")
            world.mend()
    shutil.rmtree(folder)
    return refused


# --- many ------------------------------------------------------------------------------------------------


def hunt(
    reader: Reader,
    healthy: Path,
    numbers: range,
    *,
    seed: int = 0,
    memory: int = MEMORY,
    seconds: float = SECONDS,
) -> Hunt:
    """Try inputs in processes that are forked from this one, one after the other."""
    found, started, context = Hunt(reader.name), time.perf_counter(), multiprocessing.get_context("fork")
    at = numbers.start
    while at < numbers.stop:
        stop = min(at + RECYCLED, numbers.stop)
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, reader, healthy, range(at, stop), seed, memory, seconds)
        process = context.Process(target=_work, args=arguments)
        process.start()
        theirs.close()
        for number, outcome in _heard(ours, GRACE * seconds):
            at = number + 1
            if isinstance(outcome, Finding):
                found.findings.append(outcome)
                outcome = "finding"
            found.outcomes[outcome] += 1
        process.join(0.2)
        silent = process.is_alive()
        process.kill()
        process.join()
        if at < stop:  # it died or never answered: whoever was about to be read did that
            target, _, call = input_of(reader, seed, at)
            kind, where = ("hang", "native code") if silent else ("died", f"exit status {process.exitcode}")
            found.findings.append(
                Finding(reader.name, at, target.file, _named(call), kind, f"{where} in {target.file}")
            )
            found.outcomes["finding"] += 1
            at += 1
    found.seconds = time.perf_counter() - started
    return found


def _heard(pipe: Any, patience: float) -> Iterator[tuple[int, str | Finding]]:
    """What a process says until it ends or is silent for too long."""
    with contextlib.suppress(EOFError):
        while pipe.poll(patience):
            yield from pipe.recv()


def _work(pipe: Any, reader: Reader, healthy: Path, numbers: range, seed: int, memory: int, seconds: float) -> None:
    folder = healthy.with_name(f"{healthy.name}-{os.getpid()}")
    try:
        sys.dont_write_bytecode = True
        world = World(healthy, folder / "work")
        os.chdir(world.folder)
        watch = Watch(world.folder)
        bound_memory(memory)
        for number in numbers:
            pipe.send([(number, attempt(reader, world, watch, seed, number, seconds))])
            world.mend()
    except BaseException:  # a mistake of the hunt itself
        traceback.print_exc()
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
        pipe.close()
        os._exit(0)  # nothing that was registered for the end of the process that was forked
