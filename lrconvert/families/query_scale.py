# SPDX-License-Identifier: Apache-2.0
"""A scale of queries that grows with their position, in steps of the model's original window, logarithmically.

It was trained like the weights, so it belongs to the model and not to its rotation: a recipe that replaces or extends
the rotation keeps the scale and its window.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QueryScale:
    """The query at position p is multiplied by 1 + `growth` · ln(1 + ⌊p / `window`⌋), so with 1 within the window
    (tokens)."""

    growth: float
    window: int
