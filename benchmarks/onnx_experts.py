# SPDX-License-Identifier: Apache-2.0
"""Experts in standard operators, as `lrconvert onnx` writes them, against ONNX Runtime's own MoE operator.

    python benchmarks/onnx_experts.py [--pairs N] [--scratch DIR]

A one-layer Mixtral and a one-layer Qwen3-MoE with random weights are baked. In a copy of each graph the experts are one
`com.microsoft.MoE` with the same router scores and the same weights, stacked and interleaved as its CPU kernel wants
them. Both graphs must give the same logits; then reading 256 tokens and one token after another are timed in turn.
Writes results/onnx-experts.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from _common import Figure, lrconvert, median, report, run, save, scratch_folder, write_random
from onnx import helper, numpy_helper
from safetensors.numpy import load_file

SHARED = {
    "hidden_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
READ, ALIKE = 256, 1e-4


@dataclass(frozen=True)
class Case:
    """A model whose gates are normalised, and where its experts lie."""

    config: dict[str, Any]
    gate: str
    up: str
    down: str
    experts: int


_MIXTRAL, _QWEN = "model.layers.0.block_sparse_moe.experts.{}", "model.layers.0.mlp.experts.{}"
CASES = {
    "mixtral, 2 of 8": Case(
        {**SHARED, "model_type": "mixtral", "intermediate_size": 3584, "num_local_experts": 8,
         "num_experts_per_tok": 2},
        f"{_MIXTRAL}.w1.weight", f"{_MIXTRAL}.w3.weight", f"{_MIXTRAL}.w2.weight", 8,
    ),
    "qwen3_moe, 8 of 64": Case(
        {**SHARED, "model_type": "qwen3_moe", "intermediate_size": 2048, "moe_intermediate_size": 512, "head_dim": 64,
         "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
         "mlp_only_layers": []},
        f"{_QWEN}.gate_proj.weight", f"{_QWEN}.up_proj.weight", f"{_QWEN}.down_proj.weight", 64,
    ),
}  # fmt: skip


def baked(folder: Path, case: Case) -> Path:
    """The graph of a random model of this shape."""
    source, recipe, artifact = folder / "source", folder / "recipe", folder / "onnx"
    write_random(source, case.config, widen=1.0)
    run(lrconvert("recipe", "derive", source, "--method", "yarn", "--factor", "4", "--uniform", "-o", recipe))
    run(lrconvert("onnx", source, "--recipe", recipe, "-o", artifact))
    return artifact / "onnx" / "model.onnx"


def with_operator(graph: Path, source: Path, case: Case) -> Path:
    """A copy in which one MoE stands for all experts."""
    weights = load_file(source / "model.safetensors")
    gates, ups, downs = (
        np.stack([weights[name.format(expert)] for expert in range(case.experts)]).astype(np.float32)
        for name in (case.gate, case.up, case.down)
    )
    both = np.stack([gates, ups], axis=2).reshape(case.experts, -1, gates.shape[2])  # rows of gate and up in turn
    model = onnx.load(graph)
    made = [node for node in model.graph.node if node.op_type == "ScatterND"][-1].output[0]
    softmax = next(node for node in model.graph.node if node.name.endswith("router.softmax"))
    tokens = next(node for node in model.graph.node if node.op_type == "Gather" and node.name.endswith(".tokens"))
    for node in model.graph.node:
        node.input[:] = ["moe.made" if name == made else name for name in node.input]
    stacked = {"moe.both": both, "moe.down": downs}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stacked.items())
    operator = helper.make_node(
        "MoE", [tokens.input[0], softmax.input[0], "moe.both", "", "moe.down"], ["moe.made"], domain="com.microsoft",
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        k=case.config["num_experts_per_tok"], normalize_routing_weights=1,
    )  # fmt: skip
    places = [index for index, node in enumerate(model.graph.node) if node.output and node.output[0] == made]
    model.graph.node.insert(places[0] + 1, operator)
    if all(each.domain != "com.microsoft" for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    other = graph.with_name("operator.onnx")
    onnx.save(model, other, save_as_external_data=True, location="operator.onnx_data")
    return other


def feed(session: Any, tokens: np.ndarray, seen: int, caches: list[np.ndarray] | None) -> dict[str, Any]:
    count = len(tokens)
    given = {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, seen + count), np.int64),
        "position_ids": np.arange(seen, seen + count)[None],
    }
    inputs = session.get_inputs()[3:]
    empty = [np.zeros([1, each.shape[1], 0, each.shape[3]], np.float32) for each in inputs]
    return given | {each.name: cache for each, cache in zip(inputs, caches or empty, strict=True)}


def measured(case: Case, folder: Path, pairs: int) -> dict[str, Any]:
    ours = baked(folder, case)
    graphs = {"standard operators": ours, "MoE": with_operator(ours, folder / "source", case)}
    sessions = {
        name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for name, path in graphs.items()
    }
    rng = np.random.default_rng(3)
    prompt, one = rng.integers(2, 500, READ), rng.integers(2, 500, 1)
    answers: dict[str, list[Any]] = {
        name: list(each.run(None, feed(each, prompt, 0, None))) for name, each in sessions.items()
    }
    apart = float(np.abs(answers["standard operators"][0] - answers["MoE"][0]).max())
    assert apart < ALIKE, apart
    times: dict[str, dict[str, list[float]]] = {name: {"read": [], "write": []} for name in sessions}
    for index in range(pairs + 1):  # the first isn't counted
        for name in sorted(sessions, reverse=bool(index % 2)):
            each, caches = sessions[name], answers[name][1:]
            for what, given in (("read", feed(each, prompt, 0, None)), ("write", feed(each, one, READ, caches))):
                began = time.perf_counter()
                each.run(None, given)
                if index:
                    times[name][what].append(time.perf_counter() - began)
    found: dict[str, Any] = {"largest difference of a logit": apart}
    for what in ("read", "write"):
        standard, operator = (median(times[name][what]) * 1e3 for name in ("standard operators", "MoE"))
        label = f"experts of {case.config['model_type']}, {'256 tokens' if what == 'read' else 'one token'}"
        report(Figure(label, round(standard, 3), "ms", "MoE operator", round(operator, 3), 1))
        found[what] = {"standard operators, ms": round(standard, 3), "MoE, ms": round(operator, 3),
                       "ratio": round(standard / operator, 3)}  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    asked = parser.parse_args()
    with scratch_folder(asked.scratch) as scratch:
        found = {}
        for name, case in CASES.items():
            (folder := scratch / name.partition(",")[0]).mkdir(parents=True)
            found[name] = measured(case, folder, asked.pairs)
    print(json.dumps(found, indent=1))
    save("onnx-experts", {"onnxruntime": onnxruntime.__version__, "models": found})


if __name__ == "__main__":
    main()
