# SPDX-License-Identifier: Apache-2.0
"""Where `lrconvert verify` spends its time: the embedded model as a folder and as a q8_0 GGUF, both profiles in turns.

    python benchmarks/verify_profile.py [--smollm2 FILE] [--large] [--only NAME …] [--scratch DIR] [--rounds N]
        [--threads N] [--name NAME] [--print | --memory]

`--smollm2`: SmolLM2-135M's Q4_1 GGUF (LRCONVERT_SMOLLM2_GGUF), re-baked with its recipe, is measured too, and in
`quick` alone a folder with its three sets up to 2048k. `--large`: so is a Llama of a billion parameters in q4_k_m and
as a folder in bfloat16, in `quick` alone (2 GB of random weights on the disk). `lrconvert demo`, which bakes, verifies
and measures the embedded model, is a row too. `--only` measures rows by their names and keeps the others of the
result; each then says when it was measured. Every timed run is the command as a user starts it. One more is watched
for its memory: of all its processes together, without what is mapped from files. Another is under cProfile: its
seconds are not kept, but where they went (waiting for the runtime's process shows as `readline`), and how often the
reference computed how many tokens. The machine's load is kept with the figures: counts hold on a busy machine, CPU
seconds about, seconds don't. `--threads 1` keeps llama.cpp's threads from spinning on a busy machine. `--memory`
measures memory alone, and keeps the rest of the result.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from _baseline import write_tokenizer
from _common import RESULTS, Cost, Figure, facts, lrconvert, median, report, run, save, scratch_folder, write_checkpoint
from _memory import needed

Commands = dict[tuple[str, str], list[Any]]

PROFILES = ("full", "quick")
TOP = 8
SMOLLM2, EXTENDED = "SmolLM2-135M, Q4_1 GGUF", "SmolLM2-135M, folder to 2048k"
LARGE, LARGE_FOLDER = "1 B, q4_k_m GGUF", "1 B, folder"
DEMO = "lrconvert demo"
QUICK = (EXTENDED, LARGE, LARGE_FOLDER)  # these alone
# Seconds on two idle cores.
GOALS = {("q8_0 GGUF", "full"): 20, (SMOLLM2, "full"): 60, (LARGE, "quick"): 60}
# The command line, which leaves in a file how many tokens each pass of the reference read.
COUNTED = """
import atexit, json, sys
from pathlib import Path
from lrconvert.cli import main
from lrconvert.reference import Reference

file, passes, computed = Path(sys.argv.pop(1)), [], Reference._attention
atexit.register(lambda: file.write_text(json.dumps(passes)))

def attention(self, x, layer, *more):
    passes.extend([len(x)] if layer == 0 else [])
    return computed(self, x, layer, *more)

