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
from lrconvert.engines.ways_out import remedy, ways_out
from lrconvert.errors import UnsupportedError
from lrconvert.families import Family, ModelShape
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec

OWN_CODE = "bake without --portable for the artifact's own code"


def make_portable(
    recipe: Recipe, spec: RopeSpec, family: Family, shape: ModelShape, *, lossy: bool = False
) -> tuple[RopeSpec, float, list[str]]:
    """The spec that every engine can rotate of a recipe, which was resolved as `spec`; the scale that q and k have to
    carry for it; what was dropped. `family` is the one whose class runs the folder.

    With the recipe's attention factor a and the engines' f, the scale is a/f and the spec's factor f. Raises
    `UnsupportedError` (exit code 4) that names all that engines can't do, unless `lossy`.
    """
    kept, losses = PORTABLE.fit(spec)
    native = native_hf(family)
    stated, moved = of_model(PORTABLE, shape).fit(kept)  # with the windows that the config will say
    if moved:
        raise UnsupportedError(f"--portable: {'; '.join(moved)}", remedy=remedy(OWN_CODE))
    if native.first_only and native.fit(kept)[0].tiers != kept.tiers:
        raise UnsupportedError(
            f"--portable: {native.name} never uses the long set, whatever a config says",
            remedy=remedy(OWN_CODE),
        )
    if losses and not lossy:
        raise UnsupportedError(
            f"--portable: {'; '.join(losses)}",
            remedy=remedy(*ways_out(PORTABLE, recipe, spec), OWN_CODE, "drop this with --allow-lossy"),
        )
    scale = kept.tiers[-1].attention_factor / formula_attention_factor(stated)
    scale = 1.0 if abs(scale - 1.0) <= SAME else scale
    return divide_attention(kept, scale), scale, losses
