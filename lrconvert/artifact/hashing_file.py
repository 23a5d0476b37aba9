# SPDX-License-Identifier: Apache-2.0
"""A file that is hashed, and brought to the disk, while it is written.

A digest takes as long as the writing, and a kernel lets gigabytes wait before it begins to write them out: one after
the other they cost three times what the slowest of them does. Two threads do both beside the writer, from the first
megabytes on: a small file is done before a thread would start.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from types import TracebackType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

SMALL_BYTES = 16 * 2**20  # up to here the writer does all by itself
UNHASHED = 16  # parts, of a bake's blocks of 1 or 2 MB, that may wait to be hashed
SYNC_BYTES = 64 * 2**20  # written before the disk is asked to take them

_to_disk = getattr(os, "fdatasync", os.fsync)  # without the times, where a system knows the difference


class HashingFile:
    """A writer that counts and hashes what goes through it. Parts must stay as they are when they were written.

    `finish` ends it: everything is on the disk, and `sha256` has seen it all. Leaving the context stops its threads.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self.size, self.sha256 = raw, 0, hashlib.sha256()
        self._threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None
        self._unhashed: deque[Future[None]] = deque()
        self._syncing: Future[None] | None = None
        self._asked = 0  # bytes that the disk has been asked to take

    def write(self, data: bytes | memoryview) -> None:
        """Raises `OSError` for what the disk refuses, now or for a part that it took before."""
        self._raw.write(data)
        self.size += len(data)
        if self.size <= SMALL_BYTES and self._threads is None:
            self.sha256.update(data)
            return
        hashing, syncing = self._started()
        if len(self._unhashed) == UNHASHED:
            self._unhashed.popleft().result()
        self._unhashed.append(hashing.submit(self.sha256.update, data))
        if self.size - self._asked >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._wait_for_disk()
            self._syncing, self._asked = syncing.submit(_to_disk, self._raw.fileno()), self.size

    def _started(self) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
        """The thread that hashes, in order, and the one that waits for the disk."""
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor  # a hundredth of a second that most bakes can do without

            self._threads = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        return self._threads

    def _wait_for_disk(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def finish(self) -> None:
        """Wait for the digest and the disk."""
        self._raw.flush()
        self._wait_for_disk()
        os.fsync(self._raw.fileno())
        while self._unhashed:
            self._unhashed.popleft().result()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads or ():
            thread.shutdown(cancel_futures=True)
