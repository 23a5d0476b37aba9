# SPDX-License-Identifier: Apache-2.0
"""A search's journal as a picture and as lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lrconvert.errors import InputError
from lrconvert.recipe.plotting import new_pyplot, plain_log_scale, save_twice, sparkline
from lrconvert.searching.journal import Record


def journal_lines(records: Sequence[Record]) -> list[str]:
    """A search as text: for every tier, some of the steps in which the best loss fell, with the factors then."""
    lines = []
    for length in sorted({record.tier for record in records}):
        costs, _, bests = _curve(records, length)
        highest = max(max(best.question.candidate.factors) for best in bests)
        fell = [at for at in range(len(bests)) if at == 0 or bests[at] is not bests[at - 1]]
        lines.append(f"set for {length} tokens: {len(bests)} evaluations, {costs[-1]:.0f} forward equivalents")
        for at in fell[:: max(1, len(fell) // 8)] + fell[-1:]:
            candidate = bests[at].question.candidate
            lines.append(f"{costs[at]:>8.0f} {bests[at].answer.loss:.4f} {sparkline(candidate.factors, highest)}")
    return list(dict.fromkeys(lines))


def plot_journal(records: Sequence[Record], stem: Path) -> list[Path]:
    """Loss against evaluations, and how the best factors moved (early ones pale), as `stem`.png and `stem`.svg."""
    lengths = sorted({record.tier for record in records})
    pyplot = new_pyplot()
    figure, axes = pyplot.subplots(
        len(lengths), 2, figsize=(9.6, 3.4 * len(lengths)), squeeze=False, layout="constrained"
    )
    for (left, right), length in zip(axes, lengths, strict=True):
        costs, losses, bests = _curve(records, length)
        left.plot(costs, losses, ".", color="0.7", markersize=3, label="evaluated")
        left.step(costs, [best.answer.loss for best in bests], where="post", color="tab:blue", label="best so far")
        finite = sorted(loss for loss in losses if math.isfinite(loss))
        lowest, usual = finite[0], finite[len(finite) * 9 // 10]  # the first sets may be worse by nats
        left.set_ylim(lowest - 0.05 * (usual - lowest) - 1e-6, usual + 0.05 * (usual - lowest) + 1e-6)
        left.set_xlabel("forward equivalents", fontsize=8)
        left.set_ylabel(f"loss at {length:,} tokens (nats)", fontsize=8)
        left.legend(fontsize=8, frameon=False)
        moved = [at for at in range(len(bests)) if at == 0 or bests[at] is not bests[at - 1]]
        for order, at in enumerate(moved, 1):
            factors = bests[at].question.candidate.factors
            right.plot(factors, color=pyplot.cm.Blues(0.15 + 0.85 * order / len(moved)), linewidth=1.2)
        plain_log_scale(right, [value for line in right.get_lines() for value in line.get_ydata()])
        right.set_xlabel("frequency index (fast to slow)", fontsize=8)
        right.set_ylabel("best factors λ, early to late", fontsize=8)
        for axis in (left, right):
            axis.grid(alpha=0.3)
    return save_twice(figure, stem)


def _curve(records: Sequence[Record], length: int) -> tuple[list[float], list[float], list[Record]]:
    """For each evaluation of a tier, from the first with a loss on: the cost so far, the loss, the best one so far."""
    costs: list[float] = []
    losses: list[float] = []
    bests: list[Record] = []
    spent = 0.0
    for record in records:
        if record.tier != length:
            continue
        spent += record.question.cost
        if bests or math.isfinite(record.answer.loss):
            best = bests[-1] if bests and bests[-1].answer.loss <= record.answer.loss else record
            costs.append(spent)
            losses.append(record.answer.loss)
            bests.append(best)
    if not bests:
        raise InputError(f"no evaluation of a set for {length} tokens has a loss")
    return costs, losses, bests
