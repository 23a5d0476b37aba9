# SPDX-License-Identifier: Apache-2.0
"""Folders for what is needed while something runs, in the system's folder for temporary files.

    with temporary_folder() as folder:
        ...

A process that is killed can't remove its folders. So each is locked by who made it, and a lock ends with its process,
however that ends: a folder that can be locked by another has no owner any more, and is removed by whoever makes the
next one, and by a runtime's process whose parent is gone (`runtimes/worker_loop.py`). With the standard library alone:
that process loads this file by its path.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "lrconvert-run-"
_NAME = re.compile(re.escape(PREFIX) + r"\w{8}")  # as `mkdtemp` names them


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of its own, for this user alone, that goes away at the end; those of dead processes go before it."""
    remove_abandoned(Path(tempfile.gettempdir()))
    folder, lock = _made()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(places: Path) -> None:
    """Remove what processes of this user, which have ended, left in `places`. What can't be read or removed stays.

    Others may write there too: no link is followed, and only what this user made, in a folder that nobody else may
    enter, is removed.
    """
    for folder in places.glob(f"{PREFIX}*"):
        if _NAME.fullmatch(folder.name):
            with contextlib.suppress(OSError):
                _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    lock = _locked(folder)
    if lock is None:
        return
    try:
        status = os.fstat(lock)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _made() -> tuple[Path, int | None]:
    """A new folder and its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = _locked(folder)
            if folder.is_dir():
                return folder, lock
            if lock is not None:
                os.close(lock)
        # Without its lock it looked abandoned, and somebody has removed it.


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where there are no locks: there nobody but its owner removes it.

    Raises `BlockingIOError` where somebody else has it, `OSError` for what is no folder.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # of a file system that can't
        os.close(handle)
        return None
    return handle
