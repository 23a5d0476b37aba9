# SPDX-License-Identifier: Apache-2.0
"""How an artifact was baked, as far as it decides what the artifact computes.

The record is all that a manifest keeps of it and all that parity reads of it: `parity.expected(model, spec, record)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le

from lrconvert.checkpoint.padding import MAX_ADDED
from lrconvert.recipe import Recipe
from lrconvert.rope import STRICT


@dataclass(frozen=True)
class BakeRecord:
    """What a bake did to recipe and weights.

    `window`: the last position served, in tokens. `stored`: the dtype or type the weights were written in, None where
    they keep their bytes. `attention_scale`: how many times larger the rotated channels of q and k are than the
    model's, so that code computes that much less of the attention factor. `capability`: the name of what the recipe
    was fitted to (`engines.capability.NAMED`), None where the artifact expresses all of it. `static`: the last set
    serves every length. `lifted`: the model's sliding windows are gone, and every layer attends to every token.
    `written_as`: the family that the weights are of since the model's multipliers are in them; None: its own.
    `padded`: how many rows the embedding, and a head of its own, have beyond the model's.
    """

    __pydantic_config__: ClassVar = STRICT

    window: Annotated[int, Ge(1)]
    stored: str | None = None
    attention_scale: Annotated[float, Gt(0)] = 1.0
    capability: str | None = None
    static: bool = False
    lifted: bool = False
    padded: Annotated[int, Ge(0), Le(MAX_ADDED)] = 0
    written_as: str | None = None

    def recipe_for(self, family: str, recipe: Recipe) -> Recipe:
        """The recipe under the name of the weights' `family`, where that is the one that an artifact is written as."""
        return replace(recipe, family=family) if family == self.written_as else recipe


@dataclass(frozen=True)
class _Version1:
    """How version 1 of the manifest recorded a target's bakes: the option that names the stored type, and the
    capability where it was always the same."""

    stored: str = "dtype"
    capability: str | None = None


_VERSION_1 = {"gguf": _Version1(stored="type", capability="llama.cpp")}


def options_of_version_1(target: str, options: Mapping[str, Any], window: Any) -> dict[str, Any]:
    """The record's values, unchecked, as a manifest of version 1 spells them among its `options`."""
    spelled = _VERSION_1.get(target, _Version1())
    return {
        "window": options.get("window", window),
        "stored": options.get(spelled.stored),
        "attention_scale": options.get("folded_attention", 1.0),
        "capability": spelled.capability or ("portable" if options.get("portable") else None),
        "static": options.get("static_long", False),
    }
