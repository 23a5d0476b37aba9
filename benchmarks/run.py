# SPDX-License-Identifier: Apache-2.0
"""Run the benchmarks that fit this machine, and print one table with the peers side by side.

    python benchmarks/run.py [--only NAME …] [--quick] [--scratch DIR] [--json FILE]
    python benchmarks/run.py --list
    python benchmarks/run.py --readme [--check]

Peers live in environments of their own, which variables name (benchmarks/README.md). What a benchmark needs and this
machine lacks, a peer or room on the disk, is in its row of the table. What ran whole is kept: the script's own results,
and its rows with date and versions (also of what is installed in the peers' environments) in results/run.json, in place
of its earlier ones. `--readme` makes the table of README.md of them. So a run that takes too long for one quiet evening
is made in parts, with `--only`. `--quick` keeps nothing, and a script that lacks a peer keeps nothing of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import FIGURES_FILE, RESULTS, RESULTS_FOLDER, Figure, facts, installed, scratch_folder

from lrconvert.errors import EnvironmentFailure
from lrconvert.machine import free_disk

HERE = Path(__file__).parent
README, SAVED = HERE.parent / "README.md", RESULTS / "run.json"
BEGIN, END = "<!-- benchmarks/run.py --readme: begin -->", "<!-- end -->"


@dataclass(frozen=True)
class Need:
    """Something that a machine may lack: `found` is the argument that it becomes, None where it is absent.
    `interpreter`: that is one, and the versions of what is installed there are kept."""

    what: str
    found: Callable[[], str | None]
    interpreter: bool = False


def named(variable: str, what: str, *, interpreter: bool = False) -> Need:
    """A file or an interpreter that an environment variable names."""
    return Need(f"{what} ({variable})", lambda: os.environ.get(variable) or None, interpreter)


def folder(path: str) -> Need:
    place = HERE.parent / path
    return Need(path, lambda: str(place) if place.exists() else None)


def has_gpu() -> str | None:
    import torch

    return "cuda" if torch.cuda.is_available() else None


GENAI = named("LRCONVERT_GENAI_PYTHON", "onnxruntime-genai", interpreter=True)
OPTIMUM = named("LRCONVERT_OPTIMUM_PYTHON", "optimum-onnx", interpreter=True)
MLX = named("LRCONVERT_MLX_PYTHON", "mlx-lm", interpreter=True)
VLLM = named("LRCONVERT_VLLM_PYTHON", "vLLM", interpreter=True)
CONVERTER = named("LRCONVERT_CONVERTER_PYTHON", "llama.cpp's converter", interpreter=True)
SMOLLM2 = named("LRCONVERT_SMOLLM2_GGUF", "SmolLM2-135M as GGUF")
QUANTISE = named("LRCONVERT_LLAMA_QUANTISE_LIBRARY", "llama_model_quantize")
LLAMA = Need("llama.cpp's library", lambda: "" if find_spec("xllamacpp") or find_spec("llama_cpp") else None)
TORCH = Need("PyTorch and transformers", lambda: "" if find_spec("torch") and find_spec("transformers") else None)
GPU = Need("a GPU", has_gpu)
FACTORS, JOURNAL = folder("../shared/factors"), folder("../shared/search/evolution-journal-smollm2-64k.json")


@dataclass(frozen=True)
class Benchmark:
    """A script and how it is called. `needs`: without these it doesn't run. `wants`: options that name a peer, left out
    without it. `quick`: what replaces `arguments` where a try should be short, None where it is short as it is.
    `disk`, `quick_disk`: about what it has on the disk at once, in a run and in a try."""

    name: str
    minutes: float  # about, on two cores
    script: str
    arguments: tuple[str | Need, ...] = ()
    quick: tuple[str | Need, ...] | None = None
    needs: tuple[Need, ...] = ()
    wants: dict[str, Need] = field(default_factory=dict)
    disk: float = 2.0  # GB
    quick_disk: float = 2.0

    def absent(self, scratch: Path, *, quick: bool) -> list[str]:
        """What it can't run without, and this machine lacks; of the disk, with what would fit there."""
        lacking = [need.what for need in self.needs if need.found() is None]
        free, needed = free_disk(scratch) / 1e9, self.quick_disk if quick else self.disk
        if needed > free:
            tried = f"; --quick needs {self.quick_disk:g} GB" if self.quick_disk <= free else ""
            lacking.append(f"{needed:g} GB in --scratch, where {free:.1f} GB are free{tried}")
        return lacking

    def peers_absent(self) -> list[str]:
        return [need.what for need in self.wants.values() if need.found() is None]

    def peers(self) -> dict[str, dict[str, str]]:
        """What is installed in the interpreters that it was given, by what they are for."""
        needs = [need for need in (*self.needs, *self.wants.values()) if need.interpreter]
        return {need.what: installed(python) for need in needs if (python := need.found()) is not None}

    def command(self, *, quick: bool, scratch: Path) -> list[str]:
        given = self.arguments if self.quick is None or not quick else self.quick
        words = [argument.found() or "" if isinstance(argument, Need) else argument for argument in given]
        for option, need in self.wants.items():
            words += [option, value] if (value := need.found()) is not None else []
        return [sys.executable, str(HERE / self.script), *(word.replace("SCRATCH", str(scratch)) for word in words)]


