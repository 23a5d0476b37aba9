# SPDX-License-Identifier: Apache-2.0
"""Recipes as pictures and as lines of text: factors by frequency index."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrconvert.errors import require
from lrconvert.recipe.derive import factor_set
from lrconvert.recipe.file import Method, Recipe
from lrconvert.writing import replace_file

LOG_TICKS = 5.0  # ratio of highest to lowest above which ticks are 1, 2, 5, 10 …; below, evenly spaced numbers
BARS = "▁▂▃▄▅▆▇█"
# Every tier is shown beside these, at the tier's own extension ratio.
BASELINES: dict[Method, str] = {"pi": "PI", "ntk": "NTK-aware", "yarn": "YaRN"}


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


def new_pyplot() -> Any:
    require("matplotlib", "plot", "a plot")
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lrconvert"  # the same recipe, the same bytes
    from matplotlib import pyplot

    return pyplot


def one_axis() -> tuple[Any, Any]:
    return new_pyplot().subplots(figsize=(6.4, 4.2), layout="constrained")


def plain_log_scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis around `values` with plain numbers on it. Equal values get a range of a factor of 2."""
    from matplotlib import ticker

    low, high = min(values), max(values)
    spare = max(1.05, math.sqrt(2 / (high / low)))
    axis.set_yscale("log")
    axis.set_ylim(low / spare, high * spare)
    wide = high / low > LOG_TICKS
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if wide else ticker.MaxNLocator(5, steps=[1, 2, 5]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _picture(figure, path.suffix))
    pyplot.close(figure)


def _picture(figure: Any, suffix: str) -> bytes:
    """An SVG without a date in it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, format=suffix[1:], metadata={"Date": None} if suffix == ".svg" else None)
    return drawn.getvalue()


def plot_recipe(recipe: Recipe, stem: Path) -> list[Path]:
    """Factors of every tier beside PI, NTK-aware and YaRN, as `stem`.png and `stem`.svg."""
    pyplot, tiers = new_pyplot(), recipe.tiers
    columns = min(len(tiers), 4)
    rows = -(-len(tiers) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, tier in zip(axes.flat, tiers, strict=False):
        ratio = tier.max_length / recipe.original_window
        for (method, label), style in zip(BASELINES.items(), (":", "--", "-."), strict=True):
            if ratio > 1:
                baseline = factor_set(method, recipe.rotary_dim, recipe.rope_theta, ratio, recipe.original_window)
                axis.plot(baseline, style, color="0.55", linewidth=1.2, label=label)
        axis.plot(tier.factors, color="tab:blue", linewidth=2, label="this recipe")
        plain_log_scale(axis, [value for line in axis.get_lines() for value in line.get_ydata()])
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
    return save_twice(figure, stem)


def save_twice(figure: Any, stem: Path) -> list[Path]:
    """As a PNG and as an SVG without a date in it."""
    from matplotlib import pyplot

    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        replace_file(path, _picture(figure, path.suffix))
    pyplot.close(figure)
    return paths