Reference._attention = attention
main()
"""


def baked(scratch: Path, smollm2: Path | None, *, large: bool) -> dict[str, Path]:
    """The artifacts, by the name that the result gives them."""
    folder, file, recipe = scratch / "demo-hf", scratch / "demo.gguf", scratch / "uniform"
    run(lrconvert("hf", "demo", "--recipe", "demo-8x", "-o", folder, "--force"))
    run(
        lrconvert("recipe", "derive", "demo", "--method", "yarn", "--factor", "8", "--uniform", "-o", recipe, "--force")
    )
    run(lrconvert("gguf", "demo", "--recipe", recipe, "--type", "q8_0", "-o", file, "--force"))
    found = {"folder": folder, "q8_0 GGUF": file}
    if smollm2 is not None:
        again = scratch / "smollm2.gguf"
        run(lrconvert("gguf", smollm2, "--recipe", "smollm2-135m-64k", "--allow-lossy", "-o", again, "--force"))
        found[SMOLLM2] = again
        extended = scratch / "smollm2-hf"
        run(lrconvert("hf", smollm2, "--recipe", "smollm2-135m-2048k", "-o", extended, "--force"))
        found[EXTENDED] = extended
    if large:
        found |= _large(scratch)
    return found


def _large(scratch: Path) -> dict[str, Path]:
    # 1.25: what makes noise of every rounding through 17 layers is in tools/make_shape.py.
    source = write_checkpoint(scratch / "large", "2 GB", widen=1.25)
    file, folder = scratch / "large.gguf", scratch / "large-hf"
    write_tokenizer(source, 32000)
    recipe = scratch / "large-recipe"
    options = ("--method", "yarn", "--factor", "8", "--uniform", "-o", recipe, "--force")
    run(lrconvert("recipe", "derive", source, *options))
    run(lrconvert("gguf", source, "--recipe", recipe, "--type", "q4_k_m", "-o", file, "--force"))
    run(lrconvert("hf", source, "--recipe", recipe, "-o", folder, "--force"))
    return {LARGE: file, LARGE_FOLDER: folder}


def profiled(scratch: Path, arguments: list[Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """The command once under cProfile: where its time goes, and the tokens of every pass of the reference."""
    record, script, counts = scratch / "profile", scratch / "counted.py", scratch / "counts.json"
    script.write_text(COUNTED)
    run([sys.executable, "-m", "cProfile", "-o", record, script, counts, *arguments])
    return top_of(record), json.loads(counts.read_text())


def top_of(profile: Path) -> list[dict[str, Any]]:
    """The functions with the most time of their own."""
    stats: dict[Any, Any] = pstats.Stats(str(profile)).stats  # type: ignore[attr-defined]
    entries = sorted(stats.items(), key=lambda item: -item[1][2])[:TOP]
    return [
        {"function": f"{Path(file).name}:{name}", "calls": values[1], "own_seconds": round(values[2], 2)}
        for (file, _, name), values in entries
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of rows; the others of the result are kept")
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", default="verify-profile", help="of the result")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--print", action="store_true", help="keep no result")
    instead.add_argument("--memory", action="store_true", help="measure nothing else")
    asked = parser.parse_args()
    with scratch_folder(asked.scratch) as scratch:
        commands = commands_of(scratch, asked)
        if asked.memory:
            save(asked.name, with_memory(json.loads((RESULTS / f"{asked.name}.json").read_text()), commands))
            return
        measured = measure(scratch, asked, commands)
    if asked.print:
        print(json.dumps(measured, indent=2))
        return
    if asked.only:
        rows = {name: {**facts(), "load_average": measured["load_average"], **row}
                for name, row in measured["artifacts"].items()}  # fmt: skip
        kept = json.loads((RESULTS / f"{asked.name}.json").read_text())
        measured = {**kept, "artifacts": {**kept["artifacts"], **rows}}
    save(asked.name, measured)


def commands_of(scratch: Path, asked: argparse.Namespace) -> Commands:
    """What is measured, by the names of its row and its profile."""
    scratch.mkdir(parents=True, exist_ok=True)
    threads = [] if asked.threads is None else ["--threads", str(asked.threads)]
    commands: Commands = {
        (name, profile): ["verify", artifact, "--profile", profile, *threads]
        for name, artifact in baked(scratch, asked.smollm2, large=asked.large).items()
        for profile in (("quick",) if name in QUICK else PROFILES)
    }
    commands[DEMO, "quick"] = ["demo", "-o", scratch / "demo", "--force"]
    return {key: command for key, command in commands.items() if not asked.only or key[0] in asked.only}


def peak_mb(command: list[Any]) -> int:
    """Memory of all processes of a command together, without what is mapped from files."""
    return round(needed(lrconvert(*command)).anonymous / 1e6)


def with_memory(kept: dict[str, Any], commands: Commands) -> dict[str, Any]:
    """A result with the memory of these rows as it is now."""
    for (name, profile), command in commands.items():
        kept["artifacts"][name][profile] |= {"peak_anonymous_mb": peak_mb(command)}
    return {**kept, "memory": facts()}


def measure(scratch: Path, asked: argparse.Namespace, commands: Commands) -> dict[str, Any]:
    costs: dict[tuple[str, str], list[Cost]] = {key: [] for key in commands}
    loads = []
    for _ in range(asked.rounds):
        for key, command in commands.items():
            loads.append(os.getloadavg()[0])
            costs[key].append(run(lrconvert(*command)))
    rows: dict[str, Any] = defaultdict(dict)
    for (name, profile), made in costs.items():
        wall = median([cost.wall for cost in made])
        peak = peak_mb(commands[name, profile])
        goal = GOALS.get((name, profile))
        what = name if name == DEMO else f"verify, {name}, {profile}"
        report(Figure(what, wall, "s", limit=goal, memory_mb=peak))
        tops, passes = profiled(scratch, commands[name, profile])
        rows[name][profile] = {
            "wall_seconds": [round(cost.wall, 1) for cost in made],
            "cpu_seconds": [round(cost.cpu, 1) for cost in made],
            "wall_goal_seconds": goal,
            "reference_passes": len(passes),
            "reference_tokens": sum(passes),
            "peak_anonymous_mb": peak,
            "top": tops,
        }
    return {"load_average": [round(load, 1) for load in loads], "artifacts": rows}


if __name__ == "__main__":
    main()
