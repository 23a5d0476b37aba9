# SPDX-License-Identifier: Apache-2.0
"""What a backend will be asked, known before any of it: the cases, and what each costs.

Costs are tokens of forward passes. They are only as good as the time left that they tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lrconvert.checkpoint import Model
from lrconvert.parity.cases import Budget, Case, build_cases
from lrconvert.parity.expected import changed_tiers, end_case
from lrconvert.parity.hypotheses import TOKENS
from lrconvert.parity.reference_runner import dense_passes
from lrconvert.progress import Steps
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.backend import Backend

REFERENCE = 3.0  # the reference computes in float64, without a fused kernel: times the runtime's cost
LOADING = 1024.0
HYPOTHESES = 7  # passes of the reference for each tier: the recipe and its likely mistakes


@dataclass(frozen=True)
class Questions:
    """The cases for one backend: `spec` is what it can express of the `recipe`, the rest is `dropped`. `dtype` is what
    its products are computed in, as its tolerances call it."""

    backend: Backend
    recipe: RopeSpec
    spec: RopeSpec
    dropped: list[str]
    cases: list[Case]
    dtype: str
    budget: Budget

    @classmethod
    def of(cls, backend: Backend, recipe: RopeSpec, model: Model, dtype: str, budget: Budget) -> Questions:
        capability = backend.capability(model)
        fitted, dropped = capability.fit(recipe)
        fitted = capability.round_boundaries(fitted)
        boundaries = recipe.boundaries[:1] if capability.once else None
        cases = list(build_cases(fitted, capability, budget, accepts=backend.accepts, boundaries=boundaries))
        return cls(backend, recipe, fitted, dropped, cases, dtype, budget)

    @property
    def runnable(self) -> list[Case]:
        return [case for case in self.cases if not case.skipped]

    def sharing(self, case: Case) -> list[Case]:
        """The cases that one pass of the reference answers together with this one: none where it is not the first."""
        passes = dense_passes(self.spec, [case])
        together = [other for other in self.runnable if dense_passes(self.spec, [other]).keys() & passes.keys()]
        return together if together[:1] == [case] else []

    @property
    def hypotheses(self) -> float | None:
        """The cost of looking for a better explanation, None where the code is exact enough to need none, or only sides
        are asked."""
        if self.budget.sides or self.backend.is_exact(self.dtype):
            return None
        tokens = sum(min(TOKENS, tier.max_length) for tier in self.spec.tiers)
        return tokens * (1 + HYPOTHESES * REFERENCE)

    @property
    def lost(self) -> float | None:
        """The cost of measuring what was dropped, None where nothing was."""
        changed = changed_tiers(self.recipe, self.spec)
        return at_ends(changed, self.budget, passes=2) if self.dropped and not self.budget.sides else None

    def expect(self, steps: Steps) -> None:
        """Every step that these questions will take."""
        for tokens in dense_passes(self.spec, self.runnable).values():
            steps.expect(reference_cost(max(tokens)))
        steps.expect(LOADING)
        for case in self.cases:
            steps.expect(case_cost(case))
        for cost in (self.hypotheses, self.lost):
            if cost is not None:
                steps.expect(cost)


def case_cost(case: Case) -> float:
    """Dense forward cases share passes of the reference, which are steps of their own."""
    if case.skipped:
        return 0.0
    passes = {"forward": int(case.spread), "decode": 2}.get(case.kind, 1)
    return case.tokens * (1 + passes * REFERENCE)


def reference_cost(tokens: int) -> float:
    return tokens * REFERENCE


def at_ends(lengths: Iterable[int], budget: Budget, *, passes: int) -> float:
    """The cost of passes of the reference at the ends of tiers."""
    return sum(reference_cost(end_case("", length, budget).tokens) * passes for length in lengths)
