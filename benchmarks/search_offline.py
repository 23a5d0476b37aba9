# SPDX-License-Identifier: Apache-2.0
"""Searches compared without a model, on landscapes made from the journal of a real search.

    python benchmarks/search_offline.py [--journal ../shared/search/evolution-journal-smollm2-64k.json] [--seeds 8]
        [--first-seed 0]

The journal has 707 factor sets of SmolLM2-135M (8k to 64k) with their losses, as the paper's evolution evaluated them.
Three Gaussian processes learn them all, and searches then run on what those predict: `rbf` (length 1), `matern`
(fitted), and `rough`, which is the second with waves of 0.004 nats added, as real losses are rougher than any process.
A fourth, `compared`, is as rough and has learnt the best 1,500 sets of six searches on another document
(results/search/compare-smollm2).
Where a search proposes sets unlike all recorded ones, the predictions are worth little: what wins here has to win on a
model too.

Besides what is kept, what was tried and dropped is measured: CMA-ES over knots of ln λ and over a ramp of three numbers
(needs the package `cmaes`), and the gradient alone from NTK(2s). Gradients are differences of the predictions, true in
slow and fast frequencies alike, so they flatter what uses them less where only slow ones are used.
Writes results/search-offline.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, Figure, report, save

from lrconvert.searching.evolution import Unseen, evolution, schedule_for
from lrconvert.searching.guided import GuidedSettings, guided, polish, ramp
from lrconvert.searching.journal import read_journal
from lrconvert.searching.protocol import Algorithm, Answer, Question, Round
from lrconvert.searching.space import GRID, Space, space_for

JOURNAL = Path(__file__).resolve().parents[2] / "shared" / "search" / "evolution-journal-smollm2-64k.json"
MARKS = (8, 20, 32, 48, 64, 96, 140, 256, 350, 500, 704)
EVOLUTION = 704.0
BUDGET = {"evolution": EVOLUTION}  # forward equivalents; 140 for the others
SHORT_BUDGET = 140.0
GOAL_WITHIN = 0.002
COMPARED, MOST = RESULTS / "search" / "compare-smollm2", 1500
FLOOR = 0.03  # nats below the best recorded loss: losses are learnt as logarithms of what is above it


class Landscape:
    """Losses that a process predicts for any set, with the gradient where it is asked for."""

    def __init__(self, kind: str, factors: np.ndarray[Any, Any], losses: np.ndarray[Any, Any]) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

        regressor: Any = GaussianProcessRegressor
        if kind == "rbf":
            process = regressor(RBF(1.0) + WhiteKernel(0.01), optimizer=None)
        else:
            process = regressor(ConstantKernel(1.5) * Matern(2.5, nu=2.5) + WhiteKernel(0.01))
        self._floor = losses.min() - FLOOR
        values = np.log(losses - self._floor)
        self._mean, self._spread = values.mean(), values.std()
        self._process = process.fit(np.log(factors), (values - self._mean) / self._spread)
        self._waves = 40 if kind == "rough" else 0
        rng = np.random.default_rng(5)
        steep = np.where(np.arange(factors.shape[1]) < 13, 30.0, 8.0)  # fast frequencies make rough losses
        self._directions = rng.normal(0, 1, (40, factors.shape[1])) * steep
        self._phases = rng.uniform(0, 2 * np.pi, 40)

    def losses(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Of rows of ln λ."""
        predicted = np.exp(self._process.predict(positions) * self._spread + self._mean) + self._floor
        if self._waves:
            waves = np.sin(positions @ self._directions.T + self._phases).sum(axis=1)
            predicted = predicted + 0.004 * waves / np.sqrt(self._waves / 2)
        return predicted

    def answer(self, questions: Round) -> list[Answer]:
        positions = np.log(np.array([question.candidate.steps for question in questions]) / GRID)
        found = self.losses(positions)
        return [
            Answer(float(loss), gradient=tuple(self._slopes(position)) if question.gradient else None)
            for question, position, loss in zip(questions, positions, found, strict=True)
        ]

    def _slopes(self, position: np.ndarray[Any, Any]) -> list[float]:
        step = 0.01 * np.eye(len(position))
        return ((self.losses(position + step) - self.losses(position - step)) / 0.02).tolist()


