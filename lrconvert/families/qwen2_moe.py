# SPDX-License-Identifier: Apache-2.0
"""Qwen1.5-MoE A2.7B and Qwen2 57B-A14B: Qwen2's attention, many narrow experts, and one that every token uses."""

from dataclasses import replace

from lrconvert.families import base
from lrconvert.families.experts import StatedExperts

FAMILY = base.Family(
    name="qwen2_moe",
    hf_class="Qwen2MoeForCausalLM",
    gguf_architecture="qwen2moe",  # it ignores factors
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        # As in Qwen2, whatever an attention_bias says. Without them (qkv_bias false) they are missing tensors.
        *(replace(row, when=None) for row in base.QKV_BIASES),
        *base.expert_rows("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        *base.SHARED_EXPERT,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
    },
    experts=StatedExperts(
        count="num_experts",
        count_too="num_local_experts",
        ffn="moe_intermediate_size",
        shared="shared_expert_intermediate_size",
        normalised="norm_topk_prob",
    ),
    inert=frozenset({"router_aux_loss_coef", "qkv_bias"}),  # the first is of training
    ignored=base.STORED_TABLES,
    sliding="unclear",
)
