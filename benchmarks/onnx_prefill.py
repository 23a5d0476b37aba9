# SPDX-License-Identifier: Apache-2.0
"""Reading a long prompt in float16 on a GPU: an ONNX folder in ONNX Runtime against transformers with PyTorch's SDPA.

    python tools/make_shape.py llama2-7b --layers 8 -o llama2-7b-8
    lrconvert onnx llama2-7b-8 --recipe llama2-7b-2048k-ft128k --dtype f16 -o llama2-7b-8-onnx
    python benchmarks/onnx_prefill.py llama2-7b-8 --onnx llama2-7b-8-onnx [--tokens 32768] [--pairs 5]

Both read the same tokens into an empty cache and answer the last token's logits, in turn, A B B A …, in one process on
one card that nothing else uses. The folder turns queries and keys by its recipe, transformers by the plain model's
angles: as much work. Needs onnxruntime-gpu. Written: results/onnx-prefill-NAME.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from _common import in_pairs, median, save
from transformers import AutoModelForCausalLM

from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint
from lrconvert.targets.onnx.graph import ADJUSTABLE

ALLOWED = 1.1
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class Graph:
    """The folder's graph, which leaves its caches on the device and answers as many logits as it is asked for."""

    def __init__(self, folder: Path, device: str) -> None:
        path, self.device = folder / "onnx" / "model.onnx", device
        model = onnx.load(str(path), load_external_data=False)
        for name in ADJUSTABLE:  # constants of the graph become inputs
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, []))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        provider = PROVIDERS[device]
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
        if provider not in self.session.get_providers():  # it falls back and says nothing
            raise SystemExit(f"ONNX Runtime has no {provider}")
        self.caches = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def read(self, tokens: np.ndarray) -> float:
        """Seconds."""
        count = len(tokens)
        feed = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count)[None],
            "num_logits_to_keep": np.array(1),
            "sequence_length": np.array(count),
        }
        binding = self.session.io_binding()
        for name, value in {**feed, **self.caches}.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for output in self.session.get_outputs():
            binding.bind_output(output.name, "cpu" if output.name == "logits" else self.device)
        started = time.perf_counter()
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        taken = time.perf_counter() - started
        if not np.isfinite(binding.get_outputs()[0].numpy()).all():
            raise SystemExit("the graph's answer isn't finite")
        return taken


class Peer:
    """transformers' own model of the plain checkpoint."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, attn_implementation="sdpa")
        self.model = model.to(device).eval()

    def read(self, tokens: np.ndarray) -> float:
        """Seconds."""
        ids = torch.from_numpy(tokens[None]).to(self.device)
        self.wait()
        started = time.perf_counter()
        with torch.inference_mode():
            logits = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        self.wait()
        taken = time.perf_counter() - started
        if not torch.isfinite(logits).all():
            raise SystemExit("the peer's answer isn't finite")
        return taken

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measured(graph: Graph, peer: Peer, tokens: np.ndarray, pairs: int) -> dict[str, Any]:
    """Median seconds of both and the median of their ratios."""
    taken = in_pairs(lambda: graph.read(tokens), lambda: peer.read(tokens), pairs)
    ours, theirs = (round(median(column), 4) for column in zip(*taken, strict=True))
    ratio = round(median([one / other for one, other in taken]), 3)
    return {"seconds": {"onnxruntime": ours, "torch": theirs}, "ratio": ratio, "allowed": ALLOWED, "pairs": pairs}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", choices=PROVIDERS, default="cuda", help="cpu: to try the script")
    options = parser.parse_args()
    stored = OnnxCheckpoint(options.onnx)
    graph, peer = Graph(options.onnx, options.device), Peer(options.model, options.device)
    tokens = np.random.default_rng(7).integers(0, peer.model.config.vocab_size, options.tokens)
    found = measured(graph, peer, tokens, options.pairs)
    about = {"model": options.model.name, "layers": peer.model.config.num_hidden_layers, "attention": stored.attention}
    versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    about |= {"tokens": options.tokens, "device": device_name(options.device), "runtimes": versions}
    save(f"onnx-prefill-{options.model.name}", {**about, **found})
    print(found)


if __name__ == "__main__":
    main()
