# SPDX-License-Identifier: Apache-2.0
"""OLMo 3: OLMo 2's layout, three of four layers with a sliding window and a rotation that no scaling changes."""

from lrconvert.families import base
from lrconvert.families.layers import StatedLayers

FAMILY = base.Family(
    name="olmo3",
    hf_class="Olmo3ForCausalLM",
    gguf_architecture="olmo2",  # of a file with a window; it ignores factors
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
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
    layers=StatedLayers(full_every=4, own_theta="rope_theta"),
    ignored=base.STORED_TABLES,
    sliding="all but",
)
