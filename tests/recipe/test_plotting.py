# SPDX-License-Identifier: Apache-2.0
"""Recipes as pictures and as lines of text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

from lrconvert.recipe import load_recipe
from lrconvert.recipe.plotting import BARS, one_axis, plain_log_scale, plot_recipe, sparkline, sparklines


def test_a_sparkline_has_a_bar_per_index_from_lowest_to_highest() -> None:
    assert sparkline((1.0, 2.0, 4.0, 8.0), 8.0) == BARS[0] + BARS[2] + BARS[5] + BARS[7]
    assert sparkline((1.0, 1.0), 1.0) == BARS[0] * 2
    (short, long) = sparklines(load_recipe("demo-yarn-8x"))
    assert long.split()[1].count(BARS[0]) < short.split()[1].count(BARS[0]) == 32


def test_a_plot_is_a_png_and_a_deterministic_svg(tmp_path: Path) -> None:
    """Every tier has a panel and its baselines; the same recipe gives the same bytes."""
    recipe = load_recipe("demo-yarn-8x")
    png, svg = plot_recipe(recipe, tmp_path / "sub" / "a")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    for words in ("up to 4,096 tokens", "up to 32,768 tokens", "NTK-aware", "YaRN", "PI", "frequency index"):
        assert words in text
    assert plot_recipe(recipe, tmp_path / "b")[1].read_text() == text


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((1.0, 1.0), ["0.8", "1", "1.2", "1.4"]),
        ((1.0, 1.3), ["1", "1.2", "1.4", "1.6"]),
        ((1.0, 40.0), ["1", "2", "5", "10", "20"]),
        ((3.0, 3000.0), ["5", "10", "20", "50", "100", "200", "500", "1000", "2000"]),
    ],
)
def test_ticks_are_plain_numbers(values: tuple[float, ...], ticks: list[str]) -> None:
    """No powers of ten, and room around a flat set."""
    figure, axis = one_axis()
    axis.plot(values)
    plain_log_scale(axis, values)
    figure.canvas.draw()
    low, high = axis.get_ylim()
    shown = [label.get_text() for label in axis.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert shown == ticks and low < min(values) and max(values) < high and high / low > 1.9


def test_without_matplotlib_the_lines_are_drawn_and_the_extra_is_named(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("recipe", "plot", "demo-yarn-8x", "-o", tmp_path / "x")
    assert done.code == 6
    assert BARS[-1] in done.out
    assert "lrconvert[plot]" in done.err
    assert cli("recipe", "plot", "demo-yarn-8x").code == 0
    assert list(tmp_path.iterdir()) == []
