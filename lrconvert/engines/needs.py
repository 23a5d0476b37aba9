# SPDX-License-Identifier: Apache-2.0
"""The keys of config.json that programs need, as rules; the rows of the table share them."""

from __future__ import annotations

from lrconvert.engines.engine import attention_factor, has, named, where, within

INNER = tuple(f"{section}.original_max_position_embeddings" for section in ("rope_scaling", "rope_parameters"))
TOP = "original_max_position_embeddings"
SECTION, OLD_SECTION = has("rope_scaling", "rope_parameters"), has("rope_scaling")
TYPE = has("rope_scaling.type", otherwise="refuses")
# What 4.57 needs of every family but Phi-3: without the window it takes `factor`, and fails where that is missing too.
OLD_NEEDS = (
    OLD_SECTION,
    has(TOP),
    within("rope_scaling", has(TOP, "rope_scaling.factor", otherwise="refuses")),
    named("longrope"),
)
NEW_NEEDS = (SECTION, has(TOP, *INNER), named("longrope"))
GROWTH = has("rope_scaling.llama_4_scaling_beta", "rope_parameters.llama_4_scaling_beta", otherwise="refuses")
HEAD_SIZE = within("rope_scaling", has("head_dim", otherwise="refuses"))
NEW_HEAD_SIZE = has("head_dim", otherwise="refuses")
NEW_TYPE = within("rope_scaling", has("rope_scaling.rope_type", otherwise="refuses"))
KINDS_NEEDS = (
    *(
        has(*(f"{section}.{key}" for section in ("rope_scaling", "rope_parameters.full_attention")))
        for key in ("rope_type", TOP)
    ),
    within("rope_scaling", within("rope_parameters", has("rope_parameters.full_attention", otherwise="refuses"))),
)
MSCALES = ("short_mscale", "long_mscale", TOP)  # all inside the section
PHI3_TYPES = named("longrope", "su", "yarn")
NEW_PHI3_NEEDS = (
    SECTION,
    has(TOP),
    PHI3_TYPES,
    where("su", has(*INNER, otherwise="refuses")),
    attention_factor("rope_scaling.attention_factor", "rope_parameters.attention_factor"),
)
