# SPDX-License-Identifier: Apache-2.0
"""Recipes, looked at: factors by frequency index, as a picture or as a line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.errors import require
from lrconvert.recipe import Method, Recipe, factor_set

if TYPE_CHECKING:
    from lrconvert.evals.passkey import PasskeyRow
    from lrconvert.evals.perplexity import PerplexityRow

BARS = "▁▂▃▄▅▆▇█"
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


def plot_perplexity(rows: Sequence[PerplexityRow], path: Path) -> None:
    """Perplexity against length, with its interval, as a PNG."""
    figure, axis = _one_axis()
    lengths, figures = [row.length for row in rows], [row.perplexity for row in rows]
    values = [found.value for found in figures]
    bars = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    axis.errorbar(lengths, values, yerr=bars, marker="o", capsize=3, color="tab:blue")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("perplexity of the same tokens")
    axis.grid(alpha=0.3)
    _saved(figure, path)


def plot_passkey(rows: Sequence[PasskeyRow], path: Path) -> None:
    """Share of keys found, depth against length, as a PNG."""
    figure, axis = _one_axis()
    lengths, depths = sorted({row.length for row in rows}), sorted({row.depth for row in rows})
    share = {(row.depth, row.length): row.hits / row.trials for row in rows}
    grid = [[share[depth, length] for length in lengths] for depth in depths]
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("depth of the key")
    figure.colorbar(image, label="share of keys found")
    _saved(figure, path)


def _one_axis() -> tuple[Any, Any]:
    require("matplotlib", "plot", "a plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")


def _saved(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_recipe(recipe: Recipe, stem: Path) -> list[Path]:
    """Factors of every tier beside PI, NTK-aware and YaRN, as `stem`.png and `stem`.svg."""
    require("matplotlib", "plot", "a plot")
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lrconvert"  # the same recipe, the same bytes
    from matplotlib import pyplot

    tiers = recipe.tiers
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
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths
