# SPDX-License-Identifier: Apache-2.0
"""A search from end to end: tiers one after the other, every answer into the journal, the best sets into a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lrconvert import __version__
from lrconvert.checkpoint import Model, describe_source
from lrconvert.checkpoint.adapter import Adapter
from lrconvert.errors import EnvironmentFailure, InputError
from lrconvert.evals.texts import Text
from lrconvert.recipe import SCHEMA_VERSION, Provenance, Recipe
from lrconvert.rope import Tier
from lrconvert.search.evolution import evolution, schedule_for
from lrconvert.search.guided import GUIDED_BUDGET, guided
from lrconvert.search.journal import Journal, Record, digest
from lrconvert.search.objective import Objective
from lrconvert.search.protocol import Algorithm, Answer, Evaluator, Question
from lrconvert.search.space import Candidate, Space

AlgorithmName = Literal["guided", "evolution"]
SHORT_SHARE = 4  # tiers up to the original window get a quarter of the evaluations: what can be found lies near


@dataclass(frozen=True)
class TierPlan:
    """One set to search: its space, what it is judged by, and how much that may cost (forward equivalents)."""

    space: Space
    objective: Objective
    budget: int
    start: tuple[Candidate, ...] = ()

    @property
    def length(self) -> int:
        return self.space.target


@dataclass(frozen=True)
class SearchPlan:
    """Everything that is decided before the first evaluation. `kept` are tiers that come from elsewhere; `adapter` is
    what was merged into the model."""

    model: Model
    original_window: int
    algorithm: AlgorithmName
    seed: int
    tiers: tuple[TierPlan, ...]
    texts: tuple[Text, ...]
    dtype: str
    name: str
    base_model: str
    kept: tuple[Tier, ...] = ()
    uniform: bool = False  # shorter tiers take the longest one's attention factor
    adapter: Adapter | None = None
    adapter_path: str | None = None  # as the recipe names it

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two searches the same. The budget is no part of it: a larger one goes on with the same journal."""
        source = describe_source(self.model)
        model = {key: source[key] for key in ("family", "config_sha256", "weights")}
        if self.adapter is not None:
            model["adapter"] = {key: text for key, text in self.adapter.description.items() if key != "reference"}
        return {
            "model": model,
            "original_window": self.original_window,
            "algorithm": self.algorithm,
            "seed": self.seed,
            "tiers": [
                {
                    "space": tier.space.to_json(),
                    "objective": tier.objective.kind,
                    "lengths": {str(length): weight for length, weight in tier.objective.weights.items()},
                    "documents": [[doc.part, len(doc.tokens)] for doc in tier.objective.documents],
                    "documents_sha256": tier.objective.sha256,
                    "start": [candidate.to_json() for candidate in tier.start],
                }
                for tier in self.tiers
            ],
            # Of a data set the commit may change while its rows stay; the text's digest would not.
            "texts": [{"name": t.name, "sha256": t.sha256, "tokens": len(t.tokens)} for t in self.texts],
            "dtype": self.dtype,
        }


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


def default_budget(algorithm: AlgorithmName, target: int, original_window: int) -> int:
    """Forward equivalents that a tier gets where none are given."""
    full = schedule_for(target).evaluations if algorithm == "evolution" else GUIDED_BUDGET
    return full if target > original_window else full // SHORT_SHARE


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
        return self._recipe(best)

    def _search_tier(self, tier: TierPlan) -> Record:
        algorithm = start_algorithm(self.plan.algorithm, tier, self.plan.seed)
        spent = 0.0
        questions = next(algorithm, None)
        # The leading process's questions count: machines may differ in the last digit of a prediction.
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
        """The same search asks the same; another version of the code may not."""
        asked = (question.candidate, question.gradient)
        if (record.question.candidate, record.question.gradient) != asked:
            raise InputError(
                f"evaluation {number} for {record.tier} tokens in the journal is not what lrconvert {__version__} asks",
                remedy="Go on with the version that began it, or name another --journal",
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
        tiers = [record.question.candidate.tier(length) for length, record in best.items()]
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
            "texts": [text.described() for text in plan.texts],
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
        """Losses on the texts of the search: what each set costs at each length, beside the analytic sets."""
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


def journal_path(output: Path) -> Path:
    """Beside the recipe: RECIPE.journal.jsonl."""
    return output.with_name(f"{output.name.removesuffix('.json')}.journal.jsonl")
