# SPDX-License-Identifier: Apache-2.0
"""Blocks of a file made by a few threads, a bounded number of bytes ahead of the one that writes them, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING

from lrconvert.machine import usable_cores

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

MOST_WORKERS = 16  # more would wait for the one that writes
AHEAD_BYTES = 64 * 2**20  # of finished blocks that wait for the writer

Job = tuple[Callable[[], memoryview], int]  # makes a block; about how many bytes it has


def prefetch(
    jobs: Iterable[Job], *, workers: int | None = None, limit: int | None = None
) -> Generator[memoryview, None, None]:
    """Results of the jobs in order, at most `limit` bytes (default: `AHEAD_BYTES`) of them made ahead, by `workers`
    threads (default: one for each core). Closing it drops what isn't made."""
    from concurrent.futures import ThreadPoolExecutor  # a hundredth of a second that most bakes can do without

    with ThreadPoolExecutor(workers or min(MOST_WORKERS, max(2, usable_cores()))) as pool:
        try:
            yield from _in_order(pool, jobs, AHEAD_BYTES if limit is None else limit)
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ThreadPoolExecutor, jobs: Iterable[Job], limit: int) -> Iterator[memoryview]:
    waiting: deque[tuple[Future[memoryview], int]] = deque()
    held = 0
    for job, size in jobs:
        while waiting and held + size > limit:
            future, freed = waiting.popleft()
            yield future.result()
            held -= freed
        waiting.append((pool.submit(job), size))
        held += size
    while waiting:
        yield waiting.popleft()[0].result()
