# SPDX-License-Identifier: Apache-2.0
"""GLM-4 0414: norms on both sides of attention and MLP; half of each head rotates, and neighbouring channels turn
together.
"""

from lrconvert.families import base

FAMILY = base.Family(
    name="glm4",
    hf_class="Glm4ForCausalLM",
    gguf_architecture="glm4",  # it ignores factors
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        *base.QKV_BIASES,
        base.layer_row(
            "attention_post_norm", "post_self_attn_layernorm.weight", "post_attention_norm.weight", "hidden"
        ),
        base.layer_row("ffn_post_norm", "post_mlp_layernorm.weight", "post_ffw_norm.weight", "hidden"),
        base.layer_row("gate_up", "mlp.gate_up_proj.weight", "ffn_up.weight", "2ffn", "hidden"),
        base.layer_row("down", "mlp.down_proj.weight", "ffn_down.weight", "hidden", "ffn"),
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-07,
        "attention_bias": True,
    },
    neighbours=True,
    ignored=base.STORED_TABLES,
)
