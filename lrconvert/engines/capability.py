# SPDX-License-Identifier: Apache-2.0
"""What the code of each runtime can express of a recipe, and what remains of one that asks for more.

One row per piece of code that rotates. A target that writes for such code fits the recipe to it first and says
what was dropped; parity compares the code with the fitted recipe, and measures what dropping cost beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lrconvert.families import Family, ModelShape
from lrconvert.rope import RopeSpec, Tier, longrope_attention_factor

# Attention factors closer than this are the same: both were rounded once, from the same formula.
SAME = 1e-9

Tiers = tuple[Tier, ...]


@dataclass(frozen=True)
class Capability:
    """What one piece of rotating code can do.

    `tiers`: how many factor sets, None for any number. `attention`: a factor per tier, one for all tiers, or
    only the value of LongRoPE's formula from window / boundary. `row_tiers`: every row of a batch gets the
    tier of its own length. `switches`: decoding across a boundary is exact (cached keys are made again).
    `once`: the factor set is chosen before anything is read, and it is the last one, whatever the length.
    `first_only`: it is always the first one; the attention factor is that of the sequence's tier all the same.
    `context_step`: it is chosen for a context when that is made, by its length, which is a multiple of this many
    tokens; 0: not so.
    `boundary`: the only length after which the set can change, because its key also describes the model; None: any.
    """

    name: str
    tiers: int | None
    start_tokens: bool
    attention: Literal["per tier", "one", "formula"]
    row_tiers: bool
    switches: bool
    once: bool = False
    first_only: bool = False
    context_step: int = 0
    boundary: int | None = None

    def fit(self, spec: RopeSpec) -> tuple[RopeSpec, list[str]]:
        """The closest spec that this code can express, and what was dropped, in words."""
        tiers, dropped = spec.tiers, list[str]()
        sets = (self._limit_tiers, self._drop_start_tokens, self._choose_once, self._keep_first)
        for step in (*sets, self._fix_attention):
            tiers, words = step(spec, tiers)
            dropped += words
        alone = self.boundary is not None and len(tiers) == 1  # its key has to be stated all the same
        return replace(spec, tiers=tiers, **({"original_window": self.boundary} if alone else {})), dropped

    def round_boundaries(self, spec: RopeSpec) -> RopeSpec:
        """The spec that code with a `context_step` computes. A tier serves the contexts of its length, and a sequence
        needs a context as long as itself or longer. So a boundary that is no multiple of the step falls to the next
        lower one, and below the first step there is no short set at all."""
        step = self.context_step
        if not step:
            return spec
        head = [replace(tier, max_length=tier.max_length // step * step) for tier in spec.tiers[:-1]]
        return replace(spec, tiers=(*(tier for tier in head if tier.max_length), spec.tiers[-1]))

    # The steps of `fit`: each returns the tiers that are left, and what it dropped.

    def _limit_tiers(self, spec: RopeSpec, tiers: Tiers) -> tuple[Tiers, list[str]]:
        if self.tiers is None or len(tiers) <= self.tiers:
            return tiers, []
        first, last = tiers[0], tiers[-1]
        words = (
            f"{self.name} knows {self.tiers} tiers: sequences of {first.max_length + 1} to "
            f"{tiers[-2].max_length} tokens use the factors of {last.max_length}"
        )
        return (first, last), [words]

    def _drop_start_tokens(self, spec: RopeSpec, tiers: Tiers) -> tuple[Tiers, list[str]]:
        if self.start_tokens:
            return tiers, []
        scaled = [tier for tier in tiers if tier.start_tokens > 1]
        counts = ", ".join(f"{tier.start_tokens} (up to {tier.max_length})" for tier in scaled)
        words = [f"{self.name} knows no start tokens: the first {counts} positions are scaled too"] if scaled else []
        return tuple(replace(tier, start_tokens=0) for tier in tiers), words

    def _choose_once(self, spec: RopeSpec, tiers: Tiers) -> tuple[Tiers, list[str]]:
        first, last = tiers[0], tiers[-1]
        fixed = self.boundary is not None and first.max_length != self.boundary
        if not (self.once or fixed) or len(tiers) == 1:
            return tiers, []
        rule = "chooses one factor set for all lengths"
        if not self.once:
            rule = f"changes sets after {self.boundary} tokens alone, from where on the model's queries grow"
        words = f"{self.name} {rule}: sequences of up to {first.max_length} tokens use the factors of {last.max_length}"
        return (last,), [words] if first.factors != last.factors else []

    def _keep_first(self, spec: RopeSpec, tiers: Tiers) -> tuple[Tiers, list[str]]:
        first, last = tiers[0], tiers[-1]
        if not self.first_only or first.factors == last.factors:
            return tiers, []
        words = (
            f"{self.name} never uses the long factors: sequences of more than {first.max_length} tokens use those of "
            f"{first.max_length}"
        )
        return tuple(replace(tier, factors=first.factors) for tier in tiers), [words]

    def _fix_attention(self, spec: RopeSpec, tiers: Tiers) -> tuple[Tiers, list[str]]:
        if self.attention == "per tier":
            return tiers, []
        if self.attention == "one":
            wanted, rule = tiers[-1].attention_factor, "knows one attention factor"  # a recipe is for the long tier
        else:
            wanted, rule = formula_attention_factor(spec), "computes its attention factor"
        differ = [tier for tier in tiers if abs(tier.attention_factor - wanted) > SAME * wanted]
        listed = ", ".join(f"{tier.attention_factor:.6g} (up to {tier.max_length})" for tier in differ)
        words = [f"{self.name} {rule}: {wanted:.6g} is used instead of {listed}"] if differ else []
        return tuple(replace(tier, attention_factor=wanted) for tier in tiers), words


CUSTOM_HF = Capability("the artifact's own modeling code", None, True, "per tier", True, True)
NATIVE_HF = Capability("transformers' native code", 2, False, "one", False, False)
# Phi3Config of transformers 4.57 has no place for an attention factor (it accepts exactly three keys). `generate` of
# this class empties its cache where a sequence grows past the original window.
NATIVE_HF_FORMULA = Capability("transformers' native Phi-3 code", 2, False, "formula", False, True)

# Its attention factors are keys of their own. 5.x makes its frequencies without a length (4.57 does not).
NATIVE_HF_MSCALES = Capability(
    "transformers' native Phi-3.5-MoE code", 2, False, "per tier", False, False, first_only=True
)
_NATIVE = {"full": NATIVE_HF, "three keys": NATIVE_HF_FORMULA, "mscales": NATIVE_HF_MSCALES}


def native_hf(family: Family, shape: ModelShape | None = None) -> Capability:
    """What native code can do with a config that every version of transformers loads; of models of this `shape`."""
    return of_model(_NATIVE[family.hf_scaling], shape)


def native_config(family: Family, shape: ModelShape) -> Capability:
    """What such a config can say, whether native code makes use of it or not: other programs read it too."""
    return replace(native_hf(family, shape), first_only=False)


def of_model(capability: Capability, shape: ModelShape | None) -> Capability:
    """What code can do of a model. Where queries grow, code of two sets reads from where on, and where the sets change,
    from one key; code of any number has keys of its own for sets."""
    scale = None if shape is None else shape.query_scale
    return capability if scale is None or capability.tiers is None else replace(capability, boundary=scale.window)


# Both read the keys of native code, and serve the whole window (`engines` has the sources).
MLX = Capability("mlx-lm", 2, False, "formula", True, True, once=True)
VLLM = Capability("vLLM", 2, False, "formula", True, True, once=True)
# llama.cpp over a GGUF file with both sets, chosen once a context; `static` is the file with one for ever.
LLAMA_CPP = Capability("llama.cpp", 2, False, "one", True, True, context_step=256)
# An ONNX graph chooses by the positions of a call, row by row; a driver reads a sequence anew at a boundary.
ONNX = Capability("the graph's rotary function", None, True, "per tier", True, True)
# What the engines agree on, once the attention factor is in the weights (`lrconvert hf --portable`).
PORTABLE = Capability("a portable artifact", 2, False, "one", True, True)

# What every one of them can do.
ANY = Capability("every runtime", 2, False, "formula", False, False)

# What a search can be for: the freedoms of its factor sets.
SEARCHABLE = {
    "any": ANY,
    "hf": CUSTOM_HF,
    "hf-native": NATIVE_HF,
    "gguf": LLAMA_CPP,
    "onnx": ONNX,
    "vllm": VLLM,
    "mlx": MLX,
}

# What a recipe can be fitted to when it is baked, by the name that a bake record keeps.
NAMED = {"portable": PORTABLE, "llama.cpp": LLAMA_CPP}


def static(capability: Capability) -> Capability:
    """The same code with one set for ever."""
    return replace(capability, name=f"{capability.name} with one static set", once=True, context_step=0)


# --- attention factors -----------------------------------------------------------------------------------


def divide_attention(spec: RopeSpec, scale: float) -> RopeSpec:
    """What remains to be rotated where the weights already carry `scale` of every attention factor."""
    return replace(spec, tiers=tuple(replace(t, attention_factor=t.attention_factor / scale) for t in spec.tiers))


def formula_attention_factor(spec: RopeSpec) -> float:
    """The attention factor of LongRoPE's formula for a config with this window and these sets."""
    boundary = switch_length(spec)
    return longrope_attention_factor(spec.window / boundary, boundary)


def switch_length(spec: RopeSpec) -> int:
    """The longest sequence of the short set, in code that has a short and a long one."""
    return spec.tiers[0].max_length if len(spec.tiers) > 1 else spec.original_window
