# SPDX-License-Identifier: Apache-2.0
"""Keeps what the GPU tests reported: one JSON with every case, one table to read.

    LRCONVERT_GPU_REPORT=report.json python -m pytest -o addopts= -m gpu tests/gpu/test_parity.py
    python benchmarks/gpu_parity.py report.json [more.json …]

and for GGUF files in llama.cpp (tests/gpu/test_llama_cpp.py) with `--gguf`, for ONNX folders (tests/gpu/test_onnx.py)
with `--onnx`.

Reports of one set of runs are merged; where two hold the same name the later one counts.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from _common import RESULTS

KEPT = ("code", "case", "length", "verdict", "kl_mean", "kl_max", "top1", "bound", "reason")
# By option: the result's name, the test, and what of a runtime's facts is a version.
KINDS = {
    "": ("gpu-parity", "test_parity", ("transformers", "torch")),
    "--gguf": ("gguf-gpu-parity", "test_llama_cpp", ("llama.cpp",)),
    "--onnx": ("onnx-gpu-parity", "test_onnx", ("onnxruntime",)),
}
COMMAND = "LRCONVERT_GPU_REPORT=report.json python -m pytest -o addopts= -m gpu tests/gpu/{}.py"


def main() -> None:
    merged: dict[str, Any] = {}
    paths = [argument for argument in sys.argv[1:] if argument not in KINDS]
    name, test, about = KINDS[next((argument for argument in sys.argv if argument in KINDS), "")]
    command = COMMAND.format(test)
    for path in paths:
        merged |= json.loads(Path(path).read_text())
    runtime = next(info for report in merged.values() for info in report["runtimes"].values())
    result = {
        "date": date.today().isoformat(),
        "command": command,
        "device": runtime["device"],
        "versions": {key: runtime[key] for key in about},
        "reports": {
            case: {
                "passed": report["passed"],
                "rows": [{key: row[key] for key in KEPT if key in row} for row in report["rows"] if "kl_mean" in row],
            }
            for case, report in sorted(merged.items())
        },
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    lines = [
        f"Parity on {result['device']}, {result['date']}, {versions}.",
        f"Command: `{command}`. KL in nats against the reference in float32 with float64 angles.",
        "",
        "| artifact | code | case | tokens | KL mean | KL max | bound | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, report in result["reports"].items():
        if case.startswith("mutant"):
            continue
        for row in report["rows"]:
            bound = f"{row['bound']:.0e}" if "bound" in row else ""
            cells = (row["code"], row["case"], row.get("length", ""), f"{row['kl_mean']:.1e}", f"{row['kl_max']:.1e}")
            lines.append(f"| {case} | {' | '.join(map(str, cells))} | {bound} | {row['verdict']} |")
    lines += [
        "",
        "Mutants, each caught:",
        "",
        "| mutant | failing cases | largest mean KL |",
        "|---|---|---|",
    ]
    for case, report in result["reports"].items():
        failed = [row for row in report["rows"] if row["verdict"] == "fail"]
        if case.startswith("mutant"):
            worst = max((row["kl_mean"] for row in failed), default=0.0)
            lines.append(f"| {case.removeprefix('mutant ')} | {len(failed)} | {worst:.1e} |")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
