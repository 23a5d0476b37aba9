# SPDX-License-Identifier: Apache-2.0
"""What torchrun does for the processes that it starts; which processes a command left."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path


def ranks(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of the processes that it starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def torchrun(program: Path) -> list[str]:
    """Two processes of what the installed command does."""
    options = ["--standalone", "--nproc-per-node", "2", "--no-python"]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(program)]


def processes_in(folder: Path) -> list[int]:
    """The ids of living processes whose working folder lies, or lay, in `folder`. Linux alone says so."""
    found, real = [], str(folder.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.readlink(process / "cwd").startswith(f"{real}/"):  # noqa: PTH115
                found.append(int(process.name))
    return found


def holds_within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether it becomes true within that time; asked often."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
