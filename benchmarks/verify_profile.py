# SPDX-License-Identifier: Apache-2.0
"""Where `lrconvert verify` spends its time: the embedded model as a folder and as a q8_0 GGUF, both profiles in turns.

    python benchmarks/verify_profile.py [--scratch DIR] [--rounds N]

Every run is a whole process under cProfile. Waiting for the runtime's process shows as `readline`. The machine's load
is kept with the figures: ratios of one run hold on a busy machine, seconds don't.
"""

from __future__ import annotations

import os
import pstats
import sys
from pathlib import Path
from typing import Any

from _common import Cost, in_scratch, lrconvert, median, run, save

PROFILES = ("full", "quick")
TOP = 8


def baked(scratch: Path) -> dict[str, Path]:
    """The artifacts, by the name that the result gives them."""
    folder, file, recipe = scratch / "demo-hf", scratch / "demo.gguf", scratch / "uniform"
    run(lrconvert("hf", "demo", "--recipe", "demo-8x", "-o", folder, "--force"))
    run(
        lrconvert("recipe", "derive", "demo", "--method", "yarn", "--factor", "8", "--uniform", "-o", recipe, "--force")
    )
    run(lrconvert("gguf", "demo", "--recipe", recipe, "--type", "q8_0", "-o", file, "--force"))
    return {"folder": folder, "q8_0 GGUF": file}


def top_of(profile: Path) -> list[dict[str, Any]]:
    """The functions with the most time of their own."""
    stats: dict[Any, Any] = pstats.Stats(str(profile)).stats  # type: ignore[attr-defined]
    entries = sorted(stats.items(), key=lambda item: -item[1][2])[:TOP]
    return [
        {"function": f"{Path(file).name}:{name}", "calls": values[1], "own_seconds": round(values[2], 2)}
        for (file, _, name), values in entries
    ]


def measure(scratch: Path, rounds: int) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    artifacts, record = baked(scratch), scratch / "profile"
    costs: dict[tuple[str, str], list[Cost]] = {(name, profile): [] for name in artifacts for profile in PROFILES}
    tops: dict[tuple[str, str], list[dict[str, Any]]] = {}
    loads = []
    for _ in range(rounds):
        for name, profile in costs:
            loads.append(os.getloadavg()[0])
            command = [sys.executable, "-m", "cProfile", "-o", record, "-m", "lrconvert", "verify", artifacts[name]]
            costs[name, profile].append(run([*command, "--profile", profile]))
            tops[name, profile] = top_of(record)
    rows: dict[str, Any] = {}
    for name in artifacts:
        walls, cpus = (
            {p: median([getattr(cost, what) for cost in costs[name, p]]) for p in PROFILES} for what in ("wall", "cpu")
        )
        rows[name] = {
            **{f"{p}_wall_seconds": [round(cost.wall, 1) for cost in costs[name, p]] for p in PROFILES},
            **{f"{p}_cpu_seconds": [round(cost.cpu, 1) for cost in costs[name, p]] for p in PROFILES},
            "quick_of_full_wall": round(walls["quick"] / walls["full"], 3),
            "quick_of_full_cpu": round(cpus["quick"] / cpus["full"], 3),
            "peak_rss_mb": round(max(cost.rss for cost in costs[name, "full"]) / 1e6),
            **{f"{p}_top": tops[name, p] for p in PROFILES},
        }
    save("verify-profile", {"load_average": [round(load, 1) for load in loads], "artifacts": rows})


if __name__ == "__main__":
    in_scratch(measure, rounds=3)
