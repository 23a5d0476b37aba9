# SPDX-License-Identifier: Apache-2.0
"""`lrconvert hf` on quantised checkpoints of 1.1 GB in bf16 against a plain copy of what it writes, in turns.

    python benchmarks/quantised_sources.py [--scratch DIR] [--rounds N]

fp8 in blocks of 128 x 128, and GPTQ in 4 bits with an order of its own (the layout whose rows lie side by side), in one
file each. Also the peak memory at half as many layers: it must not grow with the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from _common import RESULTS, Figure, copy_with_fsync, lrconvert, median, report, run, save, scratch_folder
from safetensors.numpy import save_file

from lrconvert.families import expected_tensors, get_family, read_shape

RSS_ALLOWED_MB, LAYERS, GROUP = 400, 8, 128
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
Parts = dict[str, np.ndarray[Any, Any]]


def fp8_parts(rng: np.random.Generator, rows: int, columns: int) -> Parts:
    codes = rng.integers(0, 0x70, (rows, columns), np.uint8) | rng.integers(0, 2, (rows, columns), np.uint8) << 7
    scales = rng.uniform(1e-4, 3e-4, (rows // 128, columns // 128)).astype(np.float32)
    return {"weight": codes.view(ml_dtypes.float8_e4m3fn), "weight_scale_inv": scales}


def gptq_parts(rng: np.random.Generator, rows: int, columns: int) -> Parts:
    groups = columns // GROUP
    return {
        "qweight": rng.integers(-(2**31), 2**31, (columns // 8, rows), np.int32),
        "qzeros": np.full((groups, rows // 8), 0x77777777, np.int32),
        "scales": rng.uniform(1e-3, 5e-3, (groups, rows)).astype(np.float16),
        "g_idx": rng.permutation(np.arange(columns) // GROUP).astype(np.int32),
    }


FORMATS: dict[str, tuple[dict[str, Any], Callable[..., Parts]]] = {
    "fp8-block": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8_parts),
    "gptq-4": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": True}, gptq_parts),
}


def write_quantised(folder: Path, name: str, layers: int) -> Path:
    """A random Llama in that format; embedding, head and norms in bf16."""
    section, make = FORMATS[name]
    config, rng = {**CONFIG, "num_hidden_layers": layers}, np.random.default_rng(0)
    family, stored = get_family("llama"), {}
    for tensor in expected_tensors(family, read_shape(config, family)):
        module = tensor.name.removesuffix(".weight")
        if module.endswith("_proj"):
            stored |= {f"{module}.{part}": values for part, values in make(rng, *tensor.shape).items()}
        elif tensor.required:
            stored[tensor.name] = rng.standard_normal(tensor.shape, np.float32).astype(ml_dtypes.bfloat16)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return folder


def measured(scratch: Path, name: str, rounds: int) -> dict[str, Any]:
    """A format's rows: conversions and copies in turns, and the peak at half the layers."""
    source, artifact, recipe = scratch / "source", scratch / "artifact", scratch / "recipe"
    write_quantised(source, name, LAYERS // 2)
    run(lrconvert("recipe", "derive", source, "--method", "yarn", "--factor", "8", "-o", recipe, "--force"))
    half = run(lrconvert("hf", source, "--recipe", recipe, "-o", artifact, "--force"))
    write_quantised(source, name, LAYERS)
    bakes, copies = [], []
    for index in range(rounds + 1):  # the first round warms the page cache and does not count
        shutil.rmtree(artifact, ignore_errors=True)
        bake = run(lrconvert("hf", source, "--recipe", recipe, "-o", artifact))
        copy = copy_with_fsync(artifact, scratch / "copy")
        shutil.rmtree(scratch / "copy")
        if index:
            bakes.append(bake)
            copies.append(copy)
    written = sum(path.stat().st_size for path in artifact.iterdir())
    stored = sum(path.stat().st_size for path in source.iterdir())
    return {
        "stored_mb": round(stored / 1e6),
        "written_mb": round(written / 1e6),
        "seconds": [round(bake.wall, 2) for bake in bakes],
        "cpu_seconds": [round(bake.cpu, 2) for bake in bakes],
        "copy_seconds": [round(copy, 2) for copy in copies],
        "ratio_median": round(median([bake.wall for bake in bakes]) / median(copies), 3),
        "peak_rss_mb": round(max(bake.rss for bake in bakes) / 1e6, 1),
        "peak_rss_mb_half_the_layers": round(half.rss / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with scratch_folder(arguments.scratch) as scratch:
        numbers = {name: measured(scratch, name, arguments.rounds) for name in FORMATS}
    for name, values in numbers.items():
        ours, copied = median(values["seconds"]), median(values["copy_seconds"])
        report(Figure(f"HF folder from {name}, 1.1 GB", ours, "s", "a copy", copied, memory_mb=values["peak_rss_mb"]))
    save("quantised-sources", {**numbers, "peak_rss_mb_allowed": RSS_ALLOWED_MB})
    result = json.loads((RESULTS / "quantised-sources.json").read_text())
    about = [", ".join(json.dumps(result[key]).strip('"') for key in ("date", "command", "versions", "machine"))]
    rows = [f"| {' | '.join(['what', *FORMATS])} |", f"|{'---|' * (len(FORMATS) + 1)}"]
    rows += [f"| {key} | {' | '.join(str(numbers[name][key]) for name in FORMATS)} |" for key in numbers["fp8-block"]]
    (RESULTS / "quantised-sources.md").write_text("\n".join([*about, "", *rows, ""]))


if __name__ == "__main__":
    main()
