# SPDX-License-Identifier: Apache-2.0
"""What the code of each runtime can express of a recipe, and what remains of one that asks for more.

One row per piece of code that rotates. A target that writes for such code projects the recipe first and
says what was lost; parity judges the code against the projection, and measures the loss beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lrconvert.families import Family
from lrconvert.rope import RopeSpec, Tier, longrope_attention_factor

# Attention factors closer than this are the same: both were rounded once, from the same formula.
SAME = 1e-9


@dataclass(frozen=True)
class Capability:
    """What one piece of rotating code can do.

    `tiers`: how many factor sets, None for any number. `attention`: a factor per tier, one for all tiers, or
    only the value of LongRoPE's formula from window / boundary. `row_tiers`: every row of a batch gets the
    tier of its own length. `switches`: decoding across a boundary is exact (cached keys are made again).
    `once`: the factor set is chosen before anything is read, and it is the last one, whatever the length.
    `context_step`: it is chosen for a context when that is made, by its length, which is a multiple of this many
    tokens; 0: not so.
    """

    name: str
    tiers: int | None
    start_tokens: bool
    attention: Literal["per tier", "one", "formula"]
    row_tiers: bool
    switches: bool
    once: bool = False
    context_step: int = 0


CUSTOM_HF = Capability("the artifact's own modeling code", None, True, "per tier", True, True)
NATIVE_HF = Capability("transformers' native code", 2, False, "one", False, False)
# Phi3Config of transformers 4.57 has no place for an attention factor (it accepts exactly three keys).
NATIVE_HF_FORMULA = Capability("transformers' native Phi-3 code", 2, False, "formula", False, False)


def native_hf(family: Family) -> Capability:
    """What native code can do with a config that every version of transformers loads."""
    return NATIVE_HF_FORMULA if family.hf_three_key_scaling else NATIVE_HF


# Both read the keys of native code, and serve the whole window (`engines` has the sources).
MLX = Capability("mlx-lm", 2, False, "formula", True, True, once=True)
VLLM = Capability("vLLM", 2, False, "formula", True, True, once=True)
# llama.cpp over a GGUF file: with both sets (chosen once a context), or with one for ever (--static-long).
LLAMA_CPP = Capability("llama.cpp", 2, False, "one", True, True, context_step=256)
LLAMA_CPP_STATIC = Capability("llama.cpp with one static set", 2, False, "one", True, True, once=True)
# An ONNX graph chooses by the positions of a call, row by row; a driver reads a sequence anew at a boundary.
ONNX = Capability("the graph's rotary function", None, True, "per tier", True, True)
# What the engines agree on, once the attention factor is in the weights (`lrconvert hf --portable`).
PORTABLE = Capability("a portable artifact", 2, False, "one", True, True)


def project(spec: RopeSpec, capability: Capability) -> tuple[RopeSpec, list[str]]:
    """The nearest that `capability` can express, and what was lost, in words. Nothing lost: same spec."""
    losses: list[str] = []
    tiers = spec.tiers
    if capability.tiers is not None and len(tiers) > capability.tiers:
        first, last = tiers[0], tiers[-1]
        losses.append(
            f"{capability.name} knows {capability.tiers} tiers: sequences of {first.max_length + 1} to "
            f"{tiers[-2].max_length} tokens use the factors of {last.max_length}"
        )
        tiers = (first, last)
    if not capability.start_tokens and (lost := [t for t in tiers if t.start_tokens > 1]):
        counts = ", ".join(f"{tier.start_tokens} (up to {tier.max_length})" for tier in lost)
        losses.append(f"{capability.name} knows no start tokens: the first {counts} positions are scaled too")
    if not capability.start_tokens:
        tiers = tuple(replace(tier, start_tokens=0) for tier in tiers)
    if capability.once and len(tiers) > 1:
        if tiers[0].factors != tiers[-1].factors:
            losses.append(
                f"{capability.name} chooses one factor set for all lengths: sequences of up to "
                f"{tiers[0].max_length} tokens use the factors of {tiers[-1].max_length}"
            )
        tiers = tiers[-1:]
    wanted = _attention(spec, tiers, capability)
    if wanted is not None:
        differ = [t for t in tiers if abs(t.attention_factor - wanted) > SAME * wanted]
        if differ:
            listed = ", ".join(f"{t.attention_factor:.6g} (up to {t.max_length})" for t in differ)
            rule = "knows one attention factor" if capability.attention == "one" else "computes its attention factor"
            losses.append(f"{capability.name} {rule}: {wanted:.6g} is used instead of {listed}")
        tiers = tuple(replace(tier, attention_factor=wanted) for tier in tiers)
    return replace(spec, tiers=tiers), losses


def by_context(spec: RopeSpec, capability: Capability) -> RopeSpec:
    """The spec that code with a `context_step` computes: a tier serves the contexts of its length, and a sequence
    needs a context that is as long as it or longer. So a boundary that is no multiple of the step falls to the
    next lower one, and below the first step there is no short set at all."""
    step = capability.context_step
    if not step:
        return spec
    head = [replace(tier, max_length=tier.max_length // step * step) for tier in spec.tiers[:-1]]
    return replace(spec, tiers=(*(tier for tier in head if tier.max_length), spec.tiers[-1]))


def folded_attention(spec: RopeSpec, scale: float) -> RopeSpec:
    """What remains to be rotated where the weights carry `scale` of every attention factor already."""
    return replace(spec, tiers=tuple(replace(t, attention_factor=t.attention_factor / scale) for t in spec.tiers))


def formula_attention(spec: RopeSpec) -> float:
    """The attention factor of LongRoPE's formula for a config with this window and these sets."""
    boundary = switch_length(spec, spec.tiers)
    return longrope_attention_factor(spec.window / boundary, boundary)


def _attention(spec: RopeSpec, tiers: tuple[Tier, ...], capability: Capability) -> float | None:
    """The one factor that `capability` will use, or None when each tier keeps its own."""
    if capability.attention == "per tier":
        return None
    if capability.attention == "one":
        return tiers[-1].attention_factor  # the extension is what the recipe is for
    return formula_attention(spec)


def switch_length(spec: RopeSpec, tiers: tuple[Tier, ...]) -> int:
    """The longest sequence of the short set, in code that has a short and a long one."""
    return tiers[0].max_length if len(tiers) > 1 else spec.original_window
