# SPDX-License-Identifier: Apache-2.0
"""Conversions of a whole 7B (13.5 GB in bf16): against a copy with fsync, against the CPU alone, memory, and a 70B.

    python benchmarks/scale.py PART [--shape "14 GB"] [--rounds N] [--only CONVERSION …] [--scratch DIR] [--memory DIR]
        [--quantise FOLDER] [--large-shards N]

PART is `written` (conversions that take about as long as writing what they write), `quantised` (those that compute:
1 to 3 below for either, 4 for the second), or `large` (5). Each has a result of its own, scale-PART.json.

1. Every conversion in turn with a plain copy of what it writes; both end when it is on the disk. Free disk needed: four
   times the checkpoint.
2. The CPU's limit: the same in a memory file system, `--memory` (default /dev/shm), with the largest shape that fits
   there, in seconds a GB written. What the disk takes beyond that is the disk's.
3. Peak memory at 0.3 GB beside that of the shape: flat.
4. q4_k_m beside `llama_model_quantize`, which llama-quantize calls, on the bf16 GGUF with as many threads. FOLDER has a
   libllama with that function (tools/quantise_reference.py says where from); ours quantises with its ggml too. Theirs
   is neither hashed nor brought to the disk.
5. Llama 3's 70B shape: what a dry run says of every file, and its first files converted for real and compared with
   that; the rest is holes in a sparse checkpoint, and its time is calculated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _baseline import write_tokenizer
from _common import (
    SHAPES,
    Cost,
    Figure,
    copy_file_with_fsync,
    copy_with_fsync,
    lrconvert,
    median,
    report,
    run,
    save,
    scratch_folder,
    write_checkpoint,
)
from adapter_merge import write_adapter
from gguf import LlamaFileType
from make_shape import TOKEN_IDS, normal_blocks, planned, shape_config
from make_shape import write_checkpoint as write_shards

from lrconvert.api.baking import plan_bake
from lrconvert.artifact.bake import bake
from lrconvert.artifact.plan import Plan
from lrconvert.machine import usable_cores
from lrconvert.runtimes.llama_library import VARIABLE
from lrconvert.targets.gguf import Options as GgufOptions
from lrconvert.targets.hf.shards import plan_shards

SMALL, LARGE, WHOLE = "0.3 GB", "llama3-70b", "14 GB"
RSS_ALLOWED_MB = 600
VOCABULARY = 32000


@dataclass(frozen=True)
class Conversion:
    """A command and its options; `of`: of a copy with fsync it may take so many times as long."""

    name: str
    command: str
    options: tuple[str, ...]
    of: float | None = None
    part: str = "written"

    @property
    def suffix(self) -> str:
        return ".gguf" if self.command == "gguf" else ""


REBAKE = "GGUF re-bake"
CONVERSIONS = (
    Conversion("GGUF bf16", "gguf", ("--type", "bf16"), of=1.3),
    Conversion(REBAKE, "gguf", (), of=1.1),
    Conversion("GGUF q8_0", "gguf", ("--type", "q8_0"), of=1.3),
    Conversion("GGUF q4_k_m", "gguf", ("--type", "q4_k_m"), part="quantised"),
    Conversion("HF with an adapter", "hf", ("--adapter",), of=1.3),
    Conversion("ONNX f16", "onnx", ("--dtype", "f16"), of=1.3),
    Conversion("ONNX int4", "onnx", ("--dtype", "int4"), part="quantised"),
)


class Bench:
    """A checkpoint of a shape with an adapter and two recipes, and every conversion of it."""

    def __init__(self, folder: Path, shape: str) -> None:
        self.folder, self.shape = folder, shape
        self.source = write_checkpoint(folder / "source", shape)
        write_tokenizer(self.source, VOCABULARY)
        self.recipes = [self._derived(factor) for factor in ("8", "4")]
        self.adapter = write_adapter(folder / "adapter", self.source)
        self.bf16 = folder / "kept-bf16.gguf"

    def _derived(self, factor: str) -> Path:
        recipe = self.folder / f"recipe-{factor}x"
        options = ("--method", "yarn", "--factor", factor, "--uniform", "-o", recipe, "--force")
        run(lrconvert("recipe", "derive", self.source, *options))
        return recipe

    def convert(self, conversion: Conversion) -> tuple[Cost, Path]:
        """What it cost, and where the artifact lies."""
        command, output = self.command(conversion)
        return run(command), output

    def command(self, conversion: Conversion) -> tuple[list[str | Path], Path]:
        """How to convert, and where the artifact will lie."""
        output = self.folder / f"made{conversion.suffix}"
        remove(output)
        source, recipe = self.source, self.recipes[0]
        if conversion.name == REBAKE:
            source, recipe = self.bf16, self.recipes[1]
        options = [*conversion.options, *([self.adapter] if "--adapter" in conversion.options else [])]
        return lrconvert(conversion.command, source, "--recipe", recipe, *options, "-o", output), output

    def keep_bf16(self) -> None:
        if not self.bf16.exists():
            run(lrconvert("gguf", self.source, "--recipe", self.recipes[0], "--type", "bf16", "-o", self.bf16))


def remove(artifact: Path) -> None:
    """A folder, or a file and its manifest."""
    shutil.rmtree(artifact, ignore_errors=True) if artifact.is_dir() else artifact.unlink(missing_ok=True)
    artifact.with_suffix(".lrconvert.json").unlink(missing_ok=True)


def size(artifact: Path) -> int:
    paths = artifact.rglob("*") if artifact.is_dir() else [artifact]
    return sum(path.stat().st_size for path in paths if path.is_file())


def copied(artifact: Path, target: Path) -> float:
    """Seconds for a copy with fsync, which is removed."""
    copy = copy_with_fsync if artifact.is_dir() else copy_file_with_fsync
    seconds = copy(artifact, target)
    remove(target)
    return seconds


def measured(bench: Bench, conversions: Sequence[Conversion], rounds: int) -> dict[str, dict[str, Any]]:
    """Conversions and copies of what they wrote, in turn."""
    costs: dict[str, list[Cost]] = {conversion.name: [] for conversion in conversions}
    copies: dict[str, list[float]] = {conversion.name: [] for conversion in conversions}
    sizes = {}
    if any(conversion.name == REBAKE for conversion in conversions):
        bench.keep_bf16()
    for index in range(rounds + 1):  # the first round warms the page cache and doesn't count
        for conversion in conversions:
            cost, artifact = bench.convert(conversion)
            seconds = copied(artifact, bench.folder / "copy")
            sizes[conversion.name] = size(artifact)
            remove(artifact)
            if index or not rounds:
                costs[conversion.name].append(cost)
                copies[conversion.name].append(seconds)
    return {name: summary(costs[name], copies[name], sizes[name]) for name in costs}


def summary(costs: Sequence[Cost], copies: Sequence[float], nbytes: int) -> dict[str, Any]:
    wall = median([cost.wall for cost in costs])
    return {
        "gb": round(nbytes / 1e9, 2),
        "seconds": [round(cost.wall, 2) for cost in costs],
        "cpu_seconds": [round(cost.cpu, 2) for cost in costs],
        "copy_seconds": [round(seconds, 2) for seconds in copies],
        "ratio_to_copy": round(wall / median(copies), 2),
        "seconds_a_gb": round(wall / nbytes * 1e9, 2),
        "peak_rss_mb": round(max(cost.rss for cost in costs) / 1e6),
    }


def fitting_shape(place: Path, most: str) -> str:
    """The largest shape, no larger than `most`, of which a memory file system holds five copies."""
    free, shapes = shutil.disk_usage(place).free, list(SHAPES)
    sizes = {name: sum(tensor.nbytes for tensor in planned({**shape_config("llama2-7b"), **SHAPES[name]}))
             for name in shapes[: shapes.index(most) + 1]}  # fmt: skip
    return [name for name, nbytes in sizes.items() if 5 * nbytes <= free][-1]


# --- llama-quantize ------------------------------------------------------------------------------------------

_QUANTISE = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from quantise_reference import Quantiser
quantise = Quantiser(sys.argv[2])
if not quantise(Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), threads=int(sys.argv[6])):
    raise SystemExit("".join(quantise.messages)[-300:])
"""