SMALL = ("--shape", "0.1 GB", "--rounds", "1", "--scratch", "SCRATCH")
BENCHMARKS = (
    Benchmark("startup", 1, "startup.py"),
    Benchmark("scale-written", 55, "scale.py", ("written", "--scratch", "SCRATCH"),
              ("written", "--shape", "0.1 GB", "--rounds", "0", "--scratch", "SCRATCH"), (LLAMA,), disk=45),
    Benchmark("scale-quantised", 80, "scale.py", ("quantised", "--scratch", "SCRATCH"),
              ("quantised", "--shape", "0.1 GB", "--rounds", "0", "--scratch", "SCRATCH"),
              (LLAMA,), {"--quantise": QUANTISE}, disk=45),
    Benchmark("scale-large", 10, "scale.py", ("large", "--scratch", "SCRATCH"),
              ("large", "--large-shards", "1", "--large-layers", "1", "--scratch", "SCRATCH"), (LLAMA,), disk=30,
              quick_disk=12),
    Benchmark("hf-bake", 2, "hf_bake.py", ("--scratch", "SCRATCH"), SMALL, disk=10),
    Benchmark("adapter-merge", 2, "adapter_merge.py", ("--scratch", "SCRATCH"), SMALL, disk=12),
    Benchmark("moe-bake", 6, "moe_bake.py", ("--scratch", "SCRATCH"),
              ("--layers", "1", "--rounds", "0", "--scratch", "SCRATCH"), (LLAMA,), disk=30, quick_disk=12),
    Benchmark("quantised-sources", 3, "quantised_sources.py", ("--scratch", "SCRATCH"), SMALL[2:]),
    Benchmark("gguf-bake", 6, "gguf_bake.py", ("--scratch", "SCRATCH"), SMALL, (LLAMA,), {"--baseline": CONVERTER},
              disk=12),
    Benchmark("gguf-baseline", 5, "gguf_baseline.py", ("--baseline", CONVERTER), None, (CONVERTER, LLAMA, FACTORS)),
    Benchmark("onnx-baseline", 45, "onnx_baseline.py", ("--genai", GENAI, "--optimum", OPTIMUM, "--scratch", "SCRATCH"),
              ("--genai", GENAI, "--optimum", OPTIMUM, "--only", "llama 256", "--size", "0.1 GB", "--rounds", "1"),
              (GENAI, OPTIMUM), disk=12),
    Benchmark("onnx-speed", 9, "onnx_speed.py", ("--genai", GENAI),
              ("--genai", GENAI, "--types", "int4", "--layers", "2", "--pairs", "2", "--tokens", "8"), (GENAI,)),
    Benchmark("onnx-experts", 1, "onnx_experts.py", ("--scratch", "SCRATCH"), ("--pairs", "2", "--scratch", "SCRATCH")),
    Benchmark("onnx-quantised", 5, "onnx_quantised.py", ("demo", "--name", "embedded model"),
              ("demo", "--name", "embedded model", "--dtype", "int4", "--lengths", "512", "--no-mistakes"), (TORCH,)),
    Benchmark("onnx-runs", 10, "onnx_runs.py", (), ("--lengths", "2048", "--trials", "2"), (TORCH,)),
    Benchmark("angles", 1, "angles.py", (), None, (TORCH, LLAMA),
              {"--genai": GENAI, "--mlx": MLX, "--vllm": VLLM}),
    Benchmark("decode-speed", 2, "decode_speed.py", (), ("--pairs", "3", "--tokens", "32"), (TORCH,)),
    Benchmark("verify-profile", 20, "verify_profile.py", ("--large",), ("--rounds", "1"), (TORCH, LLAMA),
              {"--smollm2": SMOLLM2}, disk=8),
    Benchmark("llama-cpp-runs", 20, "llama_cpp_runs.py", (),
              ("--types", "q8_0", "--only", "passkey", "--passkey", "6144", "--trials", "1"), (LLAMA, TORCH)),
    Benchmark("published-configs", 30, "published_configs.py", (str(HERE / "factors"), FACTORS),
              (str(HERE / "factors"),), (LLAMA, TORCH, FACTORS)),
    Benchmark("search-offline", 12, "search_offline.py", ("--journal", JOURNAL),
              ("--journal", JOURNAL, "--seeds", "1"),
              (JOURNAL,)),
    Benchmark("search-evaluator", 5, "search_evaluator.py", (SMOLLM2, "--name", "smollm2-gpu"), None,
              (GPU, SMOLLM2)),
    Benchmark("tuning-step", 10, "tuning_step.py", (SMOLLM2, "--name", "smollm2-gpu"), None, (GPU, SMOLLM2)),
)  # fmt: skip

