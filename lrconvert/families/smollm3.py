# SPDX-License-Identifier: Apache-2.0
"""SmolLM3: Llama's layout, and every fourth layer without any rotation."""

from lrconvert.families import base
from lrconvert.families.layers import StatedLayers

FAMILY = base.Family(
    name="smollm3",
    hf_class="SmolLM3ForCausalLM",
    gguf_architecture="smollm3",  # it ignores factors
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
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    layers=StatedLayers(rotates="no_rope_layers", unrotated_every="no_rope_layer_interval"),
    ignored=base.STORED_TABLES,
    sliding="unrotated",
)
