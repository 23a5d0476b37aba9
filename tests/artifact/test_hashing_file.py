# SPDX-License-Identifier: Apache-2.0
"""A file that is hashed and brought to the disk while it is written."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from lrconvert.artifact import hashing_file
from lrconvert.artifact.hashing_file import SMALL_BYTES, SYNC_BYTES, HashingFile

PART = 2**20


def write(path: Path, count: int) -> HashingFile:
    """`count` parts that all differ."""
    with path.open("wb") as raw, HashingFile(raw) as file:
        for index in range(count):
            file.write(bytes([index % 251]) * PART)
        file.finish()
    return file


@pytest.mark.parametrize("count", [0, 1, SMALL_BYTES // PART, SMALL_BYTES // PART + 1, 40])
def test_the_digest_is_that_of_the_file(tmp_path: Path, count: int) -> None:
    """Below the size from which threads help, at it, and beyond it, where parts must be hashed in order."""
    file = write(tmp_path / "file", count)
    data = (tmp_path / "file").read_bytes()
    assert (file.size, file.sha256.hexdigest()) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_small_file_starts_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with (tmp_path / "file").open("wb") as raw, HashingFile(raw) as file:
        file.write(bytes(SMALL_BYTES))
        assert threading.active_count() == before
        file.write(b"more")
        assert threading.active_count() > before
        file.finish()
    assert threading.active_count() == before


def test_the_disk_is_asked_to_take_parts_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it works while the rest is computed, and not after that alone."""
    sizes: list[int] = []
    monkeypatch.setattr(hashing_file, "_to_disk", lambda handle: sizes.append(os.fstat(handle).st_size))
    write(tmp_path / "file", 2 * SYNC_BYTES // PART + 1)
    assert sizes
    assert sizes[0] >= SYNC_BYTES


def test_what_the_disk_refuses_later_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take bytes first and find out when it writes them that it is full."""

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hashing_file, "_to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", SYNC_BYTES // PART + 1)


def test_leaving_with_an_error_stops_the_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), (tmp_path / "file").open("wb") as raw, HashingFile(raw) as file:
        file.write(bytes(SMALL_BYTES + 1))
        raise KeyError
    assert threading.active_count() == before
