# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and 2.5: biases on q, k and v, always."""

from lrconvert.families import base

FAMILY = base.Family(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    gguf_architecture="qwen2",
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        *base.QKV_BIASES,
        *base.MLP,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    # Qwen2's configs have no switch for the biases: the architecture always has them.
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "attention_bias": True},
)
