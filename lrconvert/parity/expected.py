# SPDX-License-Identifier: Apache-2.0
"""What an artifact has to compute, given how it was baked, and how far that is from the recipe itself.

An artifact may have part of its attention factor in its weights. Its code is compared with a reference whose weights
are folded and rounded in the same way. A separate check, reference against reference and without rounding, shows that
the fold computes the recipe. What rounding costs is measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.artifact.checks import Row
from lrconvert.artifact.record import BakeRecord
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.base import numpy_dtype
from lrconvert.checkpoint.fold import folded, rewritten
from lrconvert.checkpoint.padding import padded
from lrconvert.engines.capability import NAMED, divide_attention, static
from lrconvert.errors import InputError
from lrconvert.parity.cases import Budget, Case
from lrconvert.parity.measures import compare
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.parity.report import case_row
from lrconvert.parity.tolerances import PORTABLE as PORTABLE_TOLERANCES
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.tolerances import tolerance_for

CODE, MULTIPLIERS = "portable", "multipliers"  # what was folded


@dataclass(frozen=True)
class Expected:
    """What an artifact has to compute: `spec` on the weights of `model`.

    It is equivalent to `kept`, which is `recipe` without what was `dropped`, on the weights of `source`, whose q and k
    are `scale` times smaller, and whose multipliers stand beside the weights where these have them (`multiplied`).
    `source` is None where nothing was folded, or the given weights are folded already.
    `limited` is the model with the sliding windows that the bake lifted, None where it lifted none.
    """

    recipe: RopeSpec
    kept: RopeSpec
    dropped: list[str]
    spec: RopeSpec
    model: Model
    source: Model | None = None
    scale: float = 1.0
    limited: Model | None = None
    multiplied: bool = False

    @property
    def code(self) -> str:
        """What rows on the fold are called."""
        return MULTIPLIERS if self.multiplied else CODE


def expected(model: Model, spec: RopeSpec, record: BakeRecord, artifact: Path) -> Expected:
    """From the record of the bake; `model` may be the artifact itself, which is folded and padded already.

    Raises `InputError` for a capability that isn't known.
    """
    stored = model.checkpoint.path.resolve() == artifact.resolve()
    if record.padded and not stored:
        model = padded(model, record.padded)
    limited = model if record.lifted and model.shape.sliding else None
    model = model.lifted() if record.lifted else model
    kept, dropped = spec, []
    if record.capability is not None:
        if record.capability not in NAMED:
            raise InputError(
                f"{artifact}: baked for {record.capability!r:.60}, which this lrconvert doesn't know",
                remedy=f"Known: {', '.join(NAMED)}",
            )
        capability = NAMED[record.capability]
        kept, dropped = capability.fit(spec)
        if record.static:
            kept, more = static(capability).fit(kept)
            dropped += more
    scale = record.attention_scale
    computed = divide_attention(kept, scale)
    multiplied = record.written_as is not None
    if multiplied and record.written_as not in (model.family.name, model.family.hf_written):
        raise InputError(f"{artifact}: written as {record.written_as!r:.60}, which {model.family.name} never is")
    if stored or (scale == 1.0 and not multiplied):
        return Expected(spec, kept, dropped, computed, model, limited=limited)
    rounded = record.stored is None  # else they are rounded once, when they are stored
    made = rewritten(model, scale, multipliers=multiplied, rounded=rounded)
    return Expected(spec, kept, dropped, computed, made, model, scale, limited, multiplied)


def lost(name: str, exact: RopeSpec, fitted: RopeSpec, reference: ReferenceRunner, budget: Budget) -> Iterator[Row]:
    """What fitting a recipe to code costs, by the reference alone, at the end of every tier that it changes."""
    reason = "what the recipe asks for and this code can't express"
    for case in [end_case("lost", length, budget) for length in changed_tiers(exact, fitted)]:
        measures = compare(reference.forward(exact, case), reference.forward(fitted, case))
        yield Row(name, case.name, "known", length=case.length, reason=reason, **vars(measures))


def changed_tiers(exact: RopeSpec, fitted: RopeSpec) -> list[int]:
    """The ends of the recipe's tiers that fitting it to code changes."""
    return [tier.max_length for tier in exact.tiers if tier != fitted.tier_for(tier.max_length)]


