# SPDX-License-Identifier: Apache-2.0
"""Five other ways to ONNX beside `lrconvert onnx`, on the same longrope checkpoints; then what exporting 2.8 GB costs.

    python benchmarks/onnx_baseline.py --genai ENV/bin/python --optimum ENV/bin/python [--scratch DIR] [--rounds N]
        [--only TEXT] [--size SHAPE | --skip-size] [--large]

    python3 -m venv genai && genai/bin/pip install onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 \
        onnxscript==0.7.2 mobius-onnx==0.1.0 transformers==5.23.0 torch==2.13.0
    python3 -m venv optimum && optimum/bin/pip install optimum-onnx==0.1.0 torch==2.13.0

1. Small checkpoints with the heads of real models (128 channels in LLaMA2 and Mistral, whose keys serve four heads
   each; 96 in Phi-3), two layers, random float32 weights, q and k widened so that a wrong rotation shows. What each
   tool made of them runs in ONNX Runtime on the CPU and is held against the float64 reference: below, at and one past
   the original window, and above it.
2. A Llama of 2.8 GB in bf16, exported in f16: times in turns with a plain copy with fsync of the output, beside the
   tools that were right on every Llama of part 1. Memory is the largest sum of anonymous pages of a process and its
   children, read from /proc every few milliseconds: pages of mapped files don't count. `--large` adds our memory at
   14 GB (a sparse checkpoint, 14 GB of disk). `--skip-size` keeps the figures of an earlier run, which say when.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from _common import (
    RESULTS,
    SHAPES,
    Figure,
    copy_with_fsync,
    installed,
    lrconvert,
    median,
    report,
    save,
    scratch_folder,
    write_checkpoint,
    write_random,
)
from _exporters import Command, tools
from _memory import Cost, needed, watched
from _onnx_tables import ABOUT, COPY_ALLOWED, SPEEDUP_NEEDED, cost_table, is_right, missed, refusals, table

from lrconvert.checkpoint import Model, locate, open_model
from lrconvert.families import get_family
from lrconvert.parity.cases import stream
from lrconvert.parity.measures import compare
from lrconvert.recipe import Provenance, Recipe, write_recipe
from lrconvert.reference import FactorSet, Reference, Rotation
from lrconvert.rope import Tier, longrope_attention_factor, yarn_factors

WIDEN = 2.0  # q and k of fresh weights attend almost evenly, which hides rotations; 3 amplifies every rounding
RATIO = 8
COMPARED = 128  # last positions of every length

# No width of a layer equals the vocabulary: the builder of onnxruntime-genai would take it for lm_head.
COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "intermediate_size": 352,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128},
    # Without head_dim, transformers 4.57 fails on a Mistral with longrope.
    "mistral": {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128}
    | {"sliding_window": None},
    "phi3": {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 262144},
}


@dataclass(frozen=True)
class Case:
    """A checkpoint: its family, its original window, and an attention factor where the config states one."""

    family: str
    original: int
    attention: float | None = None

    @property
    def name(self) -> str:
        stated = "" if self.attention is None else f", attention_factor {self.attention}"
        return f"{self.family} {self.original}{stated}"

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.original - 1, self.original, self.original + 1, self.original * 3 // 2)


CASES = tuple(
    Case(family, original, attention)
    for original in (256, 4096)
    for family, attention in (("llama", None), ("llama", 1.25), ("mistral", None), ("phi3", None), ("phi3", 1.25))
)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def recipe_of(case: Case) -> Recipe:
    """Factors of the short set above 1 too, so that taking one set for the other, or none, shows at every length."""
    heads = MODELS[case.family]
    width = heads["hidden_size"] // heads["num_attention_heads"]
    attention = case.attention or longrope_attention_factor(RATIO, case.original)
    tiers = tuple(
        Tier(length, tuple(yarn_factors(width, 10000.0, ratio, case.original).tolist()), 0, attention)
        for length, ratio in ((case.original, 1.25), (case.original * RATIO, RATIO + 0.25))
    )
    return Recipe(
        schema_version=1,
        name=case.name,
        family=case.family,
        original_window=case.original,
        rope_theta=10000.0,
        rotary_dim=width,
        tiers=tiers,
        provenance=Provenance("published", source="benchmarks/onnx_baseline.py"),
    )


def write_small(folder: Path, case: Case, recipe: Recipe) -> Path:
    """A checkpoint whose config says longrope in the keys that each family's users write."""
    short, long = recipe.tiers
    scaling: dict[str, Any] = {"type": "longrope", "short_factor": short.factors, "long_factor": long.factors}
    if case.family != "phi3":
        scaling |= {"rope_type": "longrope", "factor": float(RATIO)}
        scaling["original_max_position_embeddings"] = case.original
    if case.attention is not None:
        scaling["attention_factor"] = case.attention
    family = get_family(case.family)
    config = {
        "model_type": case.family,
        "architectures": [family.hf_class],
        **COMMON,
        **MODELS[case.family],
        "max_position_embeddings": long.max_length,
        "original_max_position_embeddings": case.original,
        "rope_scaling": scaling,
    }
    write_random(folder, config, widen=WIDEN)
    copy_tokenizer(folder)
    return folder