def run(algorithm: Algorithm, landscape: Landscape, budget: float) -> list[tuple[float, float]]:
    """Cost so far and best loss so far, for every evaluation that the budget pays for."""
    spent, best, found = 0.0, float("inf"), []
    questions = next(algorithm, None)
    while questions:
        answers = landscape.answer(questions)
        for question, answer in zip(questions, answers, strict=True):
            spent += question.cost
            if spent > budget:
                return found
            best = min(best, answer.loss)
            found.append((spent, best))
        try:
            questions = algorithm.send(answers)
        except StopIteration:
            return found
    return found


# --- what was tried and dropped ------------------------------------------------------------------------------


def cma(space: Space, seed: int, mean: np.ndarray[Any, Any], sigma: float, build: Callable[[Any], Any]) -> Algorithm:
    """CMA-ES, eight candidates a round, after the analytic sets."""
    # The package `cmaes` is for this comparison alone: no extra brings it.
    optimizer = import_module("cmaes").CMA(mean=mean, sigma=sigma, population_size=8, seed=seed + 1)
    yield [Question(candidate, name) for name, candidate in space.seeds()]
    while True:
        points = [optimizer.ask() for _ in range(8)]
        answers = yield [Question(build(point), "cma") for point in points]
        optimizer.tell([(point, answer.loss) for point, answer in zip(points, answers, strict=True)])


def cma_knots(space: Space, seed: int) -> Algorithm:
    """Seven knots of ln λ, from NTK(2s)."""
    index = np.arange(space.size)
    places = np.linspace(0, space.size - 1, 7)
    start = np.interp(places, index, np.log(dict(space.seeds())["ntk2"].factors))
    rising: Callable[[Any], Any] = lambda point: np.maximum.accumulate(np.maximum(point, 0))  # noqa: E731
    return cma(space, seed, start, 0.15, lambda point: space.make(np.exp(np.interp(index, places, rising(point)))))


def cma_ramp(space: Space, seed: int) -> Algorithm:
    """The ramp that guided starts with: where it rises, how wide, how high."""

    def build(point: np.ndarray[Any, Any]) -> Any:
        rise, width, end = np.array([0.15, 0.6, 0.9]) + 0.1 * point
        rise = float(np.clip(rise, 0.0, 0.6))
        return ramp(space, rise, float(np.clip(rise + max(width, 0.05), 0.1, 0.99)), float(np.clip(end, 0.3, 1)), 0.8)

    return cma(space, seed, np.zeros(3), 1.0, build)


def gradient_alone(space: Space, seed: int) -> Algorithm:
    """The gradient from NTK(2s) on, after the analytic sets."""
    questions = [Question(candidate, name) for name, candidate in space.seeds()]
    answers = yield questions
    known = [(question.candidate, answer.loss) for question, answer in zip(questions, answers, strict=True)]
    origin = min(known, key=lambda entry: entry[1])[0]
    yield from polish(space, origin, known, Unseen(), replace(GuidedSettings(), steps=36, least_gain=-99.0), 1.0)


def changed(**changes: Any) -> Callable[[Space, int], Algorithm]:
    return lambda space, seed: guided(space, seed, settings=replace(GuidedSettings(), **changes))


SEARCHES: dict[str, Callable[[Space, int], Algorithm]] = {
    "evolution": lambda space, seed: evolution(space, seed, schedule=schedule_for(space.target)),
    "guided": guided,
    "guided, no gradient": changed(stale=-99.0),
    "guided, gradient from the best alone": changed(near=0.0, basin=0.0),
    "guided, no ramps": changed(ramps=0),
    "guided, 16 ramps": changed(ramps=16),
    "guided, rounds of 4": changed(round=4),
    "guided, caution 0": changed(caution=0.0),
    "guided, caution 2": changed(caution=2.0),
    "CMA-ES, 7 knots": cma_knots,
    "CMA-ES, ramp of 3": cma_ramp,
    "gradient from NTK(2s)": gradient_alone,
}


