# SPDX-License-Identifier: Apache-2.0
"""Granite 3 and later dense models of this type: Llama's layout and four multipliers."""

from lrconvert.families import base
from lrconvert.families.multipliers import Stated

FAMILY = base.Family(
    name="granite",
    hf_class="GraniteForCausalLM",
    gguf_architecture="granite",
    gguf_longrope="granite",
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
        "max_position_embeddings": 2048,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    multipliers={
        "embedding": Stated("embedding_multiplier"),
        "residual": Stated("residual_multiplier"),
        "attention": Stated("attention_multiplier", times={"head_dim": 0.5}),  # in the place of 1 / sqrt(head_dim)
        "logits": Stated("logits_scaling", power=-1),  # a divisor
    },
    ignored=base.STORED_TABLES,
)
