# SPDX-License-Identifier: Apache-2.0
"""OLMo 2: norms behind attention and MLP instead of before them, and over all heads of q and of k at once."""

from lrconvert.families import base

FAMILY = base.Family(
    name="olmo2",
    hf_class="Olmo2ForCausalLM",
    gguf_architecture="olmo2",  # it ignores factors
    rows=(
        base.EMBEDDING,
        *base.ATTENTION,
        *base.QKV_BIASES,
        *base.O_BIAS,
        *base.WHOLE_QK_NORMS,
        *base.MLP,
        *base.POST_NORMS,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    hf_oldest="5",
    ignored=base.STORED_TABLES,
)
