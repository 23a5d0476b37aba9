# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, SmolLM2 and models like them."""

from lrconvert.families import base

FAMILY = base.Family(
    name="llama",
    hf_class="LlamaForCausalLM",
    gguf_architecture="llama",
    gguf_longrope="llama",
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        *base.QKV_BIASES,
        *base.O_BIAS,
        *base.MLP,
        *base.MLP_BIASES,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={"max_position_embeddings": 2048},
    ignored=base.STORED_TABLES,
)
