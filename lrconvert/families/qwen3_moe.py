# SPDX-License-Identifier: Apache-2.0
"""Qwen3 30B-A3B, 235B-A22B and Qwen3-Coder: Qwen3's attention, and many narrow experts."""

from lrconvert.families import base
from lrconvert.families.experts import StatedExperts

FAMILY = base.Family(
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    gguf_architecture="qwen3moe",  # it ignores factors
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        *base.QKV_BIASES,
        *base.O_BIAS,
        *base.QK_NORMS,
        *base.expert_rows("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    experts=StatedExperts(
        count="num_experts", count_too="num_local_experts", ffn="moe_intermediate_size", normalised="norm_topk_prob"
    ),
    inert=frozenset({"router_aux_loss_coef"}),  # of training
    ignored=base.STORED_TABLES,
    sliding="switched",
)
