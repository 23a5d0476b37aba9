# SPDX-License-Identifier: Apache-2.0
"""A measured number with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
_Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Figure:
    """`value`, and between which bounds it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} … {self.high:.4g})"


def perplexity_figure(clusters: Sequence[np.ndarray], seed: int) -> Figure:
    """exp of the mean loss, from losses (nats a token) in clusters: tokens that stand together go wrong together,
    so clusters are resampled, not tokens (Efron's percentile bootstrap)."""
    sums, counts = np.array([part.sum() for part in clusters]), np.array([len(part) for part in clusters])
    value = math.exp(sums.sum() / counts.sum())
    chosen = np.random.default_rng(seed).integers(0, len(clusters), size=(RESAMPLES, len(clusters)))
    means = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return Figure(value, min(float(low), value), max(float(high), value))


def share_figure(hits: float, trials: int) -> Figure:
    """hits / trials with Wilson's score interval, which stays inside 0 … 1 and is not empty at its ends."""
    share, width = hits / trials, _Z**2 / trials
    centre = (share + width / 2) / (1 + width)
    half = _Z * math.sqrt(share * (1 - share) / trials + width / (4 * trials)) / (1 + width)
    return Figure(share, max(0.0, centre - half), min(1.0, centre + half))


def mean_figure(value: float, stderr: float) -> Figure:
    """A mean of many shares with the interval of its standard error, cut at 0 and 1."""
    return Figure(value, max(0.0, value - _Z * stderr), min(1.0, value + _Z * stderr))


def difference_figure(before: Sequence[float], after: Sequence[float]) -> tuple[Figure, float]:
    """Mean of after − before over the same questions, and its standard error, paired: what makes a question easy or
    hard is in both and falls out."""
    differences = np.asarray(after) - np.asarray(before)
    value = float(differences.mean())
    stderr = float(differences.std(ddof=1) / math.sqrt(len(differences)))
    return Figure(value, value - _Z * stderr, value + _Z * stderr), stderr
