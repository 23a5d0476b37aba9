# SPDX-License-Identifier: Apache-2.0
"""Gemma 3, text models: norms on both sides of attention and MLP, and of q and k, whose weights count from one; two
rotations, the plain one in layers with a sliding window.

Its class has an attention cap in its config and doesn't compute it: a config that sets it is refused.
"""

from lrconvert.families import base
from lrconvert.families.layers import LOCAL_THETA, StatedLayers
from lrconvert.families.multipliers import Stated

FAMILY = base.Family(
    name="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    gguf_architecture="gemma3",  # it ignores factors
    rows=(
        base.EMBEDDING,
        base.layer_row("attention_norm", "input_layernorm.weight", "attn_norm.weight", "hidden"),
        *base.ATTENTION,
        *base.QKV_BIASES,
        *base.O_BIAS,
        *base.QK_NORMS,
        *base.POST_NORMS,
        base.layer_row("ffn_norm", "pre_feedforward_layernorm.weight", "ffn_norm.weight", "hidden"),
        *base.MLP,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        LOCAL_THETA: 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    multipliers={"attention": Stated("query_pre_attn_scalar", power=-0.5, times={"head_dim": 0.5})},
    fixed={"embedding": {"hidden": 0.5}},
    norm_offset=1.0,
    activation="gelu_tanh",
    activation_key="hidden_activation",
    logits_cap="final_logit_softcapping",
    layers=StatedLayers(full_every=6, full_every_key="sliding_window_pattern", own_theta=LOCAL_THETA),
    inert=frozenset({"_sliding_window_pattern"}),  # what transformers remembers of it beside the list
    ignored=base.STORED_TABLES,
    sliding="all but",
)
