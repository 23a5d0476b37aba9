# SPDX-License-Identifier: Apache-2.0
"""A scale of queries that grows with their position: by steps, with a logarithm, from the model's original window on.

It was trained into attention as the weights were, so it is the model's and no part of a rotation: a recipe that
replaces or extends the rotation leaves it, with the window that the model has it from.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QueryScale:
    """The query at position p is multiplied with 1 + `growth` · ln(1 + ⌊p / `window`⌋), so with 1 within the window
    (tokens)."""

    growth: float
    window: int
