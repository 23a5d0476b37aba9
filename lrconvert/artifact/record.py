# SPDX-License-Identifier: Apache-2.0
"""How an artifact was baked, as far as it decides what the artifact computes.

The record is all that a manifest keeps of it and all that parity reads of it: `parity.expected(model, spec, record)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt

from lrconvert.rope import STRICT


@dataclass(frozen=True)
class BakeRecord:
    """What a bake did to recipe and weights.

    `window`: the last position served, in tokens. `stored`: the dtype or type the weights were written in, None where
    they keep their bytes. `attention_scale`: how many times larger the rotated channels of q and k are than the
    model's, so that code computes that much less of the attention factor. `capability`: the name of what the recipe
    was fitted to (`engines.capability.NAMED`), None where the artifact expresses all of it. `static`: the last set
    serves every length. `lifted`: the model's sliding windows are gone, and every layer attends to every token.
    """

    __pydantic_config__: ClassVar = STRICT

    window: Annotated[int, Ge(1)]
    stored: str | None = None
    attention_scale: Annotated[float, Gt(0)] = 1.0
    capability: str | None = None
    static: bool = False
    lifted: bool = False


def options_of_version_1(target: str, options: Mapping[str, Any], window: Any) -> dict[str, Any]:
    """The record's values, unchecked, as a manifest of version 1 spells them among its `options`."""
    return {
        "window": options.get("window", window),
        "stored": options.get("type" if target == "gguf" else "dtype"),
        "attention_scale": options.get("folded_attention", 1.0),
        "capability": "llama.cpp" if target == "gguf" else "portable" if options.get("portable") else None,
        "static": options.get("static_long", False),
    }
