# SPDX-License-Identifier: Apache-2.0
"""Pico models: complete random models of every family, small enough to build in a test.

q and k are widened: a freshly initialised model attends almost uniformly and hides a wrong rotation. The
width is chosen so that the wrong factor set moves the mean KL by far more than a hundred tolerances
(the mutants of `tests/parity/test_verify.py` hold it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.families import expected_tensors, get_family, read_shape

WINDOW = 64
WIDEN = 3.0

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 101,
    "max_position_embeddings": WINDOW,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What each family adds: one grouped, one tied, one partial, one with its own head size.
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": False, "num_key_value_heads": 1},
    "qwen3": {"head_dim": 32, "attention_bias": False},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.375,
        "logits_scaling": 0.8,
    },
    "minicpm": {"scale_emb": 12, "scale_depth": 0.9, "dim_model_base": 80, "tie_word_embeddings": True},
    "phimoe": {
        "attention_bias": True,
        "lm_head_bias": True,
        "original_max_position_embeddings": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        "intermediate_size": 48,
    },
    "mixtral": {"sliding_window": 4096, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    "qwen3_moe": {
        "head_dim": 32,
        "attention_bias": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "use_sliding_window": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": False,
    },
    "phi3": {"partial_rotary_factor": 0.5, "original_max_position_embeddings": WINDOW},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": True, "head_dim": 32},
    "gemma3_text": {
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 12,
        "rope_local_base_freq": 3000.0,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": {},
    "olmo3": {"rope_theta": 500000.0, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layer_interval": 2},
    "ministral3": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.25,
            "original_max_position_embeddings": WINDOW,
        },
    },
}
FAMILIES = sorted(name for name in EXTRA if get_family(name).hf_written is None)  # with a class of their own


def pico_config(family: str, **changes: Any) -> dict[str, Any]:
    """A config of the family; a change to None removes the key."""
    config = {"model_type": family, "architectures": [get_family(family).hf_class], **BASE, **EXTRA[family]}
    config |= changes
    kinds = config.get("layer_types")
    if kinds and "layer_types" not in changes:  # as often as there are layers
        config["layer_types"] = [kinds[layer % len(kinds)] for layer in range(config["num_hidden_layers"])]
    scale = query_scale(family, config["max_position_embeddings"])
    if scale and config.get("rope_parameters") is EXTRA[family]["rope_parameters"]:
        config["rope_parameters"] = {**config["rope_parameters"], **scale}  # it grows behind the window
    return {key: value for key, value in config.items() if value is not None}


def query_scale(family: str, window: int = WINDOW) -> dict[str, Any]:
    """The rotary settings that make a family's scale of queries grow from `window` on; none where it has none."""
    key = get_family(family).query_scale
    if key is None:
        return {}
    return {key: EXTRA[family]["rope_parameters"][key], "original_max_position_embeddings": window}


def v5_rope(family: str, theta: float = 10000.0, own: float = 3000.0) -> dict[str, Any]:
    """Changes that spell a family's plain rotation as transformers 5 does; `own`: θ of layers that slide, where they
    have one."""
    layers, share = get_family(family).layers, EXTRA[family].get("partial_rotary_factor")
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": theta, **query_scale(family)}
    if share is not None:
        plain["partial_rotary_factor"] = share
    gone: dict[str, Any] = {"rope_scaling": None, "rope_theta": None}
    if share is not None:
        gone["partial_rotary_factor"] = None
    if layers is None or layers.own_theta is None:
        return {**gone, "rope_parameters": plain}
    kinds = {"full_attention": plain, "sliding_attention": {**plain, "rope_theta": own}}
    return {**gone, layers.own_theta: None, "rope_parameters": kinds}


def pico_tensors(config: dict[str, Any], seed: int = 7, widen: float = WIDEN) -> dict[str, np.ndarray]:
    """Random weights for a config, float32, q and k widened."""
    family = get_family(config["model_type"])
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor in expected_tensors(family, read_shape(config, family)):
        if not tensor.required:
            continue
        scale = widen if tensor.role in ("q", "k", "qkv") else 1.0
        if tensor.role.endswith("norm"):
            values = 1 - family.norm_offset + 0.1 * rng.standard_normal(tensor.shape)
        else:
            values = scale * rng.standard_normal(tensor.shape) / np.sqrt(tensor.shape[-1])
        tensors[tensor.name] = values.astype(np.float32)
    return tensors


def write_pico(
    folder: Path, family: str = "llama", *, shards: int = 1, seed: int = 7, widen: float = WIDEN, **changes: Any
) -> Path:
    """A pico model as a Hugging Face folder."""
    from safetensors.numpy import save_file

    config = pico_config(family, **changes)
    tensors = pico_tensors(config, seed, widen)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for part in range(shards):
        file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {name: tensors[name] for name in names[part::shards]}
        save_file(chosen, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