# The rows of README.md: what starts with these words, against that peer.
HEADLINES: tuple[tuple[str, str], ...] = (
    ("GGUF bf16, 14 GB", "a copy"),
    ("GGUF q4_k_m, 14 GB", "llama-quantize"),
    ("HF with an adapter, 14 GB", "a copy"),
    ("GGUF bf16, 2.8 GB", "llama.cpp's converter"),
    ("GGUF files that pass verify", "llama.cpp's converter"),
    ("angle at 2097151, lrconvert, modeling_longrope.py", "transformers"),
    ("ONNX int4 on a CPU: write after 512", "genai builder"),
    ("verify, SmolLM2-135M, Q4_1 GGUF, full", ""),
    ("verify, 1 B, q4_k_m GGUF, quick", ""),
)


@dataclass
class Ran:
    """What came of one benchmark: its figures, or why there are none."""

    name: str
    figures: list[Figure]
    seconds: float = 0.0
    note: str = ""
    peers: dict[str, dict[str, str]] = field(default_factory=dict)  # versions, by environment

    @property
    def failed(self) -> bool:
        return self.note.startswith("failed")


def ran(benchmark: Benchmark, scratch: Path, *, quick: bool) -> Ran:
    """Run a script in a process of its own, and read its figures."""
    if lacking := benchmark.absent(scratch, quick=quick):
        return Ran(benchmark.name, [], note=f"not run: needs {', '.join(lacking)}")
    peers = benchmark.peers_absent()
    work, figures = scratch / benchmark.name, scratch / f"{benchmark.name}.figures"
    for made in (work / "scratch", work / "results"):
        made.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, FIGURES_FILE: str(figures)}
    if quick or peers:
        environment[RESULTS_FOLDER] = str(work / "results")
    started = time.perf_counter()
    command = benchmark.command(quick=quick, scratch=work / "scratch")
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(work)
    lines = figures.read_text().splitlines() if figures.exists() else []
    found = [Figure(**json.loads(line)) for line in lines]
    if quick:  # limits are those of the whole shapes
        found = [replace(figure, limit=None) for figure in found]
    notes = [f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"] if done.returncode else []
    notes += [f"without {', '.join(peers)}"] if peers else []
    versions = {} if done.returncode else benchmark.peers()
    return Ran(benchmark.name, found, round(seconds, 1), "; ".join(notes), versions)


# --- the table -------------------------------------------------------------------------------------------


def shown(value: float, unit: str) -> str:
    digits = f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{digits} {unit}".strip()


def cells(figure: Figure) -> list[str]:
    theirs = "" if figure.theirs is None else shown(figure.theirs, figure.unit)
    ratio = "" if figure.ratio is None else f"{figure.ratio:.3g}x"
    sign, factor = ("≥" if figure.least else "≤"), ("" if figure.theirs is None else "x")
    limit = "" if figure.limit is None else f"{sign} {figure.limit:.3g}{factor}{', missed' if figure.missed else ''}"
    memory = "" if figure.memory_mb is None else f"{figure.memory_mb:,.0f}"
    return [figure.what, shown(figure.ours, figure.unit), figure.peer, theirs, ratio, limit, memory]


LEAD = (
    "Speed, memory and correctness, beside another tool in the same run where one is named "
    "([benchmarks](benchmarks/README.md)):"
)
HEAD = ("what", "ours", "peer", "peer's", "ratio", "limit", "MB")
ALIGNED = ("---", "---:", "---", "---:", "---:", "---", "---:")


def table(results: Sequence[Ran]) -> Iterator[str]:
    """All figures of a run, a line each; benchmarks without figures say why."""
    for row in (("benchmark", *HEAD), ("---", *ALIGNED)):
        yield f"| {' | '.join(row)} |"
    for result in results:
        for figure in result.figures:
            yield f"| {' | '.join([result.name, *cells(figure)])} |"
        if result.note:
            yield f"| {result.name} | {result.note} |{' |' * (len(HEAD) - 1)}"


def saved(results: Sequence[Ran], path: Path) -> None:
    """Keep what has figures and didn't fail, each with its own facts, in the order of `BENCHMARKS`."""
    kept = {row["name"]: row for row in _record(path)}
    kept |= {result.name: {**asdict(result), **facts()} for result in results if result.figures and not result.failed}
    order = [benchmark.name for benchmark in BENCHMARKS]
    rows = sorted(kept.values(), key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
    path.write_text(json.dumps(rows, indent=1) + "\n")


def _record(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def block(record: Sequence[dict[str, Any]]) -> str:
    """The lines of README.md, from the rows of results/run.json."""
    figures = [Figure(**figure) for row in record for figure in row["figures"]]
    lines = [LEAD, "", f"| {' | '.join(HEAD)} |", f"|{'|'.join(ALIGNED)}|"]
    for what, peer in HEADLINES:
        found = [one for one in figures if one.what.startswith(what) and one.peer.startswith(peer)]
        lines += [f"| {' | '.join(cells(one))} |" for one in found[:1]]
    dates = sorted({row["date"] for row in record})
    machine = record[0]["machine"]
    lines += ["", f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, {machine['cores']} cores, "
              f"{machine['memory_gib']} GiB; `python benchmarks/run.py`, "
              "[all figures, with the versions of lrconvert and its libraries]"
              "(benchmarks/results/run.json)."]  # fmt: skip
    return "\n".join([BEGIN, *lines, END])


def with_block(readme: str, made: str) -> str:
    """The README with its table replaced. Raises `ValueError` where it has no place for one."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no {BEGIN} … {END}")
    return before + made + after


def write_readme(*, check: bool) -> int:
    now = README.read_text(encoding="utf-8")
    record = _record(SAVED)
    made = block(record) if record else f"{BEGIN}\n{END}"
    new = with_block(now, made)
    if check and now != new:
        print("README.md: its table isn't that of results/run.json; python benchmarks/run.py --readme", file=sys.stderr)
        return 1
    if not check:
        README.write_text(new, encoding="utf-8")
    return 0


# --- the command -----------------------------------------------------------------------------------------


def listed(benchmarks: Sequence[Benchmark], scratch: Path) -> Iterator[str]:
    for benchmark in benchmarks:
        lacking = benchmark.absent(scratch, quick=False)
        state = f"needs {', '.join(lacking)}" if lacking else "runs"
        if not lacking and (peers := benchmark.peers_absent()):
            state += f" without {', '.join(peers)}"
        words = [argument.what if isinstance(argument, Need) else argument for argument in benchmark.arguments]
        options = " ".join(word for word in words if "/" not in word)
        yield f"{benchmark.name:<18} {benchmark.minutes:>3g} min  {benchmark.script} {options}  [{state}]"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--list", action="store_true", help="what there is, what it needs, how long it takes")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round: whether everything works")
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the table there too")
    parser.add_argument("--readme", action="store_true", help="write README.md's table from what was kept")
    parser.add_argument("--check", action="store_true", help="with --readme: only say whether it is up to date")
    asked = parser.parse_args(arguments)
    if asked.readme:
        return write_readme(check=asked.check)
    chosen = [benchmark for benchmark in BENCHMARKS if not asked.only or benchmark.name in asked.only]
    if asked.list:
        print("\n".join(listed(chosen, asked.scratch or Path(tempfile.gettempdir()))))
        return 0
    results = []
    with scratch_folder(asked.scratch) as place, tempfile.TemporaryDirectory(dir=place) as scratch:
        for benchmark in chosen:
            print(f"{benchmark.name} …", file=sys.stderr, flush=True)
            results.append(ran(benchmark, Path(scratch), quick=asked.quick))
            for path in [*([asked.json] if asked.json else []), *([] if asked.quick else [SAVED])]:
                saved(results[-1:], path)  # at once: hours of a run that is stopped are not lost
    print("\n".join(table(results)))
    if any(result.failed for result in results):
        return 1
    # Asked for by name and too large: no error, and not what was asked for.
    return EnvironmentFailure.exit_code if asked.only and not any(result.figures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
