# SPDX-License-Identifier: Apache-2.0
"""What an artifact has to compute, given how it was baked, and what that costs against the recipe itself.

A portable artifact has part of its attention factor in its weights. Its code is judged with weights folded, and
rounded, like that. That a fold does what the recipe asks of the original weights is a check of its own, reference
against reference and without rounding; what rounding costs is measured beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.base import numpy_dtype
from lrconvert.checkpoint.fold import folded
from lrconvert.expressible import PORTABLE, folded_attention, project
from lrconvert.parity.cases import Budget, Case
from lrconvert.parity.judge import Judge
from lrconvert.parity.measures import compare
from lrconvert.parity.report import Row, judged
from lrconvert.parity.tolerances import tolerance_for
from lrconvert.rope import RopeSpec

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


def promise(model: Model, spec: RopeSpec, options: Mapping[str, Any], artifact: Path) -> Promise:
    """From the options of the artifact's manifest; `model` may be the artifact itself, which is folded already."""
    if not options.get("portable"):
        return Promise(spec, spec, [], spec, model, None)
    kept, given_up = project(spec, PORTABLE)
    scale = float(options["folded_attention"])
    promised = folded_attention(kept, scale)
    if scale == 1.0 or model.checkpoint.path.resolve() == artifact.resolve():
        return Promise(spec, kept, given_up, promised, model, None)
    rounded = options.get("dtype") is None  # else the judge rounds to what is stored
    return Promise(spec, kept, given_up, promised, folded(model, scale, rounded=rounded), model, scale)


def lost(name: str, exact: RopeSpec, projected: RopeSpec, judge: Judge, budget: Budget) -> list[Row]:
    """What a projection costs, by the reference alone, at the end of every tier that it changes."""
    changed = [tier.max_length for tier in exact.tiers if tier != projected.tier_for(tier.max_length)]
    cases = [_end("lost", length, budget) for length in changed]
    judge.prepare(exact, cases)
    judge.prepare(projected, cases)
    reason = "what the recipe asks and this code can't express"
    rows = []
    for case in cases:
        measures = compare(judge.forward(exact, case), judge.forward(projected, case))
        rows.append(Row(name, case.name, "known", length=case.length, reason=reason, **vars(measures)))
    return rows


def fold_rows(made: Promise, judge: Judge, *, stored_dtype: str | None, device: str, budget: Budget) -> list[Row]:
    """Is the folded attention factor the recipe's, and what does rounding the scaled weights cost? `judge` has
    them as they are stored."""
    if made.source is None:
        return lost(CODE, made.recipe, made.kept, judge, budget) if made.given_up else []
    lengths = [tier.max_length for tier in made.kept.tiers]

    def answers(by: Judge, spec: RopeSpec, what: str = "") -> list[Any]:
        cases = [_end(what, length, budget) for length in lengths]
        by.prepare(spec, cases)
        return [by.forward(spec, case) for case in cases]

    def judge_of(scale: float, stored: bool) -> Judge:
        rounded = stored and stored_dtype is None
        model = folded(made.source or made.model, scale, rounded=rounded)
        return Judge(model, device=device, stored_dtype=stored_dtype if stored else None)

    exact = zip(answers(judge_of(1.0, False), made.kept), answers(judge_of(made.scale, False), made.spec), strict=True)
    rows = [
        judged(
            CODE,
            f"folded attention factor at {length}",
            length,
            compare(*pair),
            tolerance_for(CODE, judge.dtype, length),
        )
        for length, pair in zip(lengths, exact, strict=True)
    ]
    plain = judge_of(1.0, True)
    stored = zip(answers(plain, made.kept), answers(judge, made.spec), strict=True)
    reason = f"scaled weights rounded to {numpy_dtype(stored_dtype or made.source.dtype).name}, against unscaled ones"
    rows += [
        Row(CODE, f"rounding of the fold at {length}", "known", length=length, reason=reason, **vars(compare(*pair)))
        for length, pair in zip(lengths, stored, strict=True)
    ]
    return rows + (lost(CODE, made.recipe, made.kept, plain, budget) if made.given_up else [])


def _end(what: str, length: int, budget: Budget) -> Case:
    return Case(f"{what} at {length}", "forward", (length,), spread=length > budget.dense)
