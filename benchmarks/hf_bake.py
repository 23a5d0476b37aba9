# SPDX-License-Identifier: Apache-2.0
"""`lrconvert hf` on a sharded checkpoint against a plain copy with fsync, on one file system, in one run.

    python benchmarks/hf_bake.py [--scratch DIR] [--shape SHAPE] [--rounds N]

Also the peak memory, at 2.8 GB and at the 14 GB of a 7B shape (sparse files: a bake never reads weights).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from _common import Figure, copy_with_fsync, in_scratch, lrconvert, median, report, run, save, write_checkpoint

RATIO_ALLOWED, RSS_ALLOWED_MB = 0.05, 400


def measure(scratch: Path, shape: str, rounds: int) -> None:
    source = write_checkpoint(scratch / "source", shape)
    large = write_checkpoint(scratch / "large", "14 GB", sparse=True)
    recipe = scratch / "recipe"
    run(lrconvert("recipe", "derive", source, "--method", "yarn", "--factor", "8", "-o", recipe, "--force"))
    bakes, copies = [], []
    for index in range(rounds + 1):  # the first round warms the page cache and does not count
        for folder in (scratch / "artifact", scratch / "copy"):
            shutil.rmtree(folder, ignore_errors=True)
        bake = run(lrconvert("hf", source, "--recipe", recipe, "-o", scratch / "artifact"))
        copy = copy_with_fsync(source, scratch / "copy")
        if index:
            bakes.append(bake)
            copies.append(copy)
    shutil.rmtree(scratch / "large-artifact", ignore_errors=True)
    big = run(lrconvert("hf", large, "--recipe", recipe, "-o", scratch / "large-artifact"))
    ours, copied = median([bake.wall for bake in bakes]), median(copies)
    peak = max(cost.rss for cost in (*bakes, big)) / 1e6
    report(Figure(f"HF folder, {shape}", ours, "s", "a copy", copied, limit=RATIO_ALLOWED, memory_mb=peak))
    save(
        "hf-bake",
        {
            "bake_seconds": [round(bake.wall, 3) for bake in bakes],
            "copy_seconds": [round(copy, 3) for copy in copies],
            "ratio_median": round(median([b.wall / c for b, c in zip(bakes, copies, strict=True)]), 4),
            "ratio_allowed": RATIO_ALLOWED,
            "peak_rss_mb": round(max(bake.rss for bake in bakes) / 1e6, 1),
            "peak_rss_mb_14gb": round(big.rss / 1e6, 1),
            "peak_rss_mb_allowed": RSS_ALLOWED_MB,
        },
    )


if __name__ == "__main__":
    in_scratch(measure, rounds=5)
