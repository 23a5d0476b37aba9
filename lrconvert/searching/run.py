# SPDX-License-Identifier: Apache-2.0
"""A plan carried out: tier after tier, every answer into the journal, the best sets into a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lrconvert import __version__
from lrconvert.errors import EnvironmentFailure, InputError
from lrconvert.recipe import SCHEMA_VERSION, Provenance, Recipe
from lrconvert.rope import Tier
from lrconvert.searching.evolution import evolution, schedule_for
from lrconvert.searching.guided import guided
from lrconvert.searching.journal import Journal, Record, digest
from lrconvert.searching.plan import SearchPlan, TierPlan
from lrconvert.searching.protocol import Algorithm, Answer, Evaluator, Question
from lrconvert.searching.request import AlgorithmName


@dataclass(frozen=True)
class Progress:
    """How far a tier is. `spent` and `budget` are forward equivalents; `seconds` a new one takes, None before any."""

    length: int
    spent: float
    budget: float
    evaluations: int
    best: float
    seconds: float | None


Watch = Callable[[Progress], None]


def start_algorithm(name: AlgorithmName, plan: TierPlan, seed: int) -> Algorithm:
    if name == "evolution":
        return evolution(plan.space, seed, schedule=schedule_for(plan.length), start=plan.start)
    return guided(plan.space, seed, start=plan.start)


class Search:
    """A plan being carried out. Every process of torchrun has one; the leading process has the journal."""

    def __init__(self, plan: SearchPlan, evaluator: Evaluator, journal: Journal | None, watch: Watch) -> None:
        self.plan, self.evaluator, self.watch = plan, evaluator, watch
        self._journal = journal
        found: list[Record] = evaluator.agree(list(journal.found.records) if journal else [])
        # By tier, each in order: a larger budget may ask more of one before the next begins.
        self._old = {tier.length: [record for record in found if record.tier == tier.length] for tier in plan.tiers}
        self.records: list[Record] = []  # answered in this run: from the journal first, then anew

    def run(self) -> Recipe:
        """Search every tier, the longest first, and make the recipe.

        Raises `EnvironmentFailure` when the documents don't fit the memory, `InputError` when no candidate of a tier
        had a loss or the journal's evaluations are not those of this search.
        """
        best: dict[int, Record] = {}
        for tier in sorted(self.plan.tiers, key=lambda tier: -tier.length):
            if self.plan.uniform and best:
                factor = best[max(best)].question.candidate.attention_factor
                tier = replace(tier, space=replace(tier.space, attention=(factor, factor)))
            best[tier.length] = self._search_tier(tier)
        self.evaluator.agree(None)  # whoever reads the journal from here on finds the last answers in it
        return self._recipe(best)

    def _search_tier(self, tier: TierPlan) -> Record:
        algorithm = start_algorithm(self.plan.algorithm, tier, self.plan.seed)
        spent = 0.0
        questions = next(algorithm, None)
        # The leading process decides: machines may differ in the last digit of a prediction.
        while questions := self.evaluator.agree(questions):
            affordable = []
            for question in questions:
                if spent + question.cost > tier.budget:
                    break
                affordable.append(question)
                spent += question.cost
            answers = self._ask(tier, affordable)
            if len(affordable) < len(questions):
                break
            try:
                questions = algorithm.send(answers)
            except StopIteration:
                questions = None
        algorithm.close()
        found = self._of(tier)
        best = min(found, key=lambda record: record.answer.loss, default=None)
        if best is None or not math.isfinite(best.answer.loss):
            errors = {record.answer.error for record in found if record.answer.error}
            raise InputError(
                f"no candidate for {tier.length} tokens has a loss: {'; '.join(sorted(errors)) or 'no budget'}"
            )
        return best

    def _ask(self, tier: TierPlan, questions: Sequence[Question]) -> list[Answer]:
        """Answers in order: from the journal while it has any, then from the evaluator, as many at a time as there are
        processes."""
        answers: list[Answer] = []
        while len(answers) < len(questions):
            rest = questions[len(answers) :]
            old, done = self._old[tier.length], len(self._of(tier))
            if done < len(old):
                record = old[done]
                self._check_replay(record, done + 1, rest[0])
                self.records.append(record)
                answers.append(record.answer)
            else:
                asked = rest[: self.evaluator.width]
                given = self.evaluator.answer(tier.objective, asked)
                self._check_memory(tier, given)
                for question, answer in zip(asked, given, strict=True):
                    self._keep(Record(tier.length, question, answer))
                answers += given
            self._report(tier)
        return answers

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        if self._journal is not None:
            self._journal.append(record)

    def _of(self, tier: TierPlan) -> list[Record]:
        return [record for record in self.records if record.tier == tier.length]

    def _check_replay(self, record: Record, number: int, question: Question) -> None:
        """The same search asks the same questions; another version of the code may ask others."""
        asked = (question.candidate, question.gradient)
        if (record.question.candidate, record.question.gradient) != asked:
            raise InputError(
                f"evaluation {number} for {record.tier} tokens in the journal differs from lrconvert {__version__}'s",
                remedy="Continue with the version that started it, or name another --journal",
            )

    def _check_memory(self, tier: TierPlan, answers: Sequence[Answer]) -> None:
        """Documents that don't fit fail for every candidate: then the search ends before anything is recorded."""
        before = any(math.isfinite(record.answer.loss) for record in self._of(tier))
        if before or not all((answer.error or "").startswith("out of memory") for answer in answers):
            return
        length = tier.objective.length
        fits = self.evaluator.largest_fitting(length)
        raise EnvironmentFailure(
            f"a document of {length} tokens does not fit this machine's memory"
            + (f"; the largest that fits has about {fits}" if fits else ""),
            remedy=f"Search for a --target of at most {fits}" if fits else "Use a larger device or a smaller model",
        )

    def _report(self, tier: TierPlan) -> None:
        records = self._of(tier)
        new = records[len(self._old[tier.length]) :]
        paid = sum(record.question.cost for record in new)
        seconds = sum(record.answer.seconds for record in new) / paid / self.evaluator.width if paid else None
        self.watch(
            Progress(
                tier.length,
                sum(record.question.cost for record in records),
                tier.budget,
                len(records),
                min(record.answer.loss for record in records),
                seconds,
            )
        )

    # --- the recipe --------------------------------------------------------------------------------------

    def _recipe(self, best: dict[int, Record]) -> Recipe:
        plan, shape = self.plan, self.plan.model.shape
        plans = {tier.length: tier for tier in plan.tiers}
        tiers = [plans[length].tier_of(record.question.candidate) for length, record in best.items()]
        tiers += [tier for tier in plan.kept if tier.max_length not in best]
        if plan.original_window not in {tier.max_length for tier in tiers}:
            longest = max(tiers, key=lambda tier: tier.max_length)
            factor = longest.attention_factor if plan.uniform else 1.0
            tiers.append(Tier(plan.original_window, (1.0,) * (shape.rotary_dim // 2), attention_factor=factor))
        return Recipe(
            schema_version=SCHEMA_VERSION,
            name=plan.name,
            family=plan.model.family.name,
            base_model=plan.base_model,
            adapter=plan.adapter_path,
            original_window=plan.original_window,
            rope_theta=shape.theta,
            rotary_dim=shape.rotary_dim,
            tiers=tuple(sorted(tiers, key=lambda tier: tier.max_length)),
            provenance=Provenance(kind="searched", method=plan.algorithm, search=self._provenance(best)),
            evaluation=self._evaluation(best),
        )

    def _provenance(self, best: dict[int, Record]) -> dict[str, Any]:
        plan = self.plan
        return {
            "seed": plan.seed,
            "texts": [text.record() for text in plan.texts],
            "dtype": plan.dtype,
            "code": f"lrconvert {__version__}",
            "journal_sha256": digest(plan.identity, self.records),
            "tiers": [self._tier_provenance(tier, best[tier.length]) for tier in plan.tiers],
        }

    def _tier_provenance(self, tier: TierPlan, best: Record) -> dict[str, Any]:
        records = self._of(tier)
        return {
            "max_length": tier.length,
            "space": tier.space.kind,
            "objective": tier.objective.kind,
            "lengths": {str(length): weight for length, weight in tier.objective.weights.items()},
            "tokens_per_evaluation": tier.objective.tokens,
            "evaluations": len(records),
            "forward_equivalents": round(sum(record.question.cost for record in records), 1),
            "failed": sum(not math.isfinite(record.answer.loss) for record in records),
            "best_made_by": best.question.made,
        }

    def _evaluation(self, best: dict[int, Record]) -> dict[str, Any]:
        """Losses on the texts of the search: of each set at each length, beside those of the analytic sets."""
        named = ("pi", "ntk", "yarn", "ntk2", "unmodified", "start")
        return {
            "protocol": "mean loss in nats a token on the documents of the search, whole sequences",
            "tiers": [
                {
                    "max_length": length,
                    "loss": record.answer.loss,
                    "losses": record.answer.losses,
                    "starts": {
                        other.question.made: other.answer.losses
                        for other in self.records
                        if other.tier == length and other.question.made in named and not other.question.gradient
                    },
                }
                for length, record in sorted(best.items())
            ],
        }
