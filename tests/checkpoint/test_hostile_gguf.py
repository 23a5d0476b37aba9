# SPDX-License-Identifier: Apache-2.0
"""Property tests over damaged GGUF files: `inspect` explains or refuses each, a re-bake gives a file that opens or
leaves what was there. Never a bug, a second line, or memory that the file does not have.

`LRCONVERT_MUTATIONS=100000 python -m pytest -m slow tests/checkpoint/test_hostile_gguf.py` tries as many.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_damage import Base, Damage, changed, changes, damaged, damages, make_base
from support.gguf_files import command
from support.hostile import answer

from lrconvert.checkpoint import open_model

QUICK = 5400
MANY = int(os.environ.get("LRCONVERT_MUTATIONS", "100000"))
MEMORY = 24 * 2**20  # what a command may take for a file of 50 kB: read buffers of a MiB, Python's own objects

BASES = ("baked", "qwen2", "split", "static")


@pytest.fixture(scope="module")
def bases() -> Iterator[Callable[[str], Base]]:
    """A file of ours, one of another architecture in Q8_0, a part of a split one, one with a static set; in memory
    where the system has a place for that."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield cache(lambda name: make_base(name, Path(folder) / name))


# --- what has to hold ------------------------------------------------------------------------------------


def check(base: Base) -> tuple[int, int]:
    """Exit codes of `inspect` and of a re-bake over an artifact that is there."""
    looked, _ = answer("inspect", base.path)
    baked, said = answer(*command(base.path, base.recipe, base.output, "--force"))
    now = {path.name: path.read_bytes() for path in base.output.parent.iterdir()}
    try:
        if baked:
            assert now == base.before, said
        else:
            assert looked == 0 and set(now) == set(base.before)
            model = open_model(base.output)  # strictly: its rope is whole
            for tensor in model.roles.values():
                assert model.checkpoint.read(tensor.name).shape == tensor.shape
    finally:
        base.restore()
    return looked, baked


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library is looked for; what reads a manifest is made once."""
    monkeypatch.setattr("lrconvert.runtimes.llama_library.find_library", lambda path: None)
    monkeypatch.setattr("pydantic.TypeAdapter", cache(pydantic.TypeAdapter))


Way = tuple[Callable[[Base], st.SearchStrategy[list[Damage]]], Callable[[Base, list[Damage]], None]]
WAYS: dict[str, Way] = {"bytes": (damages, damaged), "contents": (changes, changed)}
SHARE = {"bytes": 4, "contents": 2}  # of six files


def attack(base: Base, way: Way, count: int, within: Callable[[], Any] = contextlib.nullcontext) -> None:
    """`count` files, always the same; some have to get through, or nothing was tested behind the reader."""
    codes: dict[tuple[int, int], int] = {}
    strategy, write = way

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(injuries=strategy(base))
    def attempt(injuries: list[Damage]) -> None:
        write(base, injuries)
        with within():
            found = check(base)
        codes[found] = codes.get(found, 0) + 1

    try:
        attempt()
    finally:
        base.path.write_bytes(base.data)
        base.restore()
    assert sum(codes.values()) >= count
    assert min(codes.get((0, 0), 0), codes.get((3, 3), 0)) > count // 50, codes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BASES)
def test_a_damaged_file_is_refused_or_serves(bases: Callable[[str], Base], name: str, way: str, quick: None) -> None:
    """Thousands of files: one line and exit code 3 or 4, or an artifact that opens; what was there is there, byte for
    byte."""
    attack(bases(name), WAYS[way], QUICK * SHARE[way] // 6 // len(BASES))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BASES)
def test_a_hundred_thousand_damaged_files_are_refused_or_serve(
    bases: Callable[[str], Base], name: str, way: str, quick: None
) -> None:
    """The same, as often as LRCONVERT_MUTATIONS says."""
    attack(bases(name), WAYS[way], MANY * SHARE[way] // 6 // len(BASES))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails where Python and NumPy hold more than `MEMORY` at once."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    yield
    assert tracemalloc.get_traced_memory()[1] - before < MEMORY


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["baked", "split"])
def test_a_damaged_file_takes_no_more_memory_than_a_good_one(
    bases: Callable[[str], Base], name: str, quick: None, traced: None
) -> None:
    """Counts, lengths and shapes of any size are believed only as far as the file goes."""
    attack(bases(name), WAYS["bytes"], 80, bounded)


def test_a_length_that_a_sparse_file_does_hold_is_refused_before_it_is_read(
    bases: Callable[[str], Base], quick: None, traced: None
) -> None:
    """Four GiB of zeros cost nothing on a disk: a string, an array and a header of that size do in memory."""
    base = bases("baked")
    key, length = struct.pack("<Q", 1) + b"a", struct.pack("<Q", 2**32 - 4096)
    for value in (struct.pack("<I", 8) + length, struct.pack("<II", 9, 0) + length):
        base.path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + key + value)
        os.truncate(base.path, 2**32)
        with bounded():
            assert check(base) == (3, 3)
    base.path.write_bytes(base.data)
