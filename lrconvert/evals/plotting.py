# SPDX-License-Identifier: Apache-2.0
"""Evaluations as pictures: perplexity, keys and RULER's scores against length, benchmark scores."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lrconvert.evals.passkey import by_length
from lrconvert.recipe.plotting import new_pyplot, one_axis, plain_log_scale, save

if TYPE_CHECKING:
    from lrconvert.evals.passkey import PasskeyRow
    from lrconvert.evals.perplexity import PerplexityRow
    from lrconvert.evals.ruler import RulerRow
    from lrconvert.evals.scores import BenchmarkRow

PALE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 1.5}  # behind words on a colour


def plot_perplexity(rows: Sequence[PerplexityRow], path: Path, *, title: str, protocol: str) -> None:
    """Perplexity against length, with its 95 % interval, as a PNG with the protocol in it."""
    figure, axis = one_axis()
    lengths, figures = [row.length for row in rows], [row.perplexity for row in rows]
    values = [found.value for found in figures]
    bars = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    axis.errorbar(lengths, values, yerr=bars, marker="o", capsize=3, color="tab:blue")
    axis.set_xscale("log", base=2)
    plain_log_scale(axis, [bound for found in figures for bound in (found.low, found.high)])
    axis.set_xticks(lengths, [f"{row.length:,}\n({row.tokens:,})" for row in rows], fontsize=8)
    axis.set_xlabel("tokens of context (scored tokens)")
    axis.set_ylabel("perplexity, 95 % interval")
    axis.grid(alpha=0.3)
    _titled(axis, title, protocol)
    save(figure, path)


def plot_passkey(rows: Sequence[PasskeyRow], path: Path, *, title: str, protocol: str) -> None:
    """Keys found, depth against length, as a PNG: every cell has its trials, every length its 95 % interval."""
    figure, axis = one_axis()
    lengths, depths = sorted({row.length for row in rows}), sorted({row.depth for row in rows})
    cells = {(row.depth, row.length): row for row in rows}
    grid = [[cells[depth, length].share.value for length in lengths] for depth in depths]
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (depth, length), cell in cells.items():
        place = (lengths.index(length), depths.index(depth))
        axis.text(*place, f"{cell.hits}/{cell.trials}", fontsize=7, ha="center", va="center", bbox=PALE)
    totals = [total.share for total in by_length(rows)]
    labels = [f"{length:,}\n{share.low:.0%} … {share.high:.0%}" for length, share in zip(lengths, totals, strict=True)]
    axis.set_xticks(range(len(lengths)), labels, fontsize=8)
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    axis.set_xlabel("tokens of context (95 % interval over all depths)")
    axis.set_ylabel("depth of the key")
    figure.colorbar(image, label="share of keys found")
    _titled(axis, title, protocol)
    save(figure, path)


def plot_ruler(rows: Sequence[RulerRow], path: Path, *, title: str, protocol: str) -> None:
    """Score against length, a line with its 95 % intervals for each task, as a PNG."""
    figure, axis = one_axis()
    lengths = sorted({row.length for row in rows})
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        scores = [row.score for row in own]
        bars = [[f.value - f.low for f in scores], [f.high - f.value for f in scores]]
        axis.errorbar(
            [row.length for row in own], [f.value for f in scores], yerr=bars, marker="o", capsize=3, label=task
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    axis.minorticks_off()
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel(f"tokens, answer included ({len(rows[0].scores)} samples each)")
    axis.set_ylabel("score, 95 % interval")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    _titled(axis, title, protocol)
    save(figure, path)


class Measured(Protocol):
    """A model at one length."""

    @property
    def length(self) -> int: ...
    @property
    def perplexity(self) -> float: ...
    @property
    def keys(self) -> int: ...


def plot_before_after(results: Mapping[str, Sequence[Measured]], path: Path, *, title: str) -> None:
    """Perplexity and keys found against length, a line for each of the results, as a PNG."""
    figure, axes = new_pyplot().subplots(1, 2, figsize=(8.5, 3.6), layout="constrained")
    for name, rows in results.items():
        for axis, values in zip(axes, ([row.perplexity for row in rows], [row.keys for row in rows]), strict=True):
            axis.plot([row.length for row in rows], values, marker="o", label=name)
    lengths = sorted({row.length for rows in results.values() for row in rows})
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("tokens of context", fontsize=8)
        axis.grid(alpha=0.3)
    plain_log_scale(axes[0], [row.perplexity for rows in results.values() for row in rows])
    axes[0].set_ylabel("perplexity of the last 1,024 tokens", fontsize=8)
    axes[1].set_ylabel("keys found", fontsize=8)
    axes[1].set_ylim(bottom=0)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _titled(axis: Any, title: str, protocol: str) -> None:
    """The title and the protocol, above the picture."""
    lines = textwrap.wrap(protocol, 110)
    axis.set_title("\n".join([title, *lines]), fontsize=7, loc="left")


def plot_benchmarks(rows: Sequence[BenchmarkRow], path: Path) -> None:
    """A bar a benchmark, with its interval, as a PNG."""
    figure, axis = one_axis()
    figures = [row.score for row in rows]
    bars = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    axis.bar(range(len(rows)), [f.value for f in figures], yerr=bars, capsize=4, color="tab:blue", width=0.6)
    axis.set_xticks(range(len(rows)), [f"{row.task}\n{row.shots} shots, {row.metric}" for row in rows], fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("score")
    axis.grid(alpha=0.3, axis="y")
    save(figure, path)
