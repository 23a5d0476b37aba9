# SPDX-License-Identifier: Apache-2.0
"""Mixtral 8x7B and 8x22B, and models like them: Mistral's layout with experts in the place of the MLP."""

from lrconvert.families import base
from lrconvert.families.experts import StatedExperts

FAMILY = base.Family(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    gguf_architecture="llama",
    gguf_longrope="llama",
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        *base.expert_rows("block_sparse_moe", gate="w1", up="w3", down="w2"),
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    experts=StatedExperts(),
    inert=frozenset({"router_aux_loss_coef", "router_jitter_noise"}),  # of training
    ignored=base.STORED_TABLES,
    sliding="all",
    hf_states_head_size=True,
)