def compared() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Factors and losses of the best sets of the searches that `search_compare.py` made."""
    records = [record for path in sorted(COMPARED.glob("*.jsonl")) for record in read_journal(path).records]
    best = sorted(records, key=lambda record: record.answer.loss)[:MOST]
    factors = np.array([record.question.candidate.steps for record in best]) / GRID
    return factors, np.array([record.answer.loss for record in best])


def best_at(curve: list[tuple[float, float]], cost: float) -> float:
    return [best for spent, best in curve if spent <= cost][-1]


def measure(landscapes: dict[str, Landscape], space: Space, seeds: range) -> Iterator[dict[str, Any]]:
    """Every search on every landscape, its curves over the seeds."""
    goals: dict[str, float] = {}
    for name, start in SEARCHES.items():
        for kind, landscape in landscapes.items():
            budget = BUDGET.get(name, SHORT_BUDGET)
            curves = [run(start(space, seed), landscape, budget) for seed in seeds]
            ends = [curve[-1][1] for curve in curves]
            if name == "evolution":
                goals[kind] = statistics.median(ends) + GOAL_WITHIN
            reached = [next((spent for spent, best in curve if best <= goals[kind]), None) for curve in curves]
            row = {
                "search": name,
                "landscape": kind,
                "median_at": {
                    str(mark): statistics.median(best_at(curve, mark) for curve in curves)
                    for mark in MARKS
                    if mark <= budget
                },
                "ends": ends,
                "goal": goals[kind],
                "reached_at": reached,
                "median_reached": statistics.median(float("inf") if r is None else r for r in reached),
                "never": sum(r is None for r in reached),
            }
            print(f"{name}, {kind}: {row['median_reached']:.1f}, never {row['never']} of {len(seeds)}", flush=True)
            yield {**row, "median_reached": row["median_reached"] if np.isfinite(row["median_reached"]) else None}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"Searches on landscapes made from a recorded one ({result['sets']} sets, best loss "
        f"{result['recorded_best']:.4f}), `compared` from those of search_compare.py; {result['seeds']} seeds each, "
        f"{result['date']}.",
        f"Command: `{result['command']}`. Median best loss by forward equivalents; cost at which the median search "
        f"reaches evolution's median loss at 704, plus {GOAL_WITHIN}.",
        "",
        "| search | landscape | " + " | ".join(map(str, MARKS)) + " | reaches it at | never |",
        "|---" * (len(MARKS) + 4) + "|",
    ]
    recorded = " | ".join(f"{result['recorded'][str(mark)]:.4f}" for mark in MARKS)
    lines.append(f"| recorded evolution | the model | {recorded} | | |")
    for row in result["searches"]:
        cells = [f"{row['median_at'][str(mark)]:.4f}" if str(mark) in row["median_at"] else "" for mark in MARKS]
        reached = "" if row["median_reached"] is None else f"{row['median_reached']:.0f}"
        lines.append(
            f"| {row['search']} | {row['landscape']} | " + " | ".join(cells) + f" | {reached} | {row['never']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--journal", type=Path, default=JOURNAL)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0, help="seeds that nothing was chosen on flatter nothing")
    options = parser.parse_args()
    rows = json.loads(options.journal.read_text())["rows"]
    losses, factors = np.array([row[0] for row in rows]), np.array([row[3] for row in rows]) / GRID
    landscapes = {kind: Landscape(kind, factors, losses) for kind in ("rbf", "matern", "rough")}
    landscapes["compared"] = Landscape("rough", *compared())
    space = space_for(64, 100000.0, 8192, 65536)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    result = {
        "sets": len(losses),
        "recorded_best": float(losses.min()),
        "recorded": {str(mark): float(losses[:mark].min()) for mark in MARKS},
        "seeds": options.seeds,
        "searches": list(measure(landscapes, space, seeds)),
    }
    for row in result["searches"]:
        if row["search"] == "guided" and row["median_reached"] is not None:
            what = f"search to evolution's loss, {row['landscape']}"
            report(Figure(what, row["median_reached"], "forward equivalents", "evolution", EVOLUTION, 1 / 5))
    path = save("search-offline", result)
    path.with_suffix(".md").write_text(table(json.loads(path.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