def copy_tokenizer(folder: Path) -> None:
    """The embedded model's: 4096 tokens, nothing to be fetched."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(locate("demo") / name, folder)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def graph_in(folder: Path) -> Path:
    (found,) = folder.rglob("*.onnx")
    return found


# --- part 1: what the graphs compute --------------------------------------------------------------------------------


def answers(graph: Path, model: Model, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits of the last positions of every row, each read in one pass with an empty cache."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    empty = np.zeros((1, model.shape.kv_heads, 0, model.shape.head_dim), np.float32)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    made = []
    for row in rows:
        feed: dict[str, np.ndarray] = {}
        for value in session.get_inputs():
            if value.name == "input_ids":
                feed[value.name] = row[None]
            elif value.name == "attention_mask":
                feed[value.name] = np.ones((1, len(row)), np.int64)
            elif value.name == "position_ids":
                feed[value.name] = np.arange(len(row))[None]
            else:
                feed[value.name] = empty
        logits = session.run(["logits"], feed)[0]
        made.append(np.asarray(logits)[0, -COMPARED:].astype(np.float64))
    return made


def referred(model: Model, recipe: Recipe, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    sets = [FactorSet(tier.max_length, tier.factors, tier.start_tokens, tier.attention_factor) for tier in recipe.tiers]
    reference = Reference(model, Rotation(recipe.rope_theta, recipe.rotary_dim, sets))
    return [reference.logits(row, keep=np.arange(len(row) - COMPARED, len(row))) for row in rows]


def compared(case: Case, scratch: Path, baselines: dict[str, Command]) -> dict[str, dict[str, Any]]:
    """Every tool on one checkpoint: what it cost, and how far its answers are from the recipe's."""
    folder = scratch / case.name.replace(", ", "-").replace(" ", "-")
    recipe = recipe_of(case)
    source = write_small(folder / "model", case, recipe)
    written = write_recipe(recipe, folder / "recipe", force=True)
    rows = [np.asarray(stream(COMMON["vocab_size"], length), np.int64) for length in case.lengths]
    model = open_model(str(source), tolerant=True)
    expected = referred(model, recipe, rows)
    found = {}
    for name, command in {"lrconvert": ours(written), **baselines}.items():
        output = folder / name.replace(" ", "-")
        shutil.rmtree(output, ignore_errors=True)
        cost = watched(command(source, output, "f32"))
        found[name] = {"seconds": round(cost.wall, 2), "anonymous_mb": round(cost.anonymous / 1e6, 1)}
        if cost.failed is not None:
            found[name]["refuses"] = cost.failed
            continue
        graph = graph_in(output)
        divergences = [compare(*pair).kl_mean for pair in zip(expected, answers(graph, model, rows), strict=True)]
        found[name] |= {"mb": round(size(graph.parent) / 1e6, 2), "graph_kb": round(graph.stat().st_size / 1e3, 1)}
        found[name]["kl_mean"] = dict(zip(map(str, case.lengths), divergences, strict=True))
    shutil.rmtree(folder)
    return found


def ours(recipe: Path) -> Command:
    def command(source: Path, output: Path, dtype: str) -> list[str | Path]:
        return lrconvert("onnx", source, "--recipe", recipe, "--dtype", dtype, "-o", output)

    return command


