# SPDX-License-Identifier: Apache-2.0
"""Intervals: against what is known of them, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lrconvert.evals.figures import perplexity_figure, share_figure


def test_a_share_has_wilsons_interval() -> None:
    """Values of the worked example in Newcombe (1998), Statistics in Medicine 17: 81 of 263, and 0 of 20."""
    found = share_figure(81, 263)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    none = share_figure(0, 20)
    assert none.value == none.low == 0 and none.high == pytest.approx(0.1611, abs=1e-4)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    """Losses in clusters that vary together: the interval holds the true mean in about 95 of 100 draws, and
    resampling single tokens would not."""
    rng = np.random.default_rng(3)
    covered = naive = 0
    for _ in range(200):
        levels = rng.normal(3.0, 0.5, size=40)
        clusters = [level + rng.normal(0, 0.1, size=16) for level in levels]
        found = perplexity_figure(clusters, seed=0)
        covered += found.low <= math.exp(3.0) <= found.high
        single = perplexity_figure([np.array([loss]) for part in clusters for loss in part], seed=0)
        naive += single.low <= math.exp(3.0) <= single.high
    assert 180 <= covered <= 198
    assert naive < 120


def test_same_seed_same_figure() -> None:
    clusters = [np.array([1.0, 2.0]), np.array([3.0]), np.array([2.5, 2.0, 1.5])]
    assert perplexity_figure(clusters, 1) == perplexity_figure(clusters, 1)
    assert perplexity_figure(clusters, 1).value == pytest.approx(math.exp(2.0))
