# SPDX-License-Identifier: Apache-2.0
"""`guided` against `evolution` on a real model: same document, same space, several seeds, then held-out text.

    python benchmarks/search_compare.py MODEL --text A [--held-out B …] --target 64k --folder DIR
        [--name NAME] [--original-window 8k] [--algorithms guided evolution] [--seeds 0 1 2] [--budget-guided 140]
        [--budget-evolution 704] [--seconds 540] [--device cuda] [--dtype bfloat16] [--attention cudnn]
        [--space longrope2] [--documents 4]

A, B: texts (.txt, with the model's tokenizer) or token ids (.npy of integers), at least as long as the target. Every
search keeps its journal in DIR, and every held-out loss is kept there too: after `--seconds` the script stops with exit
code 75, and the same command goes on. Searches of another space, or of more documents of A, need a folder of their own;
held-out losses are of one document each. When all is measured it writes results/search-compare-NAME.{json,md}. Under
torchrun the processes share each search.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import save

from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.cli._common import TOKENS
from lrconvert.evals.texts import Text, read_texts, sources_of
from lrconvert.searching.evaluator import TransformersEvaluator
from lrconvert.searching.journal import Journal, Record, read_journal
from lrconvert.searching.objective import Objective, build_objective
from lrconvert.searching.plan import SearchPlan, TierPlan
from lrconvert.searching.protocol import Question
from lrconvert.searching.run import Progress, Search
from lrconvert.searching.space import Candidate, Space, space_for

MARKS = (16, 32, 48, 64, 96, 140, 256, 350, 500, 704)  # forward equivalents at which the best loss is recorded
GOAL_AT = 700
GOAL_WITHIN = 0.002
UNFINISHED = 75  # EX_TEMPFAIL


class OutOfTime(Exception):
    """The time of this call is over; the journals go on."""


class Comparison:
    """The searches of one model on one document."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder
        self.ends_at = time.monotonic() + options.seconds
        self.model = open_model(options.model)
        self.window = options.original_window or self.model.shape.window
        shape = self.model.shape
        self.space = space_for(shape.rotary_dim, shape.theta, self.window, options.target, kind=options.space)
        paths = [options.text, *options.held_out]
        path = self.model.checkpoint.path
        self.text, *self.held_out = read_texts(sources_of(paths), lambda: tokenizer_of(path), vocab=shape.vocab)
        self.evaluator = TransformersEvaluator(
            self.model, device=options.device, dtype=options.dtype, attention=options.attention
        )
        self.folder.mkdir(parents=True, exist_ok=True)

    def objective(self, text: Text, documents: int = 1) -> Objective:
        return build_objective(
            "perplexity",
            {self.options.target: 1.0},
            original_window=self.window,
            texts=[text],
            documents=documents,
            needles=lambda lengths: [],
        )

    def journal(self, algorithm: str, seed: int) -> Path:
        return self.folder / f"{algorithm}-{seed}.jsonl"

    def search(self, algorithm: Any, seed: int, budget: int) -> None:
        """One search, from where its journal ends."""
        plan = SearchPlan(
            model=self.model,
            original_window=self.window,
            algorithm=algorithm,
            seed=seed,
            tiers=(TierPlan(self.space, self.objective(self.text, self.options.documents), budget),),
            texts=(self.text,),
            dtype=str(self.evaluator.model.dtype).removeprefix("torch."),
            name=f"{algorithm}-{seed}",
            base_model=self.options.name,
        )
        if not self.evaluator.leading:
            Search(plan, self.evaluator, None, self._watch).run()
            return
        with Journal.open(self.journal(algorithm, seed), plan.identity) as journal:
            journal.begin(self.evaluator.describe())
            Search(plan, self.evaluator, journal, self._watch).run()

    def _watch(self, now: Progress) -> None:
        if now.seconds is not None and self.evaluator.agree(time.monotonic() > self.ends_at):
            raise OutOfTime

    def held_out_losses(self, candidates: dict[str, Candidate]) -> dict[str, dict[str, dict[str, float]]]:
        """Losses of every named candidate on every held-out text, by length; measured once."""
        path = self.folder / "held-out.json"
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        found: dict[str, Any] = {}
        for text in self.held_out:
            objective = self.objective(text)
            for name, candidate in candidates.items():
                key = f"{text.sha256} {json.dumps(candidate.to_json())}"
                if key not in known:
                    if time.monotonic() > self.ends_at:
                        raise OutOfTime
                    known[key] = self.evaluator.answer(objective, [Question(candidate)])[0].losses
                    path.write_text(json.dumps(known))
                found.setdefault(name, {})[text.name] = known[key]
        return found

    def starts(self) -> dict[str, Candidate]:
        """The analytic sets as they are searched from, and the model as it is."""
        plain = Space(*self._shape(), attention=(1.0, 1.0)).make([1.0] * self.space.size)
        return {"unmodified": plain, **dict(self.space.seeds())}

    def _shape(self) -> tuple[int, float, int, int]:
        return self.space.rotary_dim, self.space.base, self.space.original_window, self.space.target


