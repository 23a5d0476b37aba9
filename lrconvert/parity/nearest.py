# SPDX-License-Identifier: Apache-2.0
"""Is the recipe nearer to what an artifact answers than any likely mistake is?

Where products are coarse (8-bit activations), their noise has a KL like that of a small rope error: a bound alone
would let a forgotten attention factor of 1.06 pass. Noise is the same distance from every hypothesis, an error is
not: so the answer is held against the reference with the recipe and with each mistake, and the recipe has to win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from lrconvert.artifact.checks import Row
from lrconvert.parity.cases import Case
from lrconvert.parity.judge import Judge
from lrconvert.parity.measures import compare
from lrconvert.rope import RopeSpec, Tier

TOKENS = 1024
# A mistake whose own effect is a smaller part of the noise can't be told by so many tokens (nor does it matter).
TELLING = 0.3

Answer = Callable[[Case], np.ndarray]


def nearest(name: str, spec: RopeSpec, judge: Judge, answer: Answer, *, contexts: bool) -> list[Row]:
    """A row for every tier. `answer` asks the artifact; `contexts`: the room that a sequence has chooses its tier, not
    its length."""
    return [_row(name, _case(spec, tier, contexts), spec, tier, judge, answer) for tier in spec.tiers]


def _case(spec: RopeSpec, tier: Tier, contexts: bool) -> Case:
    room = spec.tiers[0].max_length if tier is spec.tiers[0] else spec.tiers[0].max_length + 1
    if len(spec.tiers) == 1:  # any context will do, and the longest may not fit
        room = min(TOKENS, room)
    if contexts:
        return Case(f"nearest to the recipe, context of {room}", "forward", (min(TOKENS, room),), context=room)
    length = min(TOKENS, room) if tier is spec.tiers[0] else room
    return Case(f"nearest to the recipe at {length}", "forward", (length,), spread=length > TOKENS)


def _row(name: str, case: Case, spec: RopeSpec, tier: Tier, judge: Judge, answer: Answer) -> Row:
    found, right = answer(case), judge.forward(spec, case)
    measures = compare(right, found)
    apart: dict[str, float] = {}
    for what, rival in _rivals(spec, tier):
        wrong = judge.forward(rival, case)
        if compare(right, wrong).kl_mean >= TELLING * measures.kl_mean:
            apart[what] = compare(wrong, found).kl_mean
    if not apart:
        reason = "no mistake would show beside the noise of these types"
        return Row(name, case.name, "known", length=case.length, reason=reason, **vars(measures))
    closest = min(apart, key=lambda what: apart[what])
    passed = measures.kl_mean < apart[closest]
    reason = "" if passed else f"it answers as with {closest} (KL {apart[closest]:.1e}), not as the recipe says"
    verdict = "pass" if passed else "fail"
    return Row(name, case.name, verdict, length=case.length, bound=apart[closest], reason=reason, **vars(measures))


def _rivals(spec: RopeSpec, tier: Tier) -> Iterator[tuple[str, RopeSpec]]:
    """What else the artifact might compute in a context of this tier."""
    plain = Tier(tier.max_length, (1.0,) * len(tier.factors))
    others = [other for other in spec.tiers if other.factors != tier.factors]
    changed = {
        "no attention factor": replace(tier, attention_factor=1.0),
        "the attention factor twice": replace(tier, attention_factor=tier.attention_factor**2),
        "plain RoPE": plain,
        "factors as multipliers": replace(tier, factors=tuple(1 / factor for factor in tier.factors)),
        **{f"the factors of {other.max_length}": replace(tier, factors=other.factors) for other in others},
    }
    for what, made in changed.items():
        if made != tier:
            yield what, replace(spec, tiers=tuple(made if other is tier else other for other in spec.tiers))
