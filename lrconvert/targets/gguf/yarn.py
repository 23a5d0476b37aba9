# SPDX-License-Identifier: Apache-2.0
"""Sets that llama.cpp can express for architectures whose C++ ignores factors: its own YaRN, or no scaling at all.

Its YaRN is one set for every length. The attention factor is 0.1 ln s + 1 times `attn_factor`, so any can be written.
The ramp is between 32 turns and 1: keys for other numbers exist, and hardly any architecture reads them.
"""

from __future__ import annotations

import math

from lrconvert.errors import UnsupportedError, UsageError
from lrconvert.families import Family, longrope_architecture
from lrconvert.families.base import GGUF_SLIDING_SCALED
from lrconvert.rope import RopeSpec, Yarn, as_yarn, yarn_attention_factor
from lrconvert.targets.gguf.layout import Value

BETAS = (32.0, 1.0)
REMEDY = (
    "llama.cpp's own YaRN serves a recipe that is one YaRN for every length: "
    "`recipe derive MODEL --method yarn --factor S --uniform`, baked with --static-long; or use `lrconvert hf`"
)


def architecture_for(family: Family, spec: RopeSpec, *, static: bool, asked: str | None = None) -> str:
    """The architecture of a family's files: the one that is `asked` for, one that honours factors, else the family's
    own, where that can do without them.

    `UnsupportedError` for a spec or a family that it can't express, `UsageError` for an architecture that isn't the
    family's.
    """
    if family.gguf_differs is not None:
        raise UnsupportedError(
            f"llama.cpp computes another model from a GGUF of {family.name}: {family.gguf_differs}",
            remedy="Use `lrconvert hf` or `lrconvert onnx`",
        )
    if asked is not None:
        known = {family.gguf_longrope, family.gguf_other} - {None}
        if asked not in known:
            listed = ", ".join(sorted(name for name in known if name)) or "none"
            raise UsageError(
                f"--architecture {asked}: {family.name} can't be written as it", remedy=f"It has: {listed}"
            )
        return asked
    if family.gguf_longrope is not None:
        return longrope_architecture(family)
    if len(spec.tiers) > 1 and not static:
        what = f"the recipe has {len(spec.tiers)} sets"
    elif (yarn := _formula(spec)) is None and not _plain(spec):
        what = "its set is no YaRN"
    elif yarn is not None and (yarn.beta_fast, yarn.beta_slow) != BETAS:
        what = f"its set is a YaRN whose ramp is not the usual one, between {BETAS[0]:g} turns and {BETAS[1]:g}"
    else:
        return family.gguf_architecture
    other = f"--architecture {family.gguf_other} takes any two sets; " if family.gguf_other else ""
    raise UnsupportedError(
        f"llama.cpp's C++ ignores rope factors for {family.name}, and {what}: a GGUF of it would run unscaled",
        remedy=f"{other}{REMEDY}",
    )


def by_formula(family: Family, architecture: str) -> bool:
    """Whether files of this architecture have YaRN's keys instead of factors."""
    return family.gguf_longrope is None and architecture == family.gguf_architecture


def check_attention(family: Family, architecture: str, spec: RopeSpec) -> None:
    """`UnsupportedError` for an attention factor that would also change layers that slide."""
    key = f"{architecture}.rope.scaling.attn_factor"
    beyond = formula_keys(architecture, spec).get(key, 1.0)
    if architecture in GGUF_SLIDING_SCALED and beyond != 1.0:
        raise UnsupportedError(
            f"an attention factor of {spec.tiers[-1].attention_factor:.6g}, which is not YaRN's own: llama.cpp's "
            f"{architecture} would multiply layers that slide with it too, and {family.name} doesn't",
            remedy="`recipe derive --method yarn` takes YaRN's own, 0.1 ln s + 1; or use `lrconvert hf`",
        )


def formula_keys(architecture: str, spec: RopeSpec) -> dict[str, Value]:
    """The keys of the last set, which serves every length, for code that ignores factors."""
    keys: dict[str, Value] = {"context_length": spec.window}
    yarn = _formula(spec)
    if yarn is None:
        keys["rope.scaling.type"] = "none"
    else:
        keys["rope.scaling.type"] = "yarn"
        keys["rope.scaling.factor"] = yarn.ratio
        keys["rope.scaling.original_context_length"] = yarn.original_window
        beyond = spec.tiers[-1].attention_factor / yarn_attention_factor(yarn.ratio)
        keys["rope.scaling.attn_factor"] = 1.0 if math.isclose(beyond, 1.0, rel_tol=1e-9) else beyond
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _formula(spec: RopeSpec) -> Yarn | None:
    return as_yarn(spec.tiers[-1].factors, spec.base, spec.original_window)


def _plain(spec: RopeSpec) -> bool:
    last = spec.tiers[-1]
    return set(last.factors) == {1.0} and last.attention_factor == 1.0
