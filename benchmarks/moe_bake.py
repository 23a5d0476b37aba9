# SPDX-License-Identifier: Apache-2.0
"""Models with experts, at true width: conversions in turns with plain copies with fsync, and their memory.

    python benchmarks/moe_bake.py [--scratch DIR] [--rounds N] [--layers N]

Phi-3.5-MoE (16 experts, 3 layers of 32: 6.4 GB in bf16) to a Hugging Face folder, with an adapter of rank 16 on every
linear layer, experts and routers too, so that every shard is written anew. Mixtral 8x7B (8 experts, 2 layers: 6.3 GB)
to GGUF in bf16, where a layer's experts go into one tensor: there is none of Phi-3.5-MoE. A copy is one of what was
written, made just after it. The whole shape of 42 billion parameters is planned from files of holes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import (
    Cost,
    Figure,
    copy_file_with_fsync,
    copy_with_fsync,
    lrconvert,
    make_shape,
    median,
    repeat,
    report,
    run,
    save,
    scratch_folder,
)
from adapter_merge import write_adapter

RATIO_ALLOWED, RSS_ALLOWED_MB, PLAN_SECONDS_ALLOWED = 1.3, 600, 1.0
LAYERS = {"phi-3.5-moe": 3, "mixtral-8x7b": 2}
WHOLE = "phi-3.5-moe"


@dataclass(frozen=True)
class Case:
    """A conversion of `source`: the command's options, and what it writes."""

    target: str
    source: Path
    recipe: Path
    options: tuple[str | Path, ...]

    def bake(self, output: Path) -> Cost:
        return run(lrconvert(self.target, self.source, "--recipe", self.recipe, *self.options, "-o", output))


def written(name: str, folder: Path, layers: int | None) -> Path:
    """A checkpoint of that shape with random weights; kept if it is there already."""
    config = make_shape.shape_config(name, layers)
    if not (folder / "config.json").exists():
        shards = make_shape.plan_shards(make_shape.planned(config))
        make_shape.write_checkpoint(folder, config, shards, make_shape.normal_blocks(config))
    return folder


def derived(source: Path) -> Path:
    recipe = source.with_name(f"{source.name}-recipe")
    options = ("--method", "yarn", "--factor", "8", "--uniform", "-o", recipe, "--force")
    run(lrconvert("recipe", "derive", source, *options))
    return recipe


def cases(scratch: Path, layers: int | None) -> dict[str, Case]:
    sources = {name: written(name, scratch / name, layers or count) for name, count in LAYERS.items()}
    adapter = write_adapter(scratch / "adapter", sources["phi-3.5-moe"])
    recipes = {name: derived(source) for name, source in sources.items()}
    return {
        "hf": Case("hf", sources["phi-3.5-moe"], recipes["phi-3.5-moe"], ("--adapter", adapter)),
        "gguf": Case("gguf", sources["mixtral-8x7b"], recipes["mixtral-8x7b"], ("--type", "bf16")),
    }


def in_turns(case: Case, scratch: Path, rounds: int) -> dict[str, Any]:
    """Times of conversions and copies; the first round warms the page cache and does not count."""
    output, copy = scratch / ("baked.gguf" if case.target == "gguf" else "baked"), scratch / "copy"
    copied_by: Callable[[Path, Path], float] = copy_file_with_fsync if case.target == "gguf" else copy_with_fsync
    costs, copies, size = [], [], 0
    for index in range(rounds + 1):
        cost = case.bake(output)
        size = output.stat().st_size if output.is_file() else sum(file.stat().st_size for file in output.iterdir())
        seconds = copied_by(output, copy)
        for path in (output, copy, output.with_suffix(".lrconvert.json")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if index or not rounds:
            costs.append(cost)
            copies.append(seconds)
    return {
        "bytes": size,
        "seconds": [round(cost.wall, 2) for cost in costs],
        "cpu_seconds": [round(cost.cpu, 2) for cost in costs],
        "copy_seconds": [round(seconds, 2) for seconds in copies],
        "ratio_to_copy": round(median([cost.wall for cost in costs]) / median(copies), 3),
        "peak_rss_mb": round(max(cost.rss for cost in costs) / 1e6, 1),
    }


def planned_whole(scratch: Path) -> dict[str, Any]:
    """The dry run of all layers, whole processes; the weights are holes, which it doesn't read."""
    config = make_shape.shape_config(WHOLE)
    folder = scratch / f"{WHOLE}-whole"
    shards = make_shape.plan_shards(make_shape.planned(config))
    make_shape.write_checkpoint(folder, config, shards, None)
    recipe = derived(folder)
    command = lrconvert("hf", folder, "--recipe", recipe, "--dtype", "f16", "-o", scratch / "whole", "--dry-run")
    costs = repeat(3, lambda: run(command))
    shutil.rmtree(folder)
    return {
        "parameters": sum(tensor.nbytes for _, shard in shards for tensor in shard) // 2,
        "seconds": [round(cost.wall, 2) for cost in costs],
        "peak_rss_mb": round(max(cost.rss for cost in costs) / 1e6, 1),
    }


def missed(found: dict[str, dict[str, Any]], whole: dict[str, Any]) -> list[str]:
    """The limits that these figures miss."""
    over = [
        f"{name}: {one['ratio_to_copy']}x of a copy"
        for name, one in found.items()
        if one["ratio_to_copy"] > RATIO_ALLOWED
    ]
    over += [f"{name}: {one['peak_rss_mb']} MB" for name, one in found.items() if one["peak_rss_mb"] > RSS_ALLOWED_MB]
    if (seconds := median(whole["seconds"])) > PLAN_SECONDS_ALLOWED:
        over.append(f"the plan of {WHOLE}: {seconds} s")
    return over


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of both shapes, to try the script")
    arguments = parser.parse_args()
    with scratch_folder(arguments.scratch) as scratch:
        scratch.mkdir(parents=True, exist_ok=True)
        found = {
            name: in_turns(case, scratch, arguments.rounds) for name, case in cases(scratch, arguments.layers).items()
        }
        whole = planned_whole(scratch)
    allowed = {"ratio": RATIO_ALLOWED, "peak_rss_mb": RSS_ALLOWED_MB, "plan_seconds": PLAN_SECONDS_ALLOWED}
    for name, what in (("hf", "HF folder with an adapter, Phi-3.5-MoE"), ("gguf", "GGUF bf16, Mixtral")):
        ours, copied = median(found[name]["seconds"]), median(found[name]["copy_seconds"])
        peak = found[name]["peak_rss_mb"]
        report(Figure(what, ours, "s", "a copy", copied, RATIO_ALLOWED, memory_mb=peak))
    report(Figure(f"dry run of all of {WHOLE}", median(whole["seconds"]), "s", limit=PLAN_SECONDS_ALLOWED))
    layers = LAYERS if arguments.layers is None else dict.fromkeys(LAYERS, arguments.layers)
    save("moe-bake", {"layers": layers, **found, "plan": whole, "allowed": allowed, "missed": missed(found, whole)})


if __name__ == "__main__":
    main()
