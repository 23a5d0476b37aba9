# SPDX-License-Identifier: Apache-2.0
"""Ministral 3, and the language model of newer Mistral 3: Mistral with queries that grow with their position."""

from lrconvert.families import base

FAMILY = base.Family(
    name="ministral3",
    hf_class="Ministral3ForCausalLM",
    gguf_architecture="mistral3",
    gguf_longrope="mistral3",
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        *base.MLP,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    query_scale="llama_4_scaling_beta",
    ignored=base.STORED_TABLES,
    sliding="all",
    hf_oldest="5",
)
