# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and 3.5 mini: fused q, k, v and fused gate and up; perhaps only part of a head rotates."""

from lrconvert.families import base

FAMILY = base.Family(
    name="phi3",
    hf_class="Phi3ForCausalLM",
    gguf_architecture="phi3",
    gguf_longrope="phi3",
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        base.layer_row("qkv", "self_attn.qkv_proj.weight", "attn_qkv.weight", "qkv", "hidden"),
        base.layer_row("o", "self_attn.o_proj.weight", "attn_output.weight", "hidden", "q"),
        base.layer_row("gate_up", "mlp.gate_up_proj.weight", "ffn_up.weight", "2ffn", "hidden"),
        base.layer_row("down", "mlp.down_proj.weight", "ffn_down.weight", "hidden", "ffn"),
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    rope_kinds={"yarn": "longrope"},  # its first configs' name; transformers and llama.cpp read the two lists
    hf_scaling="three keys",
    ignored=base.STORED_TABLES,
    sliding="all",
)
