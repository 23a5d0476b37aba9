# SPDX-License-Identifier: Apache-2.0
"""A search that needs fewer evaluations: a Gaussian process decides which offspring are worth one.

1. The analytic sets and a few smooth ramps are evaluated.
2. A Gaussian process over ln λ learns the losses. It picks a handful among some hundred offspring of the best sets;
   they are evaluated, the process learns from them, and so on.
3. When a round brings little, a set follows its gradient in the slow frequencies for some steps: the best one, or the
   best that is unlike those that did so before. Fast frequencies are left out: they turn so often in a document that
   their gradient is noise.

docs/search.md has what else was tried and how it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lrconvert.errors import require
from lrconvert.rope import Array, inverse_frequencies
from lrconvert.searching.evolution import Unseen, cross, mutate, pick
from lrconvert.searching.protocol import Algorithm, Answer, Question, Round
from lrconvert.searching.space import GRID, Candidate, Space

GUIDED_BUDGET = 140
Known = list[tuple[Candidate, float]]  # what was evaluated, with its loss


@dataclass(frozen=True)
class GuidedSettings:
    """The numbers of the search. docs/search.md has the measurements behind the defaults."""

    ramps: int = 24
    elite: int = 16  # the best sets, which have offspring
    offspring: int = 400  # bred and predicted in every round
    round: int = 8  # evaluated in every round
    caution: float = 1.0  # a prediction counts this many standard deviations below its mean
    apart: float = 0.03  # the least difference in ln λ between candidates of a round
    basin: float = 0.3  # the same, from sets that followed the gradient
    noise: float = 0.12  # standard deviation of a local change in ln λ
    # Shares of `scale_of` the first round: some models lose nats, others hundredths.
    stale: float = 0.03  # a round that gains less is followed by the gradient
    least_gain: float = 0.002  # two steps of the gradient that gain less are the last ones
    offset: float = 0.3  # losses are learnt as ln(loss − best + offset)
    reach: float = 6.0  # losses further above the best are not learnt
    near: float = 2.0  # losses further above the best don't follow the gradient
    steps: int = 12  # of the gradient, at most
    step: float = 0.03  # in ln λ, at first
    slow: float = 12.5  # turns within the original window up to which the gradient is used


def guided(
    space: Space, seed: int, *, start: Sequence[Candidate] = (), settings: GuidedSettings | None = None
) -> Algorithm:
    """The search, which goes on as long as it is answered. Needs scikit-learn (`EnvironmentFailure` without it)."""
    require("sklearn", "search", "the guided search")
    settings, rng, fresh = settings or GuidedSettings(), np.random.default_rng(seed), Unseen()
    wanted = [("start", candidate) for candidate in start] + space.seeds()
    questions = [Question(fresh.take(c), name) for name, c in wanted if not fresh.knows(c)]
    designs = (candidate for candidate in ramps(space, settings.ramps, rng) if not fresh.knows(candidate))
    questions += [Question(fresh.take(candidate), "ramp") for candidate in designs]
    known = learnt([], questions, (yield questions))
    scale = scale_of(known)
    before, polished = best_of(known), list[Candidate]()
    while questions := propose(space, known, rng, fresh, settings, scale):
        known = learnt(known, questions, (yield questions))
        now = best_of(known)
        stale = before[1] - now[1] < settings.stale * scale
        if stale and (origin := unpolished(known, polished, settings, scale)) is not None:
            known = yield from polish(space, origin, known, fresh, settings, scale)
            if now[1] - best_of(known)[1] < settings.stale * scale:
                known = yield from try_start_tokens(space, known, fresh)
            now = best_of(known)
            polished += [origin, now[0]]
        before = now


def learnt(known: Known, questions: Round, answers: Sequence[Answer]) -> Known:
    """What is known after a round, without the candidates that have no loss."""
    pairs = zip(questions, answers, strict=True)
    return known + [(question.candidate, answer.loss) for question, answer in pairs if math.isfinite(answer.loss)]


def best_of(known: Known) -> tuple[Candidate | None, float]:
    return min(known, key=lambda entry: entry[1], default=(None, math.inf))


def scale_of(known: Known) -> float:
    """The scale of the losses in nats: the median minus the best."""
    losses = [loss for _, loss in known]
    return max(float(np.median(losses)) - min(losses), 1e-6) if losses else 1.0


def ramps(space: Space, count: int, rng: np.random.Generator) -> list[Candidate]:
    """Sets whose ln λ is 0 for the fast frequencies, rises in an S to a bend, and grows slowly from there to the last
    index, as good sets do. Where it rises and bends, how high the end is, and which share of that the bend has, are
    drawn so that each of the four is spread evenly (a Latin hypercube)."""
    low, high = np.array([0.0, 0.45, 0.85, 0.5]), np.array([0.4, 0.95, 1.0, 1.0])
    places = (np.stack([rng.permutation(count) for _ in low], axis=1) + rng.random((count, len(low)))) / max(count, 1)
    return [ramp(space, *row) for row in low + places * (high - low)]


def ramp(space: Space, rise: float, bend: float, end: float, share: float) -> Candidate:
    index = np.linspace(0.0, 1.0, space.size)
    last = end * math.log(space.bounds[1] / GRID)
    inner = np.clip((index - rise) / (bend - rise), 0.0, 1.0)
    outer = np.clip((index - bend) / (1.0 - bend), 0.0, 1.0)
    return space.make(np.exp(last * (share * inner**2 * (3.0 - 2.0 * inner) + (1.0 - share) * outer)))


# --- the surrogate -------------------------------------------------------------------------------------------


def propose(
    space: Space, known: Known, rng: np.random.Generator, fresh: Unseen, settings: GuidedSettings, scale: float
) -> Round:
    """A round: the most promising offspring of the best sets, no two of them alike."""
    if len(known) < 2:
        return []
    elite = [candidate for candidate, _ in sorted(known, key=lambda entry: entry[1])[: settings.elite]]
    pool = list(dict.fromkeys(elite))  # in order, as a set is not from one process to the next
    children = dict.fromkeys(breed(space, pool, rng, settings.noise) for _ in range(settings.offspring))
    bred = [child for child in children if not fresh.knows(child)]
    if not bred:
        return []
    mean, spread = Surrogate(space, known, settings.offset * scale, settings.reach * scale).predict(bred)
    chosen: Round = []
    for index in np.argsort(mean - settings.caution * spread, kind="stable"):
        if all(differ(bred[index], question.candidate, settings.apart) for question in chosen):
            chosen.append(Question(fresh.take(bred[index]), "screened"))
        if len(chosen) == settings.round:
            break
    return chosen


def differ(one: Candidate, other: Candidate, apart: float) -> bool:
    """Whether two candidates are different enough to evaluate both."""
    ratio = np.abs(np.log(np.asarray(one.steps) / np.asarray(other.steps))).max()
    rest = (one.start_tokens, one.critical) != (other.start_tokens, other.critical)
    return bool(ratio > apart or rest or abs(one.attention_factor - other.attention_factor) > apart / 10)


def breed(space: Space, pool: Sequence[Candidate], rng: np.random.Generator, noise: float) -> Candidate:
    """One offspring: of two parents, or of one parent by a smooth change, a local one or (rarely) a random redraw."""
    parent = pick(pool, rng)
    kind = rng.random()
    if kind < 0.1:
        return mutate(space, parent, rng, 0.3)
    if kind < 0.35:
        return cross(space, parent, pick(pool, rng), rng)
    if kind < 0.65:
        change = rng.normal(0.0, noise, space.size) * (rng.random(space.size) < 0.3)
    else:
        knots = np.linspace(0, space.size - 1, 6)
        change = np.interp(np.arange(space.size), knots, rng.normal(0.0, noise, len(knots)))
    attention = parent.attention_factor * math.exp(rng.normal(0.0, noise / 10))
    critical = None if parent.critical is None else parent.critical + int(rng.integers(-1, 2))
    start = parent.start_tokens
    if rng.random() < 0.1:
        choices = next_start_tokens(space, start)
        start = choices[int(rng.integers(len(choices)))] if choices else start
    factors = np.asarray(parent.steps) / GRID * np.exp(change)
    return space.make(factors, start, attention, critical)


def next_start_tokens(space: Space, start_tokens: int) -> tuple[int, ...]:
    """The numbers of start tokens next to one."""
    every = space.usable_start_tokens
    at = every.index(start_tokens)
    return every[max(at - 1, 0) : at] + every[at + 1 : at + 2]


class Surrogate:
    """A Gaussian process over the evaluated candidates, for ln(loss − best + offset)."""

    LENGTHS = (0.5, 0.7, 1.0, 1.4, 2.0)  # of the kernel
    NOISES = (0.01, 0.05)

    def __init__(self, space: Space, known: Known, offset: float, reach: float) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, WhiteKernel

        self._space = space
        losses = np.array([loss for _, loss in known])
        enough = np.sort(losses)[min(len(losses), 16) - 1]
        near = losses <= max(losses.min() + reach, enough)
        inputs = self._features([candidate for (candidate, _), kept in zip(known, near, strict=True) if kept])
        outputs = np.log(losses[near] - losses.min() + offset)
        outputs = (outputs - outputs.mean()) / (outputs.std() + 1e-12)
        # A grid instead of an optimiser: as good with so few points, and the same on every machine.
        process: Any = GaussianProcessRegressor  # its annotations don't know that the optimiser may be None
        fits = [
            process(RBF(length) + WhiteKernel(noise), optimizer=None).fit(inputs, outputs)
            for length in self.LENGTHS
            for noise in self.NOISES
        ]
        self._process: Any = max(fits, key=lambda fit: fit.log_marginal_likelihood_value_)

    def _features(self, candidates: Sequence[Candidate]) -> Array:
        """ln λ scaled to what a space of 8x with 32 indices has, for which the kernel's lengths were chosen; start
        tokens, attention factor and critical index with about the same weight as one index."""
        space = self._space
        scale = math.log(1.25 * 8) / math.log(space.bounds[1] / GRID) * math.sqrt(32 / space.size)
        factors = np.log(np.array([candidate.steps for candidate in candidates]) / GRID) * scale
        others = [
            (math.log2(1 + c.start_tokens) / 4, 5 * c.attention_factor, (c.critical or 0) / 8) for c in candidates
        ]
        return np.hstack([factors, np.array(others)])

    def predict(self, candidates: Sequence[Candidate]) -> tuple[Array, Array]:
        """Mean and standard deviation for each; lower is better, the scale is arbitrary."""
        return self._process.predict(self._features(candidates), return_std=True)


# --- the gradient ----------------------------------------------------------------------------------------


def unpolished(known: Known, polished: Sequence[Candidate], settings: GuidedSettings, scale: float) -> Candidate | None:
    """The best set that is unlike all that followed their gradient; None where no good one is."""
    _, least = best_of(known)
    for candidate, loss in sorted(known, key=lambda entry: entry[1]):
        if loss > least + settings.near * scale:
            break
        if all(differ(candidate, other, settings.basin) for other in polished):
            return candidate
    return None


def polish(
    space: Space, origin: Candidate, known: Known, fresh: Unseen, settings: GuidedSettings, scale: float
) -> Generator[Round, Sequence[Answer], Known]:
    """Steps of Adam in ln λ of the slow frequencies from a set on; what is known afterwards.

    Ends early when two steps brought next to nothing, or where the evaluator gives no gradient.
    """
    from sklearn.isotonic import isotonic_regression

    free = slow_indices(space, origin, settings.slow)
    position = np.log(np.asarray(origin.steps) / GRID)
    first, second = np.zeros(space.size), np.zeros(space.size)
    current, losses = origin, []
    for step in range(settings.steps):
        questions = [Question(fresh.take(current), "gradient", gradient=True)]
        answers = yield questions
        known = learnt(known, questions, answers)
        losses.append(answers[0].loss)
        stuck = len(losses) > 2 and min(losses[-2:]) > min(losses[:-2]) - settings.least_gain * scale
        if answers[0].gradient is None or stuck:
            break
        slope = np.where(free, answers[0].gradient, 0.0)
        first, second = 0.8 * first + 0.2 * slope, 0.95 * second + 0.05 * slope**2
        direction = first / (1 - 0.8 ** (step + 1)) / (np.sqrt(second / (1 - 0.95 ** (step + 1))) + 1e-12)
        rate = settings.step * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))  # down to a tenth
        # The nearest monotone factors: sorting would move those that are not free.
        position = np.asarray(isotonic_regression(position - rate * direction))
        moved = space.make(np.exp(position), origin.start_tokens, origin.attention_factor, origin.critical)
        if moved == current:
            break
        current = moved
    return known


def try_start_tokens(space: Space, known: Known, fresh: Unseen) -> Generator[Round, Sequence[Answer], Known]:
    """Evaluate the best set with fewer and with more start tokens, whose effect is too small to predict."""
    best, _ = best_of(known)
    if best is None:
        return known
    beside = [replace(best, start_tokens=count) for count in next_start_tokens(space, best.start_tokens)]
    questions = [Question(fresh.take(one), "start tokens") for one in beside if not fresh.knows(one)]
    if not questions:
        return known
    return learnt(known, questions, (yield questions))


def slow_indices(space: Space, origin: Candidate, turns: float) -> np.ndarray[Any, Any]:
    """Which frequencies turn at most `turns` times in the original window; in LongRoPE2's space, of those that are
    free."""
    rate = space.original_window / (2 * math.pi)
    slow = inverse_frequencies(space.rotary_dim, space.base) * rate <= turns
    return slow & (np.arange(space.size) >= (origin.critical or 0))
