# SPDX-License-Identifier: Apache-2.0
"""Small files are the old one or the new one, whole: after an error, for readers, and among several who write."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from lrconvert.writing import replace_file, temporary_of


def test_the_new_content_is_there_and_nothing_else(tmp_path: Path) -> None:
    """Also where a kill left a longer file in the temporary one's place."""
    path = tmp_path / "a.json"
    path.write_text("old")
    temporary_of(path).write_text("x" * 1000)
    replace_file(path, "néw")
    assert path.read_text(encoding="utf-8") == "néw" and list(tmp_path.iterdir()) == [path]
    replace_file(path, b"\0")
    assert path.read_bytes() == b"\0"


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_several_who_write_at_once_never_mix(tmp_path: Path) -> None:
    """Threads have locks of their own, as processes have: what is there is always one of the contents."""
    path, contents = tmp_path / "a.json", [str(digit) * 50_000 for digit in range(4)]
    replace_file(path, contents[0])
    seen, over = set[str](), threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.add(path.read_text())

    def write(content: str) -> None:
        for _ in range(25):
            replace_file(path, content)

    watching = threading.Thread(target=watch)
    writing = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in (watching, *writing):
        thread.start()
    for thread in writing:
        thread.join()
    over.set()
    watching.join()
    assert seen <= set(contents) and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such pipes")
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    replace_file(pipe, "report")
    reader.join()
    assert read == ["report"] and pipe.is_fifo()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_what_stands_where_it_writes_first_is_not_followed(kind: str, tmp_path: Path) -> None:
    """A folder of strangers may hold a link of that name to any file of this machine, or a pipe that nobody reads."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.write_text("mine")
    folder.mkdir()
    planted = temporary_of(folder / "file.json")
    if kind == "link":
        planted.symlink_to(outside)
    elif kind == "hard link":
        planted.hardlink_to(outside)
    else:
        os.mkfifo(planted)
    replace_file(folder / "file.json", "new")
    assert outside.read_text() == "mine"
    assert (folder / "file.json").read_text() == "new" and not planted.exists()
