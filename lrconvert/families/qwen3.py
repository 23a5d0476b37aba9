# SPDX-License-Identifier: Apache-2.0
"""Qwen3: a norm over every head's q and k before the rotation, a head size of its own."""

from lrconvert.families import base

FAMILY = base.Family(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    gguf_architecture="qwen3",  # it ignores factors, and q/k norms fit none of the plain architectures that honour them
    gguf_other=base.GGUF_STEP35,
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        *base.QKV_BIASES,
        *base.O_BIAS,
        *base.QK_NORMS,
        *base.MLP,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    ignored=base.STORED_TABLES,
    sliding="named",
)
