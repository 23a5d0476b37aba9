# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and 2.5: biases on q, k and v, always."""

from dataclasses import replace

from lrconvert.families import base

FAMILY = base.Family(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    gguf_architecture="qwen2",
    gguf_longrope="llama",  # the qwen2 architecture ignores factors; llama's takes biases on q, k and v
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        # Its configs have no switch for them, and transformers ignores an attention_bias.
        *(replace(row, when=None) for row in base.QKV_BIASES),
        *base.MLP,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    ignored=base.STORED_TABLES,
    sliding="named",
)
