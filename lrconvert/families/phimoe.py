# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-MoE: a published LongRoPE model with layer norms, biases, and sixteen experts that a sparsemixer chooses."""

from lrconvert.families import base
from lrconvert.families.experts import StatedExperts

FAMILY = base.Family(
    name="phimoe",
    hf_class="PhimoeForCausalLM",
    gguf_architecture="phimoe",
    gguf_differs="its phimoe divides by the mean square where the model has layer norms, and makes the gates of two "
    "experts sum to one where the model's are about one each",
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.NORM_BIASES,
        *base.ATTENTION,
        *base.QKV_BIASES,
        *base.O_BIAS,
        *base.expert_rows("block_sparse_moe", gate="w1", up="w3", down="w2"),
        base.FINAL_NORM,
        base.LM_HEAD,
        base.HEAD_BIAS,
    ),
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "router_jitter_noise": 0.01,
    },
    experts=StatedExperts(gating="sparsemixer", jitter="router_jitter_noise"),
    norm="layer",
    inert=frozenset({"input_jitter_noise", "router_aux_loss_coef"}),  # of training
    hf_scaling="mscales",
    ignored=base.STORED_TABLES,
    sliding="all",
)
