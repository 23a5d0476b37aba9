# SPDX-License-Identifier: Apache-2.0
"""Time and anonymous memory of a command and its children."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """A whole process and its children: wall seconds, peak anonymous bytes; `failed`: its last words, if it did."""

    wall: float
    anonymous: int
    failed: str | None = None


# Started by a small process, which does nothing but look.
_WATCHER = """
import json, os, subprocess, sys, time

def anonymous(pid):
    try:
        with open(f"/proc/{pid}/status") as status:
            own = next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")), 0)
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            return own + sum(anonymous(int(child)) for child in children.read().split())
    except OSError:
        return 0

peak, started = 0, time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
while process.poll() is None:
    peak = max(peak, anonymous(process.pid))
    time.sleep(0.005)
print(json.dumps([process.returncode, time.perf_counter() - started, peak]))
"""


def watched(command: Sequence[str | Path]) -> Cost:
    launched = [sys.executable, "-I", "-S", "-c", _WATCHER, *map(str, command)]
    done = subprocess.run(launched, capture_output=True, text=True, check=True)
    code, wall, peak = json.loads(done.stdout)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return Cost(wall, peak, (lines or [f"exit code {code}"])[-1] if code else None)


def needed(command: Sequence[str | Path]) -> Cost:
    """The cost of a command that has to succeed."""
    cost = watched(command)
    if cost.failed is not None:
        raise RuntimeError(f"{command} failed: {cost.failed}")
    return cost
