# SPDX-License-Identifier: Apache-2.0
"""What engines other than transformers get right: two tiers, no start tokens, the formula's attention factor."""

from __future__ import annotations

from lrconvert.engines.capability import (
    PORTABLE,
    SAME,
    divide_attention,
    formula_attention_factor,
    native_hf,
    of_model,
)
from lrconvert.errors import UnsupportedError
from lrconvert.families import Family, ModelShape
from lrconvert.rope import RopeSpec


def make_portable(
    spec: RopeSpec, family: Family, shape: ModelShape, *, lossy: bool = False
) -> tuple[RopeSpec, float, list[str]]:
    """The spec that every engine can rotate, the scale that q and k have to carry for it, and what was dropped.
    `family` is the one whose class runs the folder.

    With the recipe's attention factor a and the engines' f, the scale is a/f and the spec's factor f. Raises
    `UnsupportedError` (exit code 4) that names all that engines can't do, unless `lossy`.
    """
    kept, losses = PORTABLE.fit(spec)
    native = native_hf(family)
    stated, moved = of_model(PORTABLE, shape).fit(kept)  # with the windows that the config will say
    if moved:
        raise UnsupportedError(
            f"--portable: {'; '.join(moved)}", remedy="Bake without --portable for the artifact's own code"
        )
    if native.first_only and native.fit(kept)[0].tiers != kept.tiers:
        raise UnsupportedError(
            f"--portable: {native.name} never uses the long set, whatever a config says",
            remedy="Bake without --portable for the artifact's own code",
        )
    if losses and not lossy:
        raise UnsupportedError(
            f"--portable: {'; '.join(losses)}",
            remedy="Bake without --portable for the artifact's own code, or drop this with --allow-lossy",
        )
    scale = kept.tiers[-1].attention_factor / formula_attention_factor(stated)
    scale = 1.0 if abs(scale - 1.0) <= SAME else scale
    return divide_attention(kept, scale), scale, losses
