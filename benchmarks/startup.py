# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of `lrconvert --help`, and of `inspect` on a folder with 200 shards, on a warm cache.

python benchmarks/startup.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _common import lrconvert, median, repeat, run, save, write_checkpoint

ROUNDS = 9


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lrconvert-bench-") as scratch:
        model = write_checkpoint(Path(scratch) / "model", "14 GB", shards=200, sparse=True)
        helped = repeat(ROUNDS + 1, lambda: run(lrconvert("--help")))[1:]
        inspected = repeat(ROUNDS + 1, lambda: run(lrconvert("inspect", model)))[1:]
        shards = len(list(model.glob("*.safetensors")))
    save(
        "startup",
        {
            "help_cpu_seconds_median": round(median([cost.cpu for cost in helped]), 3),
            "help_cpu_seconds_allowed": 0.25,
            "inspect_shards": shards,
            "inspect_wall_seconds_median": round(median([cost.wall for cost in inspected]), 3),
            "inspect_cpu_seconds_median": round(median([cost.cpu for cost in inspected]), 3),
            "inspect_seconds_allowed": 0.5,
        },
    )


if __name__ == "__main__":
    main()
