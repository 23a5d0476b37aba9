# SPDX-License-Identifier: Apache-2.0
"""`lrconvert hf --adapter` on a sharded checkpoint (2.8 GB) against a plain copy with fsync, in turns.

    python benchmarks/adapter_merge.py [--scratch DIR] [--shape SHAPE] [--rounds N]

The adapter has a pair of rank 16 on every linear layer of every block, so every shard is written anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from _common import (
    RESULTS,
    Figure,
    copy_with_fsync,
    in_scratch,
    lrconvert,
    median,
    report,
    run,
    save,
    write_checkpoint,
)
from safetensors.numpy import save_file

from lrconvert.checkpoint import open_model

RATIO_ALLOWED, RSS_ALLOWED_MB, RANK = 1.3, 700, 16


def write_adapter(folder: Path, source: Path) -> Path:
    """A random LoRA in PEFT layout for all linear layers of a checkpoint."""
    rng = np.random.default_rng(0)
    tensors = {}
    for tensor in open_model(source).roles.values():
        if tensor.layer is not None and len(tensor.shape) == 2:
            module = "base_model.model." + tensor.name.removesuffix(".weight")
            rows, columns = tensor.shape
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((RANK, columns), np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, RANK), np.float32) * np.float32(1e-3)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def measure(scratch: Path, shape: str, rounds: int) -> None:
    source = write_checkpoint(scratch / "source", shape)
    adapter = write_adapter(scratch / "adapter", source)
    recipe = scratch / "recipe"
    run(lrconvert("recipe", "derive", source, "--method", "yarn", "--factor", "8", "-o", recipe, "--force"))
    merges, copies = [], []
    for index in range(rounds + 1):  # the first round warms the page cache and does not count
        shutil.rmtree(scratch / "artifact", ignore_errors=True)
        merge = run(lrconvert("hf", source, "--recipe", recipe, "--adapter", adapter, "-o", scratch / "artifact"))
        shutil.rmtree(scratch / "artifact")
        copy = copy_with_fsync(source, scratch / "copy")
        shutil.rmtree(scratch / "copy")
        if index:
            merges.append(merge)
            copies.append(copy)
    ours, copied, peak = median([m.wall for m in merges]), median(copies), max(merge.rss for merge in merges) / 1e6
    report(Figure(f"HF folder with an adapter, {shape}", ours, "s", "a copy", copied, RATIO_ALLOWED, memory_mb=peak))
    numbers = {
        "merge_seconds": [round(merge.wall, 2) for merge in merges],
        "merge_cpu_seconds": [round(merge.cpu, 2) for merge in merges],
        "copy_seconds": [round(copy, 2) for copy in copies],
        "ratio_median": round(ours / copied, 3),
        "ratio_allowed": RATIO_ALLOWED,
        "peak_rss_mb": round(peak, 1),
        "peak_rss_mb_allowed": RSS_ALLOWED_MB,
    }
    save("adapter-merge", numbers)
    result = json.loads((RESULTS / "adapter-merge.json").read_text())
    lines = [
        f"| {key} | {value if not isinstance(value, dict) else json.dumps(value)} |" for key, value in result.items()
    ]
    (RESULTS / "adapter-merge.md").write_text("\n".join(["| what | value |", "| --- | --- |", *lines, ""]))


if __name__ == "__main__":
    in_scratch(measure, rounds=3)