def against_llama_quantize(bench: Bench, library: Path, rounds: int) -> dict[str, Any]:
    """q4_k_m of the bf16 GGUF by both, with the same functions of ggml and as many threads."""
    bench.keep_bf16()
    theirs, ours = [], []
    output = bench.folder / "quantised.gguf"
    tools, kind = Path(__file__).parents[1] / "tools", str(int(LlamaFileType.MOSTLY_Q4_K_M))
    command = [sys.executable, "-c", _QUANTISE, tools, library, bench.bf16, output, kind, str(usable_cores())]
    options = ("--recipe", bench.recipes[0], "--type", "q4_k_m", "-o", output)
    with contextlib.ExitStack() as stack:
        stack.enter_context(environment(VARIABLE, str(library)))
        for _ in range(max(1, rounds)):
            ours.append(run(lrconvert("gguf", bench.bf16, *options)))
            remove(output)
            theirs.append(run(command))
            remove(output)
    walls = [median([cost.wall for cost in costs]) for costs in (ours, theirs)]
    return {
        "threads": usable_cores(),
        "seconds": [round(cost.wall, 2) for cost in ours],
        "cpu_seconds": [round(cost.cpu, 2) for cost in ours],
        "llama_quantize_seconds": [round(cost.wall, 2) for cost in theirs],
        "llama_quantize_cpu_seconds": [round(cost.cpu, 2) for cost in theirs],
        "times_as_fast": round(walls[1] / walls[0], 2),
        "peak_rss_mb": round(max(cost.rss for cost in ours) / 1e6),
        "llama_quantize_peak_rss_mb": round(max(cost.rss for cost in theirs) / 1e6),
    }


