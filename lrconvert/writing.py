# SPDX-License-Identifier: Apache-2.0
"""Small files that are whole whenever somebody reads them, whatever happens to who writes them."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def temporary_of(path: Path) -> Path:
    """Where `replace_file` writes first. A kill leaves it there, as nobody's file; the next write takes it."""
    return path.with_name(f".{path.name}.tmp")


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file beside `path` and put it in its place, on the disk; what an error leaves of it is removed.

    Who writes the same file at the same time waits: the last one's content stays, whole. A pipe or a device that
    stands there (`/dev/stdout`) is written to.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    temporary, locks = temporary_of(path), sys.platform != "win32"
    try:
        with _alone(temporary) as file:
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if locks:  # nobody else may take the temporary file before it is in its place
                temporary.replace(path)
        if not locks:  # where a file that is open can't be moved
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[bytes]]:
    """The file at `path`, open for writing, and locked where the platform has locks.

    The folder may be a stranger's: a link there, to any file of this machine, is removed and not followed.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        with contextlib.suppress(FileNotFoundError):
            there = path.lstat()
            if not stat.S_ISREG(there.st_mode) or there.st_nlink > 1:
                path.unlink()
        with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(file, path):  # who had it put it in its place meanwhile
                    continue
            yield file
            return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
