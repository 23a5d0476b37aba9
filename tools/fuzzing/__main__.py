# SPDX-License-Identifier: Apache-2.0
"""`tools/fuzz`: see CONTRIBUTING.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

# Nobody's token, nobody's cache, no network.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent/home", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
os.environ.pop("HF_TOKEN", None)

from fuzzing.hunting import Hunt, hunt, warm
from fuzzing.limits import MEMORY, SECONDS
from fuzzing.readers import READERS, make_world

WITH = ("numpy", "safetensors", "tokenizers", "pydantic", "gguf", "onnx", "huggingface_hub")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/fuzz", description="Damaged input for every reader. Exit code 1: findings."
    )
    parser.add_argument("--inputs", type=int, default=10_000, help="in all, spread over the readers (default 10,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--input", type=int, help="this input alone, with its traceback")
    parser.add_argument("--json", type=Path, help="also write what was found there")
    options = parser.parse_args()
    names = options.reader or list(READERS)
    each = -(-options.inputs // len(names))
    numbers = range(each) if options.input is None else range(options.input, options.input + 1)
    # The pages that a read-only file system in memory costs are fewer than a disk's.
    shared = Path("/dev/shm")
    os.sync = os.fsync = lambda *handle: None  # type: ignore[assignment]  # no file here has to outlive the machine
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as root:
        healthy = make_world(Path(root) / "world")
        if refused := [line for name in names for line in warm(READERS[name], healthy)]:
            print("healthy files were refused:\n  " + "\n  ".join(refused), file=sys.stderr)
            return 2
        found = _all(names, healthy, numbers, options.seed, options.jobs)
    _tell(found, verbose=options.input is not None)
    if options.json is not None:
        options.json.write_text(json.dumps(_record(found, options.seed), indent=1) + "\n")
    return 1 if any(hunt.findings for hunt in found) else 0


def _all(names: list[str], healthy: Path, numbers: range, seed: int, jobs: int) -> list[Hunt]:
    if jobs == 1:
        return [_said(hunt(READERS[name], healthy, numbers, seed=seed)) for name in names]
    parts = [range(start, min(start + 1000, numbers.stop)) for start in range(numbers.start, numbers.stop, 1000)]
    found = {name: Hunt(name) for name in names}
    with ProcessPoolExecutor(jobs) as pool:
        tasks = [pool.submit(_hunt, name, healthy, part, seed) for name in names for part in parts]
        for task in tasks:
            part = task.result()
            whole = found[part.reader]
            whole.outcomes += part.outcomes
            whole.findings += part.findings
            whole.seconds += part.seconds
    return [_said(each) for each in found.values()]


def _hunt(name: str, healthy: Path, numbers: range, seed: int) -> Hunt:
    return hunt(READERS[name], healthy, numbers, seed=seed)


def _said(found: Hunt) -> Hunt:
    outcomes = ", ".join(f"{outcome} {count}" for outcome, count in sorted(found.outcomes.items()))
    print(f"{found.reader:<12} {found.inputs:>7} inputs  {found.seconds:6.0f} s  {outcomes}", flush=True)
    for finding in found.findings[:3]:
        print(f"    --input {finding.number}: {finding.kind}: {finding.where}", flush=True)
    return found


def _tell(found: list[Hunt], *, verbose: bool) -> None:
    seen = Counter(finding.key for hunt in found for finding in hunt.findings)
    first = {finding.key: finding for hunt in found for finding in reversed(hunt.findings)}
    for key, finding in first.items():
        print(f"\n{finding.kind}: {finding.where}  ({seen[key]} times)")
        print(f"  --reader {finding.reader} --input {finding.number}: {finding.file}, {finding.call}")
        if verbose or finding.detail:
            print("  " + "\n  ".join(finding.detail.splitlines()[-40 if verbose else -3 :]))


def _record(found: list[Hunt], seed: int) -> dict[str, object]:
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["tools/fuzz", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in WITH},
        "limits": {"seconds": SECONDS, "bytes": MEMORY},
        "seed": seed,
        "inputs": sum(hunt.inputs for hunt in found),
        "readers": {
            hunt.reader: {"seconds": round(hunt.seconds), **dict(sorted(hunt.outcomes.items()))} for hunt in found
        },
        "findings": [vars(finding) for hunt in found for finding in hunt.findings],
    }


if __name__ == "__main__":
    sys.exit(main())
