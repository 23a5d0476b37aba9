# SPDX-License-Identifier: Apache-2.0
"""Where the CPU's time goes on every path, by library, as one picture: docs/profiles.svg.

    python benchmarks/profiles.py [--shape "2.8 GB"] [--only PATH …] [--genai PYTHON] [--scratch DIR]
    python benchmarks/profiles.py --token [--genai PYTHON]
    python benchmarks/profiles.py --draw

Linux's `perf` samples each command with its threads and children, native code too; a library stands for what it does
here. The last path is one token in ONNX Runtime, by operator, from its own profiler; with genai's builder (PYTHON, see
onnx_speed.py) its operators are counted beside ours. Shares hold on a busy machine, seconds don't, so there are none.
`--token` measures that path alone and keeps the rest of results/profiles.json; `--draw` makes the picture of it again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import onnx_speed
import onnxruntime
from _common import RESULTS, SHAPES, facts, installed, lrconvert, run, save, scratch_folder
from onnx_speed import OURS
from scale import CONVERSIONS, REBAKE, Bench, remove

NAME, PICTURE = "profiles", Path(__file__).parents[1] / "docs" / "profiles.svg"
# A library's name to what it does on these paths, the first that fits.
LIBRARIES = {
    r"libcrypto": "sha256",
    r"kernel": "kernel: reading, writing, memory",
    r"xllamacpp|libggml|libllama": "llama.cpp",
    r"onnxruntime": "ONNX Runtime",
    r"torch|libc10|libgomp": "PyTorch",
    r"ml_dtypes": "casts (ml_dtypes)",
    r"openblas": "products (OpenBLAS)",
    r"multiarray|umath": "NumPy",
    r"python": "Python",
}
OPERATORS = {
    "MatMulNBits": "quantised products",
    "GroupQueryAttention": "attention",
    "RotaryEmbedding": "rotation",
    "SkipSimplifiedLayerNormalization": "norms",
    "RMSNormalization": "norms",
    "Split": "split q, k, v",
}
OTHER = "everything else"
TOKEN = "ONNX int4, one token"
SHOWN = 0.02  # of a path; less is in `OTHER`
COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#8a8a8a",
    "#1f5f8b", "#c05e00", "#2f7d32", "#a83232", "#3f8f89",
)  # fmt: skip


def sampled(command: Sequence[str | Path], scratch: Path) -> dict[str, float]:
    """Shares of the CPU time of a command and its children, by what libraries do."""
    data = scratch / "perf.data"
    record = ["perf", "record", "-q", "-F", "199", "-o", data, *command]
    subprocess.run(list(map(str, record)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    listed = ["perf", "report", "-i", data, "--sort", "dso", "--stdio", "-F", "overhead,dso"]
    told = subprocess.run(list(map(str, listed)), check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = defaultdict(float)
    for share, library in re.findall(r"^\s+([\d.]+)%\s+(\S+)", told, re.MULTILINE):
        what = next((what for pattern, what in LIBRARIES.items() if re.search(pattern, library)), OTHER)
        found[what] += float(share) / 100
    data.unlink()
    return shares(found)


def shares(found: Mapping[str, float]) -> dict[str, float]:
    """Of one, the largest first; what is too small to see together at the end."""
    total = sum(found.values())
    parts = sorted(((value / total, what) for what, value in found.items()), reverse=True)
    shown = {what: round(part, 3) for part, what in parts if part >= SHOWN and what != OTHER}
    return {**shown, OTHER: round(1 - sum(shown.values()), 3)}


def conversions(scratch: Path, shape: str, only: Sequence[str] | None) -> dict[str, dict[str, float]]:
    bench, found = Bench(scratch / "disk", shape), {}
    for conversion in CONVERSIONS:
        if only and conversion.name not in only:
            continue
        if conversion.name == REBAKE:
            bench.keep_bf16()
        command, output = bench.command(conversion)
        found[conversion.name] = sampled(command, scratch)
        remove(output)
    shutil.rmtree(bench.folder)
    return found


def verifications(scratch: Path) -> dict[str, dict[str, float]]:
    """Of the embedded model as a folder and as a q8_0 GGUF, in full."""
    folder, file, recipe = scratch / "folder", scratch / "demo.gguf", scratch / "recipe"
    derived = ("--method", "yarn", "--factor", "8", "--uniform", "-o", recipe, "--force")
    run(lrconvert("recipe", "derive", "demo", *derived))
    run(lrconvert("hf", "demo", "--recipe", recipe, "-o", folder, "--force"))
    run(lrconvert("gguf", "demo", "--recipe", recipe, "--type", "q8_0", "-o", file, "--force"))
    artifacts = {"verify, folder": folder, "verify, q8_0 GGUF": file}
    return {name: sampled(lrconvert("verify", artifact), scratch) for name, artifact in artifacts.items()}


def token(scratch: Path) -> dict[str, float]:
    """One token after 512, the shares of all operators by the names that ONNX Runtime gives them. A fifth of the runs
    are faster than what counts."""
    found: dict[str, float] = defaultdict(float)
    for (_, kind), taken in kernels(scratch, layers=12, runs=200)[OURS].items():
        found[kind] += float(np.percentile(taken, 20))
    total = sum(found.values())
    return {kind: round(value / total, 4) for kind, value in sorted(found.items(), key=lambda item: -item[1])}


def by_purpose(operators: Mapping[str, float]) -> dict[str, float]:
    """Shares of a token by what its operators do."""
    found: dict[str, float] = defaultdict(float)
    for kind, share in operators.items():
        found[OPERATORS.get(kind, OTHER)] += share
    return shares(found)


def operators(scratch: Path, genai: Path | None) -> dict[str, dict[str, Any]]:
    """How many operators ONNX Runtime runs for a token, after it has joined some: in every layer, and once. Ours, and
    the builder's where its interpreter is given."""
    few, more = (
        {name: Counter(kind for _, kind in times) for name, times in kernels(scratch, layers, 1, genai).items()}
        for layers in (2, 3)
    )
    found = {}
    for name in few:
        layer = more[name] - few[name]
        found[name] = {
            "a layer": layer.total(),
            "once": few[name].total() - 2 * layer.total(),
            "of a layer": dict(layer),
        }
    return found


