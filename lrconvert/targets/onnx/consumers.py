# SPDX-License-Identifier: Apache-2.0
"""The files that programs around ONNX Runtime read: one folder serves all of them.

onnxruntime-genai reads genai_config.json, optimum and transformers.js config.json, where transformers.js has a section
of its own. What each of them really reads was measured: docs/onnx.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrconvert.checkpoint import Model
from lrconvert.errors import UsageError
from lrconvert.rope import RopeSpec

if TYPE_CHECKING:  # it imports onnx, which `plan` asks for by name
    from lrconvert.targets.onnx.graph import Choices

ONNX_FOLDER = "onnx"
MODEL_FILE = "onnx/model.onnx"
GENAI = "genai_config.json"
# onnxruntime-genai recomputes a sequence at the token after this length. The model's type chooses it, not its window
# (src/generators.cpp, InitializePhi3RopeThreshold).
GENAI_REWINDS = {4096: "phi3", 8192: "phi3small"}
# A shared buffer holds the caches of max_length tokens from the start: beyond this they had better grow.
MAX_SHARED_BYTES = 2 * 2**30
CACHE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def config_of(config: dict[str, Any], choices: Choices, files: int) -> dict[str, Any]:
    """config.json of an artifact, from that of a Hugging Face one: no code, and what transformers.js needs."""
    edited = {key: value for key, value in config.items() if key not in ("auto_map", "transformers.js_config")}
    # "fp32" is its name for the file without a suffix; the cache has a key of its own.
    own: dict[str, Any] = {"dtype": "fp32", "use_external_data_format": files}
    if choices.computing == "F16":
        own["kv_cache_dtype"] = "float16"
    return {**edited, "transformers.js_config": own}


def genai_config(
    model: Model, spec: RopeSpec, choices: Choices, generation: dict[str, Any], *, rewind: bool
) -> dict[str, Any]:
    """genai_config.json. `generation`: the source's generation_config.json."""
    shape = model.shape
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * CACHE_BYTES[choices.computing] * spec.window
    return {
        "model": {
            "type": _type(spec) if rewind else "llama",
            "vocab_size": shape.vocab,
            "context_length": spec.window,
            **generation_tokens(model.checkpoint.config, generation),
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "num_hidden_layers": shape.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": spec.window,
            "past_present_share_buffer": choices.attention == "gqa" and cache <= MAX_SHARED_BYTES,
            "do_sample": False,
            "num_beams": 1,
        },
    }


def generation_tokens(config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """The ids that onnxruntime-genai asks for: generation_config.json's, else config.json's, else one that ends."""
    tokens = {key: generation.get(key, config.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = tokens["eos_token_id"] if isinstance(tokens["eos_token_id"], list) else [tokens["eos_token_id"]]
    end = next((token for token in ends if isinstance(token, int)), 0)
    found = {key: value if isinstance(value, int) else end for key, value in tokens.items()}
    return {**found, "eos_token_id": end if tokens["eos_token_id"] is None else tokens["eos_token_id"]}


def _type(spec: RopeSpec) -> str:
    """The model type that makes onnxruntime-genai recompute at this recipe's boundary."""
    if len(spec.boundaries) != 1 or spec.boundaries[0] not in GENAI_REWINDS:
        wanted, found = " or ".join(map(str, GENAI_REWINDS)), ", ".join(map(str, spec.boundaries)) or "none"
        raise UsageError(
            f"--genai-rewind: onnxruntime-genai recomputes after {wanted} tokens only; the recipe's boundaries: "
            f"{found}",
            remedy="Omit it; generation that crosses the boundary then keeps its cached keys",
        )
    return GENAI_REWINDS[spec.boundaries[0]]
