# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of `lrconvert --help`, and of `inspect` on a folder with 200 shards, on a warm cache.

python benchmarks/startup.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _common import Figure, lrconvert, median, repeat, report, run, save, write_checkpoint

ROUNDS = 9
HELP_ALLOWED, INSPECT_ALLOWED = 0.25, 0.5  # seconds


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lrconvert-bench-") as scratch:
        model = write_checkpoint(Path(scratch) / "model", "14 GB", shards=200, sparse=True)
        helped = repeat(ROUNDS + 1, lambda: run(lrconvert("--help")))[1:]
        inspected = repeat(ROUNDS + 1, lambda: run(lrconvert("inspect", model)))[1:]
        shards = len(list(model.glob("*.safetensors")))
    help_cpu, wall = median([cost.cpu for cost in helped]), median([cost.wall for cost in inspected])
    report(
        Figure("--help, CPU", help_cpu, "s", limit=HELP_ALLOWED),
        Figure(f"inspect, {shards} shards", wall, "s", limit=INSPECT_ALLOWED),
    )
    save(
        "startup",
        {
            "help_cpu_seconds_median": round(help_cpu, 3),
            "help_cpu_seconds_allowed": HELP_ALLOWED,
            "inspect_shards": shards,
            "inspect_wall_seconds_median": round(wall, 3),
            "inspect_cpu_seconds_median": round(median([cost.cpu for cost in inspected]), 3),
            "inspect_seconds_allowed": INSPECT_ALLOWED,
        },
    )


if __name__ == "__main__":
    main()
