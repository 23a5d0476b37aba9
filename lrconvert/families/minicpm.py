# SPDX-License-Identifier: Apache-2.0
"""MiniCPM 1, 2, 4 and 4.1, dense: Llama's layout and multipliers for width and depth.

transformers has no class for them, and their own code comes with their repositories. With the multipliers in the
weights they are Llamas, but for rounding.
"""

from lrconvert.families import base
from lrconvert.families.multipliers import Stated

FAMILY = base.Family(
    name="minicpm",
    hf_class="MiniCPMForCausalLM",
    hf_written="llama",
    gguf_architecture="minicpm",
    gguf_longrope="minicpm",
    rows=(
        base.EMBEDDING,
        *base.NORMS,
        *base.ATTENTION,
        *base.QKV_BIASES,
        *base.O_BIAS,
        *base.MLP,
        base.FINAL_NORM,
        base.LM_HEAD,
    ),
    # As its configuration code has them, whose copies differ on tying: a file with a head of its own unties the model.
    defaults={
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "scale_emb": 1,
        "scale_depth": 1,
        "dim_model_base": 1,
    },
    multipliers={
        "embedding": Stated("scale_emb"),
        "residual": Stated("scale_depth", times={"layers": -0.5}),
        "logits": Stated("dim_model_base", times={"hidden": -1}),
    },
    inert=frozenset({"mup_denominator"}),  # of its speculative heads
    remarks={"sparse_config": "sparse attention (InfLLM) is not converted: every layer attends to every token"},
    ignored=base.STORED_TABLES,
)
