# SPDX-License-Identifier: Apache-2.0
"""How Hugging Face configs spell a rotation: the one spelling that we write.

It was measured right in transformers 4.57 and 5.x: `rope_scaling` (4.57 ignores `rope_parameters` in silence), θ and
the original window at the top level (4.57 reads them nowhere else) and the original window inside as well (vLLM,
mlx-lm), an explicit attention factor and a `factor` that equals window / original window (the versions disagree when
it doesn't). `checkpoint.rope_config` reads every spelling.
"""

from __future__ import annotations

from typing import Any

from lrconvert.checkpoint.rope_config import LONGROPE_VERSION
from lrconvert.engines.capability import switch_length
from lrconvert.families import Family, ModelShape
from lrconvert.families.layers import FULL, SLIDING
from lrconvert.rope import RopeSpec


def native_keys(native: RopeSpec, family: Family, shape: ModelShape) -> dict[str, Any]:
    """The top-level config keys for native code, from what native code can express (`Capability.fit`)."""
    boundary = switch_length(native)
    short, long = native.tiers[0], native.tiers[-1]
    lists = {"short_factor": list(short.factors), "long_factor": list(long.factors)}
    if family.hf_scaling == "three keys":
        scaling: dict[str, Any] = {"type": "longrope", **lists}
    else:
        scaling = {
            "rope_type": "longrope",
            "type": "longrope",
            **lists,
            "factor": native.window / boundary,
            "attention_factor": float(long.attention_factor),
            "original_max_position_embeddings": boundary,
        }
    if family.hf_scaling == "mscales":
        del scaling["attention_factor"]  # it would count more than these, for who reads both
        scaling |= {"short_mscale": float(short.attention_factor), "long_mscale": float(long.attention_factor)}
    if family.query_scale is not None:  # which its class needs, and counts from that same original window
        scaling[family.query_scale] = 0.0 if shape.query_scale is None else shape.query_scale.growth
    return {
        "max_position_embeddings": native.window,
        "original_max_position_embeddings": boundary,
        "rope_theta": native.base,
        "rope_scaling": scaling,
    }


def plain_keys(native: RopeSpec, family: Family, shape: ModelShape) -> dict[str, Any]:
    """The keys that say θ of the layers that slide, where they rotate by themselves. In a family without such a
    key, 4.57 takes θ of all; 5.x a default, unless `rope_parameters`, which it reads beside `rope_scaling`, says it."""
    theta = shape.plain_theta
    if family.layers is None or family.layers.own_theta is None or theta is None:
        return {}
    if family.layers.own_theta != "rope_theta":
        return {family.layers.own_theta: theta}
    full = {**native_keys(native, family, shape)["rope_scaling"], "rope_theta": native.base}
    return {"rope_parameters": {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": theta}}}


def own_key(spec: RopeSpec, shape: ModelShape) -> dict[str, Any]:
    """The value of the `longrope` key: all that the artifact's modeling code needs."""
    theta = shape.plain_theta
    return {
        "version": LONGROPE_VERSION,
        "rope_theta": spec.base,
        "rotary_dim": spec.rotary_dim,
        "original_window": spec.original_window,
        "switch": "reprefill",
        "tiers": [
            {
                "max_length": tier.max_length,
                "factors": list(tier.factors),
                "start_tokens": tier.start_tokens,
                "attention_factor": float(tier.attention_factor),
            }
            for tier in spec.tiers
        ],
        **({} if theta is None else {"plain": {SLIDING: theta}}),
    }