def lifted_rows(wanted: Expected, plain: ReferenceRunner, *, device: str, budget: Budget) -> list[Row]:
    """What lifting sliding windows costs, by the reference alone, at the end of the window that the model has.

    A window counts tokens, not positions, so those between may not be left out: where the budget has no room for more
    tokens than a window, there is nothing to see.
    """
    assert wanted.limited is not None
    length = min(wanted.limited.shape.window, wanted.kept.window)
    name, count = f"lifted sliding window at {length}", min(length, budget.dense)
    width = min(each for each in wanted.limited.shape.sliding if each)
    if count <= width < length:
        reason = f"its cost shows beyond {width} consecutive tokens, which are beyond this device's budget"
        return [Row("lifted", name, "skipped", length=length, reason=f"{reason}; use a GPU, or --full")]
    cut = length > count
    case = Case(name, "forward", (length,), spread=cut, consecutive=cut, start=length - count)
    weights = plain.weights if wanted.source is None else None  # folded ones are not this model's
    limited = ReferenceRunner(wanted.limited, device=device, weights=weights)
    measures = compare(limited.forward(wanted.kept, case), plain.forward(wanted.kept, case))
    reason = "the model's layers attend to the last tokens only, and the artifact's to all"
    return [Row("lifted", name, "known", length=length, reason=reason, **vars(measures))]


def rounding_rows(wanted: Expected, rounded: ReferenceRunner, plain: ReferenceRunner, budget: Budget) -> list[Row]:
    """What rounding the scaled weights costs: `rounded` has them as they are stored, `plain` the unscaled ones."""
    assert wanted.source is not None
    stored = plain.stored_dtype or wanted.source.dtype
    reason = f"scaled weights rounded to {numpy_dtype(stored).name}, against unscaled ones"
    rows = []
    for length, ours, theirs in _at_ends(wanted, plain, rounded, budget):
        measures = compare(ours, theirs)
        case = f"rounding of the fold at {length}"
        rows.append(Row(wanted.code, case, "known", length=length, reason=reason, **vars(measures)))
    return rows


def exact_fold_rows(wanted: Expected, *, device: str, budget: Budget) -> list[Row]:
    """Reference against reference, without rounding: do the scaled weights undo what their code leaves out?"""
    assert wanted.source is not None
    scaled_weights = rewritten(wanted.source, wanted.scale, multipliers=wanted.multiplied, rounded=False)
    unscaled, scaled = (
        ReferenceRunner(model, device=device) for model in (folded(wanted.source, 1.0, rounded=False), scaled_weights)
    )
    what = "multipliers" if wanted.multiplied else "attention factor"
    return [
        case_row(
            wanted.code,
            f"folded {what} at {length}",
            length,
            compare(ours, theirs),
            tolerance_for(PORTABLE_TOLERANCES, scaled.dtype, length, name=CODE),
        )
        for length, ours, theirs in _at_ends(wanted, unscaled, scaled, budget)
    ]


def _at_ends(
    wanted: Expected, unscaled: ReferenceRunner, scaled: ReferenceRunner, budget: Budget
) -> Iterator[tuple[int, Any, Any]]:
    """At the end of every tier: its length, and what the unscaled and the scaled weights answer."""
    for case in [end_case("", tier.max_length, budget) for tier in wanted.kept.tiers]:
        yield case.length, unscaled.forward(wanted.kept, case), scaled.forward(wanted.spec, case)


def end_case(what: str, length: int, budget: Budget) -> Case:
    return Case(f"{what} at {length}", "forward", (length,), spread=length > budget.alone)