# --- figures -----------------------------------------------------------------------------------------------


def costs(records: list[Record]) -> list[float]:
    """Forward equivalents spent up to each evaluation."""
    spent, found = 0.0, []
    for record in records:
        spent += record.question.cost
        found.append(spent)
    return found


def best_at(records: list[Record], cost: float) -> float:
    pairs = zip(records, costs(records), strict=True)
    return min((record.answer.loss for record, spent in pairs if spent <= cost), default=float("inf"))


def cost_to_reach(records: list[Record], loss: float) -> float | None:
    pairs = zip(records, costs(records), strict=True)
    return next((spent for record, spent in pairs if record.answer.loss <= loss), None)


def figures_of(searches: dict[str, list[Record]]) -> dict[str, dict[str, Any]]:
    """Of every search: the best loss at the marks, its end, seconds."""
    return {
        name: {
            "evaluations": len(records),
            "forward_equivalents": round(costs(records)[-1], 1),
            "seconds": round(sum(record.answer.seconds for record in records), 1),
            "failed": sum(record.answer.error is not None for record in records),
            "best_at": {str(mark): best_at(records, mark) for mark in MARKS if mark <= costs(records)[-1] + 1},
            "loss": best_at(records, float("inf")),
        }
        for name, records in searches.items()
    }


def compared(searches: dict[str, list[Record]]) -> dict[str, Any]:
    """The claim: the cost at which guided reaches the median of evolution's losses at 700 (or its end)."""
    others = [records for name, records in searches.items() if name.startswith("evolution")]
    guided = {name: records for name, records in searches.items() if name.startswith("guided")}
    if not others or not guided:
        return {}
    at = min(GOAL_AT, *(costs(records)[-1] for records in others))
    goal = statistics.median(best_at(records, at) for records in others) + GOAL_WITHIN
    reached = {name: cost_to_reach(records, goal) for name, records in guided.items()}
    median = statistics.median(value if value is not None else float("inf") for value in reached.values())
    return {"at": at, "goal": goal, "reached_at": reached, "median": median, "share": median / at}


def table(result: dict[str, Any]) -> str:
    """The result as a page."""
    marks = [mark for mark in MARKS if any(str(mark) in s["best_at"] for s in result["searches"].values())]
    lines = [
        f"Searches of {result['model']} up to {result['target']} tokens on {result['text']}, {result['date']}, "
        f"{result['environment']['device']}, {result['environment']['dtype']}, torch {result['environment']['torch']}.",
        f"Command: `{result['command']}`.",
        "",
        "Best loss (nats a token) by forward equivalents:",
        "",
        "| search | " + " | ".join(map(str, marks)) + " | end | seconds |",
        "|---" * (len(marks) + 3) + "|",
    ]
    for name, found in result["searches"].items():
        cells = [f"{found['best_at'][str(mark)]:.4f}" if str(mark) in found["best_at"] else "" for mark in marks]
        end = f"{found['loss']:.4f} ({found['forward_equivalents']:g})"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {end} | {found['seconds']:.0f} |")
    if goal := result["compared"]:
        reached = ", ".join(
            f"{name} {cost:.1f}" if cost else f"{name} never" for name, cost in goal["reached_at"].items()
        )
        lines += [
            "",
            f"Evolution's median at {goal['at']:g}, plus {GOAL_WITHIN}: {goal['goal']:.4f}. "
            f"Guided reaches it at {reached}; median {goal['median']:.1f}, {goal['share']:.3f} of {goal['at']:g}.",
        ]
    for text in sorted({text for found in result["held_out"].values() for text in found}):
        lengths = sorted(
            {key for f in result["held_out"].values() for key in f[text]}, key=lambda k: int(k.split("@")[1])
        )
        lines += ["", f"Losses on {text} (not searched on):", "", "| set | " + " | ".join(lengths) + " |"]
        lines.append("|---" * (len(lengths) + 1) + "|")
        for name, found in result["held_out"].items():
            lines.append(f"| {name} | " + " | ".join(f"{found[text][key]:.4f}" for key in lengths) + " |")
    return "\n".join(lines) + "\n"