@contextlib.contextmanager
def environment(name: str, value: str) -> Any:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


# --- 70B -------------------------------------------------------------------------------------------------


def sparse_checkpoint(folder: Path, layers: int | None, real: int) -> Path:
    """Llama 3's 70B shape: random weights in its first `real` shards, holes in the others."""
    config = {**shape_config(LARGE, layers), **TOKEN_IDS}
    shards = plan_shards(planned(config))
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, config, shards[:real], normal_blocks(config))
    (folder / "config.json").unlink()
    write_shards(folder, config, shards, None)
    write_tokenizer(folder, VOCABULARY)
    return folder


def first_files(plan: Plan, source_bytes: int) -> Plan:
    """The files of a plan whose tensors come from the first bytes of the source, which are real."""
    whole = sum(stream.nbytes for stream in plan.streams)
    share, done, kept = source_bytes / sum(t.nbytes for t in plan.model.checkpoint.tensors.values()), 0, []
    for stream in plan.streams:
        done += stream.nbytes
        if kept and done > share * whole:
            break
        kept.append(stream)
    return replace(plan, streams=kept)


def large(scratch: Path, real: int, layers: int | None) -> dict[str, Any]:
    """What a dry run says, the first files for real, the rest calculated."""
    source = sparse_checkpoint(scratch / "70b", layers, real)
    recipe = scratch / "70b-recipe"
    run(
        lrconvert("recipe", "derive", source, "--method", "yarn", "--factor", "8", "--uniform", "-o", recipe, "--force")
    )
    dry = run(lrconvert("gguf", source, "--recipe", recipe, "--dry-run", "-o", scratch / "dry.gguf"))
    shards = sorted(source.glob("*.safetensors"))
    real_bytes = sum(path.stat().st_size for path in shards[:real])
    found: dict[str, Any] = {"source_gb": round(size(source) / 1e9, 1), "dry_run_seconds": round(dry.wall, 2)}
    found["dry_run_peak_rss_mb"] = round(dry.rss / 1e6)
    for kind in ("bf16", "q4_k_m"):
        output = scratch / f"70b-{kind}.gguf"
        plan = plan_bake("gguf", source, recipe, output, GgufOptions(type=kind, split=2 * 10**9))
        part = first_files(plan, real_bytes)
        started = time.perf_counter()
        bake(part, force=True)
        seconds = time.perf_counter() - started
        made = {stream.name: (output.parent / stream.name).stat().st_size for stream in part.streams}
        whole, written = sum(stream.nbytes for stream in plan.streams), sum(made.values())
        found[kind] = {
            "files": len(plan.streams),
            "gb": round(whole / 1e9, 2),
            "converted_files": len(made),
            "converted_gb": round(written / 1e9, 2),
            "sizes_as_planned": all(plan.sizes[name] == nbytes for name, nbytes in made.items()),
            "seconds": round(seconds, 1),
            "whole_seconds_calculated": round(seconds * whole / written),
        }
        for path in scratch.glob(f"70b-{kind}*"):
            path.unlink()
    shutil.rmtree(source)
    return found


