# SPDX-License-Identifier: Apache-2.0
"""Rows scored behind a text that is read once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.extending import scaled
from support.pico import FAMILIES

from lrconvert.checkpoint import Model
from lrconvert.training.cached import Prefilled
from lrconvert.training.loaded import LoadedModel


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_behind_a_text_are_rows_with_the_text(family: str, pico: Callable[..., Model]) -> None:
    """One after the other, of several lengths: losses and first choices, and no row sees the one before it."""
    model = pico(family)
    loaded, rng = LoadedModel(model, device="cpu", dtype="float32"), np.random.default_rng(0)
    loaded.rotation = scaled(model, 300)
    text = rng.integers(3, model.shape.vocab, 200)
    cached = Prefilled(loaded, text)
    for length, judged in ((12, 5), (3, 2), (40, 39), (12, 1)):
        row = rng.integers(3, model.shape.vocab, length)
        with torch.no_grad():
            ids = torch.from_numpy(np.concatenate([text, row]))[None]
            logits = loaded.network(input_ids=ids, use_cache=False).logits[0, -judged - 1 : -1]
        row[-1] = int(logits[-1].argmax())  # one that it would write
        losses, preferred = cached.score(row, judged)
        wanted, choices = loaded.scores(np.concatenate([text, row]), judged)
        np.testing.assert_allclose(losses, wanted, atol=1e-4)
        assert preferred.tolist() == choices.tolist() and preferred[-1]


@pytest.mark.parametrize("judged", [0, 4, 5])
def test_a_judged_token_needs_one_before_it(judged: int, pico: Callable[..., Model]) -> None:
    model = pico("llama")
    cached = Prefilled(LoadedModel(model, device="cpu"), np.arange(9))
    with pytest.raises(ValueError, match=f"{judged} judged tokens of 4"):
        cached.score(np.arange(4), judged)
