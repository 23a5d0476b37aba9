# SPDX-License-Identifier: Apache-2.0
"""Reading 8192 tokens and writing some in ONNX Runtime on the CPU: our graph against the one of genai's builder.

    python benchmarks/onnx_speed.py --genai ENV/bin/python [--model MODEL] [--types f32 int4] [--threads N] [--pairs N]
        [--layers N] [--scratch DIR]

    python3 -m venv genai && genai/bin/pip install onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 \
        onnxscript==0.7.2 transformers==5.23.0 torch==2.13.0

Both are made of the same plain checkpoint; ours gets a YaRN recipe of 8x, so it turns queries and keys by angles that
it computes, where the builder's reads a table inside the attention operator. One process and one ONNX Runtime run both,
in turn, A B B A …; caches are allocated once, are input and output at the same time, as onnxruntime-genai has them, and
are the same ones for both: where they lie in memory is worth a fifth of a token's time. The ratio is taken pair by
pair. MODEL: default, random weights in the shape of SmolLM2-135M with twelve layers and a smaller vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from _common import RESULTS, Figure, in_pairs, installed, lrconvert, median, report, run, save, scratch_folder
from safetensors.numpy import save_file

from lrconvert.checkpoint import locate
from lrconvert.families import expected_tensors, get_family, read_shape

READ, SHORT = 8192, 512
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 4096,
}
ALLOWED = {"read": 1.1, "write": 1.02}
OURS, THEIRS = "lrconvert", "genai builder"
Caches = dict[str, Any]  # by the name of the input, an OrtValue each
PRECISIONS = {"f32": "fp32", "f16": "fp16", "int4": "int4", "int8": "int8"}


def write_model(folder: Path, layers: int) -> Path:
    """A Llama with random weights whose window holds what is read here."""
    family = get_family("llama")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": [family.hf_class],
        **SHAPE,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4 * READ,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    rng = np.random.default_rng(7)
    tensors = {
        tensor.name: (
            np.ones(tensor.shape, np.float32)
            if tensor.role.endswith("norm")
            else rng.standard_normal(tensor.shape, np.float32) / np.float32(np.sqrt(tensor.shape[-1]))
        )
        for tensor in expected_tensors(family, read_shape(config, family))
        if tensor.required
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(locate("demo") / name, folder)
    return folder


class Graph:
    """A graph and its caches, which have room for everything that is read and written here."""

    def __init__(
        self, path: Path, capacity: int, threads: int, caches: Caches | None = None, *, options: Any = None
    ) -> None:
        options = options or onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.inputs = set(inputs)
        config = json.loads(next(folder for folder in path.parents if (folder / "genai_config.json").exists())
                            .joinpath("genai_config.json").read_text())["model"]["decoder"]  # fmt: skip
        shape = (1, config["num_key_value_heads"], capacity, config["head_size"])
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.caches: Caches = caches or {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, kinds[value.type]))
            for name, value in inputs.items()
            if name.startswith("past_key_values")
        }

    def seconds(self, tokens: np.ndarray, seen: int) -> float:
        """Of one pass over tokens that follow `seen` others."""
        feed = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, seen + len(tokens)), np.int64),
            "position_ids": np.arange(seen, seen + len(tokens))[None],
        }
        binding = self.session.io_binding()
        for name in feed.keys() & self.inputs:
            binding.bind_cpu_input(name, feed[name])
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        binding.bind_output("logits")
        started = time.perf_counter()
        self.session.run_with_iobinding(binding)
        taken = time.perf_counter() - started
        if not np.isfinite(binding.copy_outputs_to_cpu()[0][0, -1]).all():
            raise RuntimeError("the answer isn't finite")
        return taken

    def read(self, tokens: np.ndarray) -> float:
        return self.seconds(tokens, 0)

    def write(self, seen: int, count: int) -> float:
        """Seconds a token, after `seen` tokens whose caches are there."""
        return sum(self.seconds(np.array([10 + step]), seen + step) for step in range(count)) / count


def in_turn(graphs: dict[str, Graph], pairs: int, measure: Callable[[Graph], float]) -> dict[str, Any]:
    """Times of both and the median of their ratios."""
    pairs_of = in_pairs(lambda: measure(graphs[OURS]), lambda: measure(graphs[THEIRS]), pairs)
    times = {
        name: [round(each * 1e3, 3) for each in column]
        for name, column in zip((OURS, THEIRS), zip(*pairs_of, strict=True), strict=True)
    }
    return {"ms": times, "ratio": round(median([ours / theirs for ours, theirs in pairs_of]), 3)}


def exported(kind: str, source: Path, scratch: Path, genai: Path | None) -> dict[str, Path]:
    """Our graph of one type with a recipe of 8x, and the builder's where its interpreter is given."""
    recipe, mine, theirs = scratch / "recipe", scratch / f"ours-{kind}", scratch / f"theirs-{kind}"
    derived = ("--method", "yarn", "--factor", "8", "--uniform", "-o", recipe, "--force")
    run(lrconvert("recipe", "derive", source, *derived))
    run(lrconvert("onnx", source, "--recipe", recipe, "--dtype", kind, "-o", mine, "--force"))
    paths = {OURS: mine / "onnx" / "model.onnx"}
    if genai is not None:
        shutil.rmtree(theirs, ignore_errors=True)
        builder = [genai, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", theirs]
        run([*builder, "-p", PRECISIONS[kind], "-e", "cpu", "-c", scratch / "cache"])
        paths[THEIRS] = theirs / "model.onnx"
    return paths


def measured(kind: str, source: Path, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both graphs of one type."""
    paths = exported(kind, source, scratch, arguments.genai)
    capacity = READ + arguments.tokens
    graphs = {OURS: Graph(paths[OURS], capacity, arguments.threads)}
    graphs[THEIRS] = Graph(paths[THEIRS], capacity, arguments.threads, graphs[OURS].caches)
    tokens = np.random.default_rng(3).integers(3, 4000, READ)
    found: dict[str, Any] = {"mb": {}}
    for name, path in paths.items():
        found["mb"][name] = round(sum(file.stat().st_size for file in path.parent.glob("*.onnx*")) / 1e6, 1)
    found[f"read {READ}"] = in_turn(graphs, arguments.pairs, lambda graph: graph.read(tokens))
    for seen in (SHORT, READ):
        writing = in_turn(graphs, arguments.pairs, lambda graph, seen=seen: graph.write(seen, arguments.tokens))
        found[f"write after {seen}"] = writing
    return found


def missed(results: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{kind}, {what}: {values['ratio']}x"
        for kind, measures in results.items()
        for what, values in measures.items()
        if "ratio" in values and values["ratio"] > ALLOWED[what.split()[0]]
    ]


def figures(results: dict[str, dict[str, Any]]) -> list[Figure]:
    """Ours and the builder's, in milliseconds."""
    return [
        Figure(
            f"ONNX {kind} on a CPU: {what}",
            median(values["ms"][OURS]),
            "ms" if what.startswith("read") else "ms/token",
            THEIRS,
            median(values["ms"][THEIRS]),
            limit=ALLOWED[what.split()[0]],
        )
        for kind, measures in results.items()
        for what, values in measures.items()
        if "ratio" in values
    ]


def keep(results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    broken = missed(results)
    save("onnx-speed", {**facts, "types": results, "allowed": ALLOWED, "missed": broken})
    saved = json.loads((RESULTS / "onnx-speed.json").read_text())
    head = [f"- {key}: {json.dumps(value) if isinstance(value, dict) else value}" for key, value in saved.items()
            if key not in ("types", "allowed", "missed")]  # fmt: skip
    lines = ["| type | what | ours, ms | genai builder's, ms | ratio | allowed |", "|" + " --- |" * 6]
    for kind, measures in results.items():
        for what, values in measures.items():
            if "ratio" in values:
                ms = [round(median(values["ms"][name]), 2) for name in (OURS, THEIRS)]
                lines.append(
                    f"| {kind} | {what} | {ms[0]} | {ms[1]} | {values['ratio']} | {ALLOWED[what.split()[0]]} |"
                )
    about = (
        "Medians; writing is per token. The ratio is the median of the ratios of pairs that ran one after the other."
    )
    verdict = "Missed: " + "; ".join(broken) if broken else "Every limit is met."
    text = ["# The speed of the graph in ONNX Runtime on a CPU", "", *head, "", about, "", *lines, "", verdict, ""]
    (RESULTS / "onnx-speed.md").write_text("\n".join(text))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--genai", type=Path, required=True, help="interpreter with onnxruntime-genai and transformers 5"
    )
    parser.add_argument("--model", type=Path, help="a Llama's folder with a window of at least 8192 + --tokens")
    parser.add_argument("--types", nargs="+", choices=sorted(PRECISIONS), default=["f32", "int4"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer: for trying; nothing is kept"
    )
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    chosen = parser.parse_args(arguments)
    results = {}
    with scratch_folder(chosen.scratch) as scratch:
        source = chosen.model or write_model(scratch / "model", chosen.layers)
        for kind in chosen.types:
            results[kind] = measured(kind, source, chosen, scratch)
            print(json.dumps({kind: results[kind]}, indent=1), flush=True)
    report(*figures(results))
    if chosen.layers == SHAPE["num_hidden_layers"]:
        builder = installed(chosen.genai)["onnxruntime-genai"]
        facts = {"onnxruntime": onnxruntime.__version__, "genai_builder": builder, "threads": chosen.threads}
        keep(results, {**facts, "model": chosen.model.name if chosen.model else f"random, {json.dumps(SHAPE)}"})


if __name__ == "__main__":
    main()