def picture(searches: dict[str, list[Record]], path: Path) -> None:
    """The best loss so far against forward equivalents, a line a search."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 4.0))
    named = set()
    ends = [best_at(records, float("inf")) for records in searches.values()]
    for name, records in searches.items():
        algorithm = name.split()[0]
        losses = np.minimum.accumulate([record.answer.loss for record in records])
        color = "tab:blue" if algorithm == "guided" else "tab:orange"
        label = None if algorithm in named else algorithm
        axis.step(costs(records), losses, where="post", color=color, linewidth=1.4, label=label)
        named.add(algorithm)
    started = max(best_at(records, 16) for records in searches.values())
    axis.set_ylim(min(ends) - 0.05 * (started - min(ends)), started + 0.2 * (started - min(ends)))
    axis.set_xlabel("forward equivalents")
    axis.set_ylabel("best loss, nats a token")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tokens: Any = lambda value: TOKENS.convert(value, None, None)  # noqa: E731
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, nargs="*", default=[])
    parser.add_argument("--target", type=tokens, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where journals are kept")
    parser.add_argument("--name", default="model")
    parser.add_argument("--original-window", type=tokens)
    parser.add_argument("--algorithms", nargs="*", default=["guided", "evolution"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--budget-guided", type=int, default=140)
    parser.add_argument("--budget-evolution", type=int, default=704)
    parser.add_argument("--space", choices=("longrope", "longrope2"), default="longrope")
    parser.add_argument("--documents", type=int, default=1, help="of A that an evaluation reads")
    parser.add_argument("--seconds", type=float, default=540.0, help="of this call")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--attention")
    options = parser.parse_args()
    comparison = Comparison(options)
    leading = comparison.evaluator.leading
    try:
        for algorithm in options.algorithms:
            for seed in options.seeds:
                comparison.search(algorithm, seed, getattr(options, f"budget_{algorithm}"))
                if leading:
                    print(f"{algorithm} {seed}: done", flush=True)
        if not leading:
            return 0
        names = [(algorithm, seed) for algorithm in options.algorithms for seed in options.seeds]
        searches = {f"{name} {seed}": read_journal(comparison.journal(name, seed)).records for name, seed in names}
        best = {name: min(records, key=lambda record: record.answer.loss) for name, records in searches.items()}
        candidates = {**comparison.starts(), **{name: record.question.candidate for name, record in best.items()}}
        held_out = comparison.held_out_losses(candidates) if comparison.evaluator.width == 1 else {}
    except OutOfTime:
        print("out of time: the same command goes on", flush=True)
        return UNFINISHED
    result = {
        "model": options.name,
        "target": options.target,
        "original_window": comparison.window,
        "text": comparison.text.name,
        "space": options.space,
        "documents": options.documents,
        "environment": comparison.evaluator.describe(),
        "searches": figures_of(searches),
        "compared": compared(searches),
        "best": {name: record.question.candidate.to_json() for name, record in best.items()},
        "held_out": held_out,
    }
    path = save(f"search-compare-{options.name}", result)
    path.with_suffix(".md").write_text(table(json.loads(path.read_text())), encoding="utf-8")
    picture(searches, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