def kernels(
    scratch: Path, layers: int, runs: int, genai: Path | None = None
) -> dict[str, dict[tuple[str, str], list[float]]]:
    """By graph, the microseconds of its kernels (a node's name and operator) in each of `runs` tokens after 512."""
    source = onnx_speed.write_model(scratch / f"model-{layers}", layers)
    found = {}
    for name, path in onnx_speed.exported("int4", source, scratch, genai).items():
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(scratch / "ort")
        graph = onnx_speed.Graph(path, 1024, 1, options=options)
        for _ in range(runs):
            graph.seconds(np.array([10]), 512)
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in json.loads(Path(graph.session.end_profiling()).read_text()):
            if event["name"].endswith("_kernel_time"):
                times[event["name"], event["args"]["op_name"]].append(event["dur"])
        found[name] = times
    return found


# --- the picture -----------------------------------------------------------------------------------------


def drawn(paths: Mapping[str, Mapping[str, float]]) -> str:
    """A bar for each path, its parts in one colour a thing, and their names below."""
    left, wide, row, top = 190, 620, 30, 10
    things = sorted({what for parts in paths.values() for what in parts} - {OTHER})
    colours = dict(zip(things, COLOURS, strict=False)) | {OTHER: "#d5d5d5"}
    body = []
    for number, (path, parts) in enumerate(paths.items()):
        y, x = top + number * row, float(left)
        body.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(path)}</text>')
        for what, part in parts.items():
            title = f"<title>{escape(path)}: {escape(what)} {part:.0%}</title>"
            place = f'x="{x:.1f}" y="{y}" width="{part * wide:.1f}" height="22"'
            body.append(f'<rect {place} fill="{colours[what]}">{title}</rect>')
            if part >= 0.07:
                middle = f'x="{x + part * wide / 2:.1f}" y="{y + 15}"'
                body.append(f'<text {middle} text-anchor="middle" fill="#111">{part:.0%}</text>')
            x += part * wide
    under = top + len(paths) * row + 12
    for number, what in enumerate((*things, OTHER)):
        x, y = 20 + number % 3 * 265, under + number // 3 * 20
        body.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colours[what]}"/>')
        body.append(f'<text x="{x + 18}" y="{y + 11}">{escape(what)}</text>')
    height = under + (len(things) // 3 + 1) * 20 + 8
    size = f'width="{left + wide + 10}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *body, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="2.8 GB", help="of the checkpoint to convert")
    parser.add_argument("--only", nargs="+", metavar="PATH", help="conversions; nothing is kept then")
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--draw", action="store_true", help="only the picture, of the last result")
    parser.add_argument("--token", action="store_true", help="only the path of one token; the others are kept")
    parser.add_argument("--genai", type=Path, help="an interpreter with onnxruntime-genai and transformers 5")
    asked = parser.parse_args()
    if not asked.draw:
        if not asked.token and shutil.which("perf") is None:
            sys.exit("perf is needed: the package linux-perf or linux-tools")
        with scratch_folder(asked.scratch) as scratch:
            kept: dict[str, Any] = {"shape": asked.shape}
            if asked.token:
                kept = json.loads((RESULTS / f"{NAME}.json").read_text())
            else:
                kept["paths"] = conversions(scratch, asked.shape, asked.only)
                if asked.only:
                    print(json.dumps(kept["paths"], indent=1))
                    return
                kept["paths"] |= verifications(scratch)
            alone = token(scratch)
            kept["paths"][TOKEN] = by_purpose(alone)
            peers = {} if asked.genai is None else {"peers": {onnx_speed.THEIRS: installed(asked.genai)}}
            kept["token"] = {**facts(), **peers, "shares": alone, "operators": operators(scratch, asked.genai)}
        save(NAME, kept)
    PICTURE.write_text(drawn(json.loads((RESULTS / f"{NAME}.json").read_text())["paths"]), encoding="utf-8")


if __name__ == "__main__":
    main()