def right_on_llama(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Baselines that were right on every Llama without a stated attention factor, which is what part 2 exports."""
    llamas = [found for name, found in results.items() if name.startswith("llama") and "attention" not in name]
    return [tool for tool in next(iter(results.values()))
            if tool != "lrconvert" and llamas and all(is_right(found[tool]) for found in llamas)]  # fmt: skip


# --- part 2: what exporting costs -----------------------------------------------------------------------------------


def rounds_of(shape: str, scratch: Path, baselines: dict[str, Command], rounds: int) -> dict[str, Any]:
    """Ours, a copy of what it wrote, and the baselines, in turns; the first round warms the page cache."""
    folder = scratch / shape.replace(" ", "-")
    source = write_checkpoint(folder / "source", shape)
    copy_tokenizer(source)
    recipe = folder / "recipe"
    derived = ("--method", "yarn", "--factor", str(RATIO), "--uniform", "-o", recipe, "--force")
    needed(lrconvert("recipe", "derive", source, *derived))
    longrope = with_longrope(source, recipe, folder / "longrope")
    kept, output, copy = folder / "kept", folder / "output", folder / "copy"
    export = ours(recipe)
    needed(export(source, kept, "f16"))
    costs: dict[str, list[Cost]] = {"lrconvert": [], **{name: [] for name in baselines}}
    copies: list[float] = []
    same = True
    for _ in range(rounds):
        # A virtual machine gets memory for its page cache slowly: a file written and removed lets all start alike.
        copy_with_fsync(kept / "onnx", copy)
        shutil.rmtree(copy)
        costs["lrconvert"].append(needed(export(source, output, "f16")))
        same = same and all(
            filecmp.cmp(path, output / "onnx" / path.name, shallow=False) for path in (kept / "onnx").iterdir()
        )
        shutil.rmtree(output)
        copies.append(copy_with_fsync(kept / "onnx", copy))
        shutil.rmtree(copy)
        for name, command in baselines.items():
            costs[name].append(needed(command(longrope, output, "f16")))
            shutil.rmtree(output)
            shutil.rmtree(folder / "cache", ignore_errors=True)
    found: dict[str, Any] = {
        "bytes": size(kept),
        "largest_tensor_mb": largest_mb(source),
        "same_bytes_again": same,
    }
    found["copy_seconds"] = [round(seconds, 2) for seconds in copies]
    found["tools"] = {
        name: {
            "seconds": [round(cost.wall, 2) for cost in made],
            "anonymous_mb": round(max(cost.anonymous for cost in made) / 1e6, 1),
        }
        for name, made in costs.items()
    }
    wall = {name: median([cost.wall for cost in made]) for name, made in costs.items()}
    found["ratio_to_copy"] = round(wall["lrconvert"] / median(copies), 2)
    found["times_faster"] = {name: round(wall[name] / wall["lrconvert"], 2) for name in baselines}
    shutil.rmtree(folder)
    return found


def largest_mb(source: Path) -> float:
    """Of a tensor in 16 bits, as it is stored and written."""
    shapes = [tensor.shape for tensor in open_model(str(source)).checkpoint.tensors.values()]
    return round(max(2 * math.prod(shape) for shape in shapes) / 1e6, 1)


def with_longrope(source: Path, recipe: Path, output: Path) -> Path:
    """The same weights with the recipe in config.json, as the baselines read it."""
    needed(lrconvert("hf", source, "--recipe", recipe, "-o", output))
    config = json.loads((output / "config.json").read_text())
    for key in ("auto_map", "longrope"):
        config.pop(key, None)
    (output / "config.json").write_text(json.dumps(config))
    for path in output.glob("*.py"):
        path.unlink()
    return output


def at_14_gb(scratch: Path) -> dict[str, Any]:
    """Our memory, once; the checkpoint is a file with holes."""
    folder = scratch / "14-GB"
    source = write_checkpoint(folder / "source", "14 GB", sparse=True)
    needed(lrconvert("recipe", "derive", source, "--method", "yarn", "--factor", str(RATIO), "-o", folder / "recipe"))
    cost = needed(ours(folder / "recipe")(source, folder / "output", "f16"))
    found = {"seconds": round(cost.wall, 2), "anonymous_mb": round(cost.anonymous / 1e6, 1)}
    found |= {"largest_tensor_mb": largest_mb(source), "bytes": size(folder / "output")}
    shutil.rmtree(folder)
    return found


# --- what is kept ----------------------------------------------------------------------------------------------------


def keep(
    results: dict[str, dict[str, dict[str, Any]]],
    cost: dict[str, Any],
    large: dict[str, Any],
    used: dict[str, dict[str, str]],
) -> None:
    broken = missed(results, cost, large)
    used = {**used, "runtime": {"onnxruntime": onnxruntime.__version__}}
    figures = {"checkpoints": results, "cost": cost, "14 GB": large, "missed": broken}
    save("onnx-baseline", {"tool_versions": used, **figures})
    saved = json.loads((RESULTS / "onnx-baseline.json").read_text())
    facts = [
        f"- {key}: {json.dumps(saved[key]) if isinstance(saved[key], dict) else saved[key]}"
        for key in ("date", "command", "versions", "tool_versions", "machine")
    ]
    text = ["# Ways to ONNX", "", *facts, "", ABOUT.strip(), "", *table(results), ""]
    if refused := refusals(results):
        text += ["Last words of those that refuse:", "", *refused, ""]
    if cost:
        ratio = f"{cost['ratio_to_copy']}x of a copy with fsync"
        text += [f"## A Llama of {cost['shape']} in f16 ({cost['date']})", ""]
        text += [f"{ratio}; a second run gave {'the same' if cost['same_bytes_again'] else 'other'} bytes. The largest "
                 f"tensor has {cost['largest_tensor_mb']} MB.", "", *cost_table(cost, large), ""]  # fmt: skip
    text += ["Missed: " + "; ".join(broken) if broken else "Every limit is met.", ""]
    (RESULTS / "onnx-baseline.md").write_text("\n".join(text))


def figures(results: dict[str, dict[str, dict[str, Any]]], cost: dict[str, Any]) -> list[Figure]:
    """Checkpoints that each tool has right; what exporting costs beside a copy and the fastest right tool."""
    found, unit = [], f"of {len(results)}"
    right = {tool: sum(is_right(made[tool]) for made in results.values()) for tool in next(iter(results.values()))}
    ours = right.pop("lrconvert")
    found += [Figure("ONNX graphs that are right", ours, unit, tool, count) for tool, count in right.items()]
    if cost:
        tools_cost = {name: (median(made["seconds"]), made["anonymous_mb"]) for name, made in cost["tools"].items()}
        seconds, memory = tools_cost.pop("lrconvert")
        what = f"ONNX f16, {cost['shape']}"
        found.append(Figure(what, seconds, "s", "a copy", median(cost["copy_seconds"]), COPY_ALLOWED, memory_mb=memory))
        for name, (theirs, _) in tools_cost.items():
            found.append(Figure(what, seconds, "s", name, theirs, 1 / SPEEDUP_NEEDED, memory_mb=memory))
    return found


def earlier() -> tuple[dict[str, Any], dict[str, Any]]:
    """Part 2 as it was kept, with its date."""
    saved = json.loads((RESULTS / "onnx-baseline.json").read_text())
    return ({"date": saved["date"], **saved["cost"]} if saved["cost"] else {}), saved["14 GB"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--genai", type=Path, required=True, help="interpreter with transformers 5, genai and mobius")
    parser.add_argument("--optimum", type=Path, required=True, help="interpreter with optimum-onnx")
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="checkpoints whose name contains this; nothing is kept then")
    parser.add_argument("--size", choices=sorted(SHAPES), default="2.8 GB", help="of part 2")
    parser.add_argument("--skip-size", action="store_true", help="leave part 2 out")
    parser.add_argument("--large", action="store_true", help="our memory at 14 GB as well")
    arguments = parser.parse_args()
    baselines = tools(arguments.genai, arguments.optimum)
    results = {}
    with scratch_folder(arguments.scratch) as scratch:
        for case in CASES:
            if (arguments.only or "") in case.name:
                results[case.name] = compared(case, scratch, baselines)
                made = {case.name: results[case.name]}
                print("\n".join([*table(made), *refusals(made)]), flush=True)
        cost: dict[str, Any] = {}
        if not arguments.skip_size:
            right = {name: baselines[name] for name in right_on_llama(results)}
            cost = {"shape": arguments.size, **rounds_of(arguments.size, scratch, right, arguments.rounds)}
            print(json.dumps(cost, indent=1), flush=True)
        large = at_14_gb(scratch) if arguments.large else {}
    report(*figures(results, cost))
    if cost:
        cost["date"] = date.today().isoformat()
    elif arguments.skip_size:
        cost, large = earlier()
    if arguments.only is None and arguments.size == "2.8 GB":
        versions = {"with transformers 5": installed(arguments.genai), "optimum": installed(arguments.optimum)}
        keep(results, cost, large, versions)


if __name__ == "__main__":
    main()
