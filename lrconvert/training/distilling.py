# SPDX-License-Identifier: Apache-2.0
"""Distillation: a model learns to say in a long context what it said in a shorter one.

On text that it knows by heart a model lowers its loss by heart, too. The model as it was, reading less, is a better
aim: there is nothing to gain from knowing the text, and what a longer context disturbs is all that is left to learn
(compare LongReD, arXiv 2502.07365, which keeps the original window so).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lrconvert.training.attention import use_kernel
from lrconvert.training.keys import Tokens
from lrconvert.training.losses import Taught
from lrconvert.training.rows import window_starts

if TYPE_CHECKING:
    from lrconvert.training.loaded import LoadedModel
    from lrconvert.training.rotation import Rotation


class Teacher:
    """A model that reads rows in windows of `window` tokens; `rotation_of` gives the rotation for a length."""

    def __init__(self, model: LoadedModel, window: int, rotation_of: Callable[[int], Rotation], at_once: int) -> None:
        """`at_once`: tokens of a forward pass."""
        self._model, self._window, self._rotation_of, self._at_once = model, window, rotation_of, at_once

    def of(self, tokens: Tokens, where: NDArray[np.bool_]) -> Taught:
        """What it says of rows [b, n]."""
        model, (rows, count) = self._model, tokens.shape
        window = min(self._window, count)
        model.rotation = self._rotation_of(window)
        ids = torch.from_numpy(tokens).to(model.device)
        starts = window_starts(count, window)
        blocks = torch.cat([ids[:, start : start + window] for start in starts])
        positions = torch.arange(window, device=model.device)[None]
        with torch.no_grad(), use_kernel(model.attention):
            parts = [model.hidden(part, positions) for part in blocks.split(max(1, self._at_once // window))]
        hidden, known = torch.cat(parts).unflatten(0, (len(starts), rows)), 0
        found = []
        for start, block in zip(starts, hidden, strict=True):
            found.append(block[:, known - start :])  # the rest is from the window before
            known = start + window
        return Taught(torch.cat(found, 1), model.head, where)
