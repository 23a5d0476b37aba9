# SPDX-License-Identifier: Apache-2.0
"""tools/fuzz: a few hundred inputs over every reader find nothing, and what is planted is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing.hunting import Hunt, Reader, Target, hunt, input_of, unsound, warm
from fuzzing.limits import Trespass, Watch
from fuzzing.readers import READERS, make_world

from lrconvert.errors import InputError

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and limits of memory")
EACH = 15  # inputs of a reader; tools/fuzz tries as many as it is asked to


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The healthy files."""
    yield make_world(tmp_path_factory.mktemp("fuzz") / "world")


@linux_only
def test_every_reader_takes_healthy_files_and_no_damaged_one_gets_the_better_of_it(world: Path) -> None:
    """The same inputs every time."""
    assert [line for reader in READERS.values() for line in warm(reader, world)] == []
    for name, reader in READERS.items():
        found = hunt(reader, world, range(EACH))
        assert found.inputs == EACH and found.findings == [], name
        assert len(found.outcomes) > 1 or name == "card", f"{name}: all inputs were answered alike"


# --- planted ---------------------------------------------------------------------------------------------


def value() -> Any:
    """The healthy value is 1; one that is damaged is mostly none."""
    try:
        return json.loads(Path("a.json").read_text())["a"]
    except Exception as error:
        raise InputError(f"a.json: {error}") from error


def a_bug() -> Any:
    return value() + 1  # what is no number


def a_hang() -> Any:
    while not isinstance(value(), int):
        pass


def a_native_hang() -> Any:
    if not isinstance(value(), int):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(60)


def a_lot_of_memory() -> Any:
    return None if isinstance(value(), int) else len(bytearray(2**30))


def a_crash() -> Any:
    if not isinstance(value(), int):
        os._exit(3)


def a_write_outside() -> Any:
    if not isinstance(value(), int):
        Path("../outside.txt").write_text("x")


def a_read_outside() -> Any:
    if not isinstance(value(), int):
        Path("/etc/hostname").read_text()


def a_program() -> Any:
    if not isinstance(value(), int):
        subprocess.run(["true"], check=True)


def no_number() -> Any:
    return {"factors": [float("nan")]} if isinstance(value(), float) else 1


def something_left() -> Any:
    if not isinstance(value(), int):
        Path(".new.tmp").write_text("x")
        raise InputError("refused")


PLANTED: dict[Callable[[], Any], str] = {
    a_bug: "TypeError",
    a_hang: "hang",
    a_native_hang: "hang",
    a_lot_of_memory: "memory",
    a_crash: "died",
    a_write_outside: "write outside",
    a_read_outside: "read outside",
    a_program: "program",
    no_number: "accepted",
    something_left: "left behind",
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "world"
    folder.mkdir()
    (folder / "a.json").write_text('{"a": 1}')
    return folder


def planted(call: Callable[[], Any], small: Path) -> tuple[Reader, Hunt]:
    reader = Reader("planted", [Target("a.json", "json", (call,))])
    numbers = range(8) if call is not no_number else range(60)
    return reader, hunt(reader, small, numbers, memory=128 * 2**20, seconds=0.2)


@linux_only
@pytest.mark.parametrize("call", PLANTED, ids=lambda call: call.__name__)
def test_what_is_planted_is_found_and_the_others_go_on(call: Callable[[], Any], small: Path) -> None:
    reader, found = planted(call, small)
    assert found.inputs == (8 if call is not no_number else 60)
    assert {finding.kind for finding in found.findings} == {PLANTED[call]}
    assert 0 < len(found.findings) < found.inputs or call is not a_bug
    assert planted(call, small)[1].findings == found.findings, "not the same the second time"
    assert input_of(reader, 0, found.findings[0].number)[2] is call


def test_nothing_is_watched_before_and_after(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    Path("/etc/passwd").read_bytes()
    with pytest.raises(Trespass, match="read outside"), watch.watching():
        Path("/etc/passwd").read_bytes()
    Path("/etc/passwd").read_bytes()


@pytest.mark.parametrize("bad", [float("inf"), "\ud800", {"a": [{"b": float("nan")}]}, {"\ud800": 1}])
def test_what_is_no_value(bad: Any) -> None:
    assert unsound(bad) is not None and unsound({"a": [1, "b", None, 0.5]}) is None
