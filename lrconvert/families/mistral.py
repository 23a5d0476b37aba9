# SPDX-License-Identifier: Apache-2.0
"""Mistral 7B and models like it: Llama's layout, grouped heads, perhaps a sliding window."""

from lrconvert.families import base

FAMILY = base.Family(
    name="mistral",
    hf_class="MistralForCausalLM",
    gguf_architecture="llama",
    gguf_longrope="llama",
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        *base.MLP,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ignored=base.STORED_TABLES,
    sliding="all",
    hf_states_head_size=True,
)