# --- the command -----------------------------------------------------------------------------------------


def figures(shape: str, disk: dict[str, Any], quantised: dict[str, Any] | None) -> list[Figure]:
    limits = {conversion.name: conversion.of for conversion in CONVERSIONS}
    found = [
        Figure(f"{name}, {shape}", median(values["seconds"]), "s", "a copy", median(values["copy_seconds"]),
               limits[name], memory_mb=values["peak_rss_mb"])
        for name, values in disk.items()
    ]  # fmt: skip
    if quantised:
        ours, theirs = median(quantised["seconds"]), median(quantised["llama_quantize_seconds"])
        memory = quantised["peak_rss_mb"]
        found.append(Figure(f"GGUF q4_k_m, {shape}", ours, "s", "llama-quantize", theirs, 1, memory_mb=memory))
    return found


def measure(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    if asked.part == "large":
        found = large(scratch, asked.large_shards, asked.large_layers)
        peak = found["dry_run_peak_rss_mb"]
        report(Figure("GGUF dry run, a 70B", found["dry_run_seconds"], "s", memory_mb=peak))
        return {LARGE: found}
    chosen = [conversion for conversion in CONVERSIONS if conversion.part == asked.part]
    chosen = [conversion for conversion in chosen if not asked.only or conversion.name in asked.only]
    bench = Bench(scratch / "disk", asked.shape)
    found: dict[str, Any] = {"shape": asked.shape, "disk": measured(bench, chosen, asked.rounds)}
    print(json.dumps(found["disk"], indent=1), flush=True)
    quantised = None
    if asked.part == "quantised" and asked.quantise:
        quantised = against_llama_quantize(bench, asked.quantise, asked.rounds)
        found["q4_k_m beside llama_model_quantize"] = quantised
    report(*figures(asked.shape, found["disk"], quantised))
    shutil.rmtree(bench.folder)
    small = Bench(scratch / "small", SMALL)
    found["peak_rss_mb"] = {
        name: {SMALL: values["peak_rss_mb"], asked.shape: found["disk"][name]["peak_rss_mb"]}
        for name, values in measured(small, chosen, 0).items()
    }
    shutil.rmtree(small.folder)
    if asked.memory.is_dir():
        shape = fitting_shape(asked.memory, asked.shape)
        with scratch_folder(asked.memory / f"lrconvert-scale-{os.getpid()}") as place:
            try:
                found["in memory"] = {"shape": shape, **measured(Bench(place, shape), chosen, asked.rounds)}
            finally:
                shutil.rmtree(place)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*dict.fromkeys(conversion.part for conversion in CONVERSIONS), "large"])
    parser.add_argument("--shape", choices=SHAPES, default=WHOLE)
    parser.add_argument("--rounds", type=int, default=5, help="0: one that isn't preceded by one to warm up")
    parser.add_argument("--only", nargs="+", choices=[conversion.name for conversion in CONVERSIONS], metavar="NAME")
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a memory file system")
    parser.add_argument("--quantise", type=Path, help="a folder with a libllama that has llama_model_quantize")
    parser.add_argument("--large-shards", type=int, default=2, help="of 5 GB each, for real")
    parser.add_argument("--large-layers", type=int, help="of the 70B; default: all")
    asked = parser.parse_args()
    with scratch_folder(asked.scratch) as scratch:
        found = measure(asked, scratch)
    if asked.shape == WHOLE and not asked.only:
        save(f"scale-{asked.part}", found)
    else:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
