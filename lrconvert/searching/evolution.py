# SPDX-License-Identifier: Apache-2.0
"""The evolutionary search of LongRoPE (arXiv 2402.13753, algorithm 1), as the paper describes it.

The population begins with PI, NTK, YaRN and mutations of them. In every generation the best have mutants and
crossovers, and the best of old and new survive. All randomness comes from one seed and depends on losses only through
their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.searching.protocol import Algorithm, Answer, Question, Round
from lrconvert.searching.space import GRID, PAPER_SEEDS, Candidate, Space

LONG_WINDOW = 256 * 1024  # the paper halves the counts for longer ones
TRIES = 100  # draws of a new offspring before the space counts as exhausted

Scored = tuple[float, int, Candidate]  # loss, order of evaluation (which breaks ties), candidate


@dataclass(frozen=True)
class Schedule:
    """How many candidates of which kind: the paper's numbers for windows up to 256k."""

    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    parents: int = 32
    generations: int = 40
    probability: float = 0.3  # that a mutation draws an index anew

    @property
    def evaluations(self) -> int:
        return self.population + self.generations * (self.mutations + self.crossovers)


def schedule_for(target: int) -> Schedule:
    """The paper's schedule for a window: 1344 evaluations up to 256k, half of that beyond."""
    return Schedule() if target <= LONG_WINDOW else Schedule(32, 8, 8, 16)


def evolution(space: Space, seed: int, *, schedule: Schedule, start: Sequence[Candidate] = ()) -> Algorithm:
    """The search; the candidates of `start` are evaluated first."""
    rng = np.random.default_rng(seed)
    fresh = Unseen()
    questions = [Question(fresh.take(candidate), "start") for candidate in start if fresh.knows(candidate) is False]
    seeds = space.seeds(PAPER_SEEDS)
    questions += [Question(fresh.take(candidate), name) for name, candidate in seeds if not fresh.knows(candidate)]
    origins = [question.candidate for question in questions]
    while len(questions) < schedule.population:
        turn = origins[len(questions) % len(origins)]
        mutant = fresh.draw(lambda origin=turn: mutate(space, origin, rng, schedule.probability))
        if mutant is None:
            break
        questions.append(Question(mutant, "mutation"))
    population = ranked([], questions, (yield questions))
    for _ in range(schedule.generations):
        parents = [candidate for _, _, candidate in population[: schedule.parents]]
        questions = offspring(space, parents, rng, fresh, schedule)
        if not questions:
            return
        population = ranked(population, questions, (yield questions))[: schedule.population]


def offspring(space: Space, parents: list[Candidate], rng: np.random.Generator, fresh: Unseen, s: Schedule) -> Round:
    """A generation: mutants of parents, then children of pairs of parents."""
    made: Round = []
    kinds: list[tuple[str, int, Callable[[], Candidate]]] = [
        ("mutation", s.mutations, lambda: mutate(space, pick(parents, rng), rng, s.probability)),
        ("crossover", s.crossovers, lambda: cross(space, pick(parents, rng), pick(parents, rng), rng)),
    ]
    for name, count, draw in kinds:
        for _ in range(count):
            candidate = fresh.draw(draw)
            if candidate is None and name == "crossover":  # few and equal parents have few children
                candidate = fresh.draw(kinds[0][2])
            if candidate is not None:
                made.append(Question(candidate, name))
    return made


def ranked(old: list[Scored], questions: Round, answers: Sequence[Answer]) -> list[Scored]:
    """Old and new ones by loss; one without a loss counts as the worst."""
    order = 1 + max((number for _, number, _ in old), default=-1)
    new = [
        (answer.loss if math.isfinite(answer.loss) else math.inf, order + index, question.candidate)
        for index, (question, answer) in enumerate(zip(questions, answers, strict=False))
    ]
    return sorted([*old, *new], key=lambda entry: entry[:2])


class Unseen:
    """The candidates that were asked for. Only others are drawn."""

    def __init__(self) -> None:
        self._seen: set[Candidate] = set()

    def knows(self, candidate: Candidate) -> bool:
        return candidate in self._seen

    def take(self, candidate: Candidate) -> Candidate:
        self._seen.add(candidate)
        return candidate

    def draw(self, make: Callable[[], Candidate]) -> Candidate | None:
        """A candidate from `make` that was never asked for; None where `TRIES` draws give none."""
        for _ in range(TRIES):
            candidate = make()
            if candidate not in self._seen:
                return self.take(candidate)
        return None


def pick(candidates: Sequence[Candidate], rng: np.random.Generator) -> Candidate:
    return candidates[int(rng.integers(len(candidates)))]


def mutate(space: Space, parent: Candidate, rng: np.random.Generator, probability: float) -> Candidate:
    """Each factor, the start tokens, the attention factor and the critical index with `probability` drawn anew, evenly
    over what the space allows; the factors are then sorted, which is how the space stays monotone."""
    low, high = space.bounds
    steps = np.array(parent.steps)
    drawn = rng.integers(low, high + 1, size=space.size)
    steps = np.where(rng.random(space.size) < probability, drawn, steps)
    chances = rng.random(3) < probability
    starts, attentions = space.usable_start_tokens, space.attention
    start = int(rng.choice(starts))
    attention = float(rng.uniform(*attentions))
    critical = int(rng.integers(space.critical_range[0], space.critical_range[1] + 1))
    return space.make(
        steps / GRID,
        start if chances[0] else parent.start_tokens,
        attention if chances[1] else parent.attention_factor,
        critical if chances[2] else parent.critical,
    )


def cross(space: Space, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate:
    """Each factor and each other value from either parent; the factors are then sorted."""
    from_first = rng.random(space.size) < 0.5
    start, attention, critical = (rng.random(3) < 0.5).tolist()
    return space.make(
        np.where(from_first, first.steps, second.steps) / GRID,
        (first if start else second).start_tokens,
        (first if attention else second).attention_factor,
        (first if critical else second).critical,
    )
