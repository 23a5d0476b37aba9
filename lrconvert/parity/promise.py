# SPDX-License-Identifier: Apache-2.0
"""What an artifact has to compute, given how it was baked, and what that costs against the recipe itself.

A portable artifact has part of its attention factor in its weights. Its code is judged with weights folded, and
rounded, like that. That a fold does what the recipe asks of the original weights is a check of its own, reference
against reference and without rounding; what rounding costs is measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.base import numpy_dtype
from lrconvert.checkpoint.fold import folded
from lrconvert.engines.capability import LLAMA_CPP, LLAMA_CPP_STATIC, PORTABLE, divide_attention
from lrconvert.parity.cases import Budget, Case
from lrconvert.parity.measures import compare
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.parity.report import Row, judged
from lrconvert.parity.tolerances import PORTABLE as PORTABLE_TOLERANCES
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.tolerances import tolerance_for

CODE = "portable"


@dataclass(frozen=True)
class Promise:
    """`spec` on the weights of `model` is what the artifact has to compute. It stands for `kept`, which is `recipe`
    without what was `given_up`, on the weights of `source`, whose q and k are `scale` times smaller. (`source` is
    None where nothing was folded, or the weights at hand are folded already.)"""

    recipe: RopeSpec
    kept: RopeSpec
    given_up: list[str]
    spec: RopeSpec
    model: Model
    source: Model | None
    scale: float = 1.0


def promise(model: Model, spec: RopeSpec, options: Mapping[str, Any], artifact: Path, *, gguf: bool = False) -> Promise:
    """From the options of the artifact's manifest; `model` may be the artifact itself, which is folded already."""
    if gguf:
        return _promise_of_gguf(model, spec, options, artifact)
    if not options.get("portable"):
        return Promise(spec, spec, [], spec, model, None)
    kept, given_up = PORTABLE.fit(spec)
    scale = float(options["folded_attention"])
    promised = divide_attention(kept, scale)
    if scale == 1.0 or model.checkpoint.path.resolve() == artifact.resolve():
        return Promise(spec, kept, given_up, promised, model, None)
    rounded = options.get("dtype") is None  # else the judge rounds to what is stored
    return Promise(spec, kept, given_up, promised, folded(model, scale, rounded=rounded), model, scale)


def _promise_of_gguf(model: Model, spec: RopeSpec, options: Mapping[str, Any], artifact: Path) -> Promise:
    """Two sets for llama.cpp to choose from, or one, with all of the attention factor in the weights or none."""
    kept, given_up = LLAMA_CPP.fit(spec)
    if options.get("static_long"):
        kept, more = LLAMA_CPP_STATIC.fit(kept)
        given_up += more
    scale = float(options.get("folded_attention", 1.0))
    promised = divide_attention(kept, scale)
    if scale == 1.0 or model.checkpoint.path.resolve() == artifact.resolve():
        return Promise(spec, kept, given_up, promised, model, None)
    return Promise(spec, kept, given_up, promised, folded(model, scale, rounded=False), model, scale)


def lost(name: str, exact: RopeSpec, projected: RopeSpec, judge: ReferenceRunner, budget: Budget) -> list[Row]:
    """What a projection costs, by the reference alone, at the end of every tier that it changes."""
    changed = [tier.max_length for tier in exact.tiers if tier != projected.tier_for(tier.max_length)]
    cases = [end_case("lost", length, budget) for length in changed]
    judge.prepare(exact, cases)
    judge.prepare(projected, cases)
    reason = "what the recipe asks and this code can't express"
    rows = []
    for case in cases:
        measures = compare(judge.forward(exact, case), judge.forward(projected, case))
        rows.append(Row(name, case.name, "known", length=case.length, reason=reason, **vars(measures)))
    return rows


def fold_rows(
    made: Promise, judge: ReferenceRunner, *, stored_dtype: str | None, device: str, budget: Budget
) -> list[Row]:
    """Is the folded attention factor the recipe's, and what does rounding the scaled weights cost? `judge` has
    them as they are stored."""
    if made.source is None:
        return lost(CODE, made.recipe, made.kept, judge, budget) if made.given_up else []
    plain = ReferenceRunner(
        folded(made.source, 1.0, rounded=stored_dtype is None), device=device, stored_dtype=stored_dtype
    )
    reason = f"scaled weights rounded to {numpy_dtype(stored_dtype or made.source.dtype).name}, against unscaled ones"
    rows = exact_fold_rows(made, device=device, budget=budget)
    for length, ours, theirs in _at_ends(made, plain, judge, budget):
        measures = compare(ours, theirs)
        case = f"rounding of the fold at {length}"
        rows.append(Row(CODE, case, "known", length=length, reason=reason, **vars(measures)))
    return rows + (lost(CODE, made.recipe, made.kept, plain, budget) if made.given_up else [])


def exact_fold_rows(made: Promise, *, device: str, budget: Budget) -> list[Row]:
    """Reference against reference, without rounding: do the scaled weights undo what their code leaves out?"""
    assert made.source is not None
    unscaled, scaled = (
        ReferenceRunner(folded(made.source, scale, rounded=False), device=device) for scale in (1.0, made.scale)
    )
    return [
        judged(
            CODE,
            f"folded attention factor at {length}",
            length,
            compare(ours, theirs),
            tolerance_for(PORTABLE_TOLERANCES, scaled.dtype, length, name=CODE),
        )
        for length, ours, theirs in _at_ends(made, unscaled, scaled, budget)
    ]


def _at_ends(
    made: Promise, unscaled: ReferenceRunner, scaled: ReferenceRunner, budget: Budget
) -> Iterator[tuple[int, Any, Any]]:
    """At the end of every tier: its length, and what the unscaled and the scaled weights answer."""
    cases = [end_case("", tier.max_length, budget) for tier in made.kept.tiers]
    unscaled.prepare(made.kept, cases)
    scaled.prepare(made.spec, cases)
    for case in cases:
        yield case.length, unscaled.forward(made.kept, case), scaled.forward(made.spec, case)


def end_case(what: str, length: int, budget: Budget) -> Case:
    return Case(f"{what} at {length}", "forward", (length,), spread=length > budget.dense)
