# SPDX-License-Identifier: Apache-2.0
"""Recipes, looked at: factors by frequency index, as a picture or as a line of text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.errors import InputError, require
from lrconvert.evals.passkey import by_length
from lrconvert.recipe import Method, Recipe, factor_set

if TYPE_CHECKING:
    from lrconvert.evals.benchmarks import BenchmarkRow
    from lrconvert.evals.passkey import PasskeyRow
    from lrconvert.evals.perplexity import PerplexityRow
    from lrconvert.search.journal import Record

BARS = "▁▂▃▄▅▆▇█"
PALE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 1.5}  # behind words on a colour
# What every tier is shown beside, at the tier's own extension ratio.
PEERS: dict[Method, str] = {"pi": "PI", "ntk": "NTK-aware", "yarn": "YaRN"}


def sparkline(values: tuple[float, ...], highest: float) -> str:
    """One bar per frequency index, log scale from 1 (lowest) to `highest`."""
    top = max(math.log(highest), 1e-9)
    levels = [min(max(math.log(value) / top, 0.0), 1.0) * (len(BARS) - 1) for value in values]
    return "".join(BARS[round(level)] for level in levels)


def sparklines(recipe: Recipe) -> list[str]:
    """A labelled line per tier."""
    highest = max(max(tier.factors) for tier in recipe.tiers)
    width = len(str(recipe.tiers[-1].max_length))
    return [
        f"{tier.max_length:>{width}} {sparkline(tier.factors, highest)} λ {min(tier.factors):.4g} … "
        f"{max(tier.factors):.4g}, n̂ {tier.start_tokens}, attention {tier.attention_factor:.4g}"
        for tier in recipe.tiers
    ]


def plot_perplexity(rows: Sequence[PerplexityRow], path: Path, *, title: str, protocol: str) -> None:
    """Perplexity against length, with its 95 % interval, as a PNG that says how it was measured."""
    figure, axis = _one_axis()
    lengths, figures = [row.length for row in rows], [row.perplexity for row in rows]
    values = [found.value for found in figures]
    bars = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    axis.errorbar(lengths, values, yerr=bars, marker="o", capsize=3, color="tab:blue")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{row.length:,}\n({row.tokens:,})" for row in rows], fontsize=8)
    axis.set_xlabel("tokens of context (tokens that count)")
    axis.set_ylabel("perplexity, 95 % interval")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3)
    _told(axis, title, protocol)
    _saved(figure, path)


def plot_passkey(rows: Sequence[PasskeyRow], path: Path, *, title: str, protocol: str) -> None:
    """Keys found, depth against length, as a PNG: every cell has its trials, every length its 95 % interval."""
    figure, axis = _one_axis()
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
    _told(axis, title, protocol)
    _saved(figure, path)


def _told(axis: Any, title: str, protocol: str) -> None:
    """What was measured and how, above the picture."""
    lines = textwrap.wrap(protocol, 110)
    axis.set_title("\n".join([title, *lines]), fontsize=7, loc="left")


def plot_benchmarks(rows: Sequence[BenchmarkRow], path: Path) -> None:
    """A bar a benchmark, with its interval, as a PNG."""
    figure, axis = _one_axis()
    figures = [row.score for row in rows]
    bars = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    axis.bar(range(len(rows)), [f.value for f in figures], yerr=bars, capsize=4, color="tab:blue", width=0.6)
    axis.set_xticks(range(len(rows)), [f"{row.task}\n{row.shots} shots, {row.metric}" for row in rows], fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("score")
    axis.grid(alpha=0.3, axis="y")
    _saved(figure, path)


def journal_lines(records: Sequence[Record]) -> list[str]:
    """A search in words: of every tier the best loss whenever it fell, thinned out, with the factors then."""
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
    pyplot = _pyplot()
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
        right.set_yscale("log")
        right.set_xlabel("frequency index (fast to slow)", fontsize=8)
        right.set_ylabel("best factors λ, early to late", fontsize=8)
        for axis in (left, right):
            axis.grid(alpha=0.3)
    return _saved_twice(figure, stem)


def _curve(records: Sequence[Record], length: int) -> tuple[list[float], list[float], list[Record]]:
    """Of one tier's evaluations: cost so far, loss, and the best one so far, from the first with a loss on."""
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


def _pyplot() -> Any:
    require("matplotlib", "plot", "a plot")
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lrconvert"  # the same recipe, the same bytes
    from matplotlib import pyplot

    return pyplot


def _one_axis() -> tuple[Any, Any]:
    return _pyplot().subplots(figsize=(6.4, 4.2), layout="constrained")


def _saved(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_recipe(recipe: Recipe, stem: Path) -> list[Path]:
    """Factors of every tier beside PI, NTK-aware and YaRN, as `stem`.png and `stem`.svg."""
    pyplot, tiers = _pyplot(), recipe.tiers
    columns = min(len(tiers), 4)
    rows = -(-len(tiers) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, tier in zip(axes.flat, tiers, strict=False):
        ratio = tier.max_length / recipe.original_window
        for (method, label), style in zip(PEERS.items(), (":", "--", "-."), strict=True):
            if ratio > 1:
                peer = factor_set(method, recipe.rotary_dim, recipe.rope_theta, ratio, recipe.original_window)
                axis.plot(peer, style, color="0.55", linewidth=1.2, label=label)
        axis.plot(tier.factors, color="tab:blue", linewidth=2, label="this recipe")
        axis.set_yscale("log")
        axis.set_xlabel("frequency index (fast to slow)", fontsize=8)
        axis.grid(alpha=0.3)
        axis.set_title(
            f"up to {tier.max_length:,} tokens ({ratio:g}x)\n"
            f"n̂ {tier.start_tokens}, attention factor {tier.attention_factor:.4g}",
            fontsize=9,
        )
    lines = {line.get_label(): line for axis in axes.flat[: len(tiers)] for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    for axis in axes.flat[len(tiers) :]:
        axis.set_visible(False)
    figure.supylabel("factor λ (divides the frequency)", fontsize=9)
    figure.suptitle(recipe.name, fontsize=11)
    return _saved_twice(figure, stem)


def _saved_twice(figure: Any, stem: Path) -> list[Path]:
    """As a PNG and as an SVG without a date in it."""
    from matplotlib import pyplot

    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths
