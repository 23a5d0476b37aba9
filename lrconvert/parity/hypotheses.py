# SPDX-License-Identifier: Apache-2.0
"""Does the recipe explain an artifact's answers better than any likely mistake does?

Where products are imprecise (8-bit activations), their noise has a KL like that of a small rope error: a bound alone
would let a forgotten attention factor of 1.06 pass. Noise is the same distance from every hypothesis, an error is not.
So the answer is compared with the reference under the recipe and under each mistake, and the recipe has to be closest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from lrconvert.parity.cases import Case, kept, stream
from lrconvert.parity.measures import compare
from lrconvert.parity.opened import Opened
from lrconvert.parity.report import Row
from lrconvert.parity.tolerances import ROUTED
from lrconvert.rope import RopeSpec, Tier

TOKENS = 1024
# Of the noise. So many tokens can't distinguish a mistake with a smaller effect, nor does it matter.
SMALLEST_EFFECT = 0.3
# A mistake that is this many times as far from the answer as the recipe, over the first half of the tokens, is no
# explanation: the reference need not read the other half for it. On SmolLM2-135M in Q4_1 four of five mistakes are 24
# times as far; what a fifth changes shows in the whole prompt alone.
CLEARLY_FARTHER = 4.0

Answer = Callable[[Case], np.ndarray]


def closest_hypothesis(opened: Opened, answer: Answer) -> Iterator[Row]:
    """A row for every tier, when it is known. `answer` asks the artifact."""
    contexts = "contexts" in opened.session.answers  # the size of a context chooses its tier, not a length
    for tier in opened.spec.tiers:
        yield _row(_case(opened.spec, tier, contexts), tier, opened, answer)


def _case(spec: RopeSpec, tier: Tier, contexts: bool) -> Case:
    boundary = spec.tiers[0].max_length
    length = boundary if tier is spec.tiers[0] else boundary + 1
    if len(spec.tiers) == 1:  # any length will do, and the longest may not fit
        length = min(TOKENS, length)
    if contexts:
        return Case(f"closest hypothesis, context of {length}", "forward", (min(TOKENS, length),), context=length)
    length = min(TOKENS, length) if tier is spec.tiers[0] else length
    return Case(f"closest hypothesis at {length}", "forward", (length,), spread=length > TOKENS)


def _row(case: Case, tier: Tier, opened: Opened, answer: Answer) -> Row:
    name, spec, reference = opened.name, opened.spec, opened.reference
    found, right = answer(case), reference.forward(spec, case)
    share = ROUTED if opened.routed else 1.0  # rounding chooses other experts for the rest
    measures = compare(right, found, share)
    distances: dict[str, float] = {}
    half = _FirstHalf(case, opened, found, right, share)
    for what, mistake in _mistakes(spec, tier):
        if (farther := half.farther(mistake)) is not None:
            distances[what] = farther
            continue
        wrong = reference.forward(mistake, case)
        if compare(right, wrong, share).kl_mean >= SMALLEST_EFFECT * measures.kl_mean:
            distances[what] = compare(wrong, found, share).kl_mean
    if not distances:
        reason = "no mistake would stand out from the rounding of these types"
        return Row(name, case.name, "known", length=case.length, reason=reason, **vars(measures))
    closest = min(distances, key=lambda what: distances[what])
    passed = measures.kl_mean < distances[closest]
    reason = "" if passed else f"the output matches {closest} (KL {distances[closest]:.1e}), not the recipe"
    verdict = "pass" if passed else "fail"
    return Row(name, case.name, verdict, length=case.length, bound=distances[closest], reason=reason, **vars(measures))


class _FirstHalf:
    """The answers to the first half of a prompt, which a prefix computes as the whole does."""

    def __init__(self, case: Case, opened: Opened, found: np.ndarray, right: np.ndarray, share: float) -> None:
        self._case, self._opened, self._share = case, opened, share
        self._length = case.length // 2
        indices = kept(case.length)
        inside = indices < self._length
        self._indices = indices[inside]
        self._found = found[inside]
        # A spread prompt is short already, and chooses its tier by its last position.
        self._of_recipe = None if case.spread else compare(right[inside], self._found, share).kl_mean

    def farther(self, mistake: RopeSpec) -> float | None:
        """The distance of a mistake that is clearly farther from the answer than the recipe; None where the whole
        prompt has to tell."""
        if self._of_recipe is None:
            return None
        tokens = stream(self._opened.vocabulary, self._length)
        length = self._case.context or self._case.length
        wrong = self._opened.reference.answer(mistake, tokens, length, self._indices)
        distance = compare(wrong, self._found, self._share).kl_mean
        return distance if distance > CLEARLY_FARTHER * self._of_recipe else None


def _mistakes(spec: RopeSpec, tier: Tier) -> Iterator[tuple[str, RopeSpec]]:
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
    for what, mistake in changed.items():
        if mistake != tier:
            yield what, replace(spec, tiers=tuple(mistake if other is tier else other for other in spec.tiers))
