# SPDX-License-Identifier: Apache-2.0
"""A model in memory under any rotation. tests/searching/test_evaluator.py holds its losses against the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lrconvert import rope
from lrconvert.checkpoint import Model
from lrconvert.errors import UsageError
from lrconvert.rope import Tier
from lrconvert.training.loaded import LoadedModel


def test_a_tier_is_a_rotation(pico: Callable[..., Model]) -> None:
    """Its factors, start tokens and attention factor all count; composed with an unscaled set it is the same."""
    model = pico("llama")
    loaded, shape = LoadedModel(model, device="cpu"), model.shape
    tokens = np.random.default_rng(0).integers(0, shape.vocab, (2, 96))
    unscaled = Tier(96, (1.0,) * (shape.rotary_dim // 2))
    tier = Tier(96, tuple(np.linspace(1.0, 4.0, shape.rotary_dim // 2).tolist()), 8, 1.2)
    losses = []
    for rotation in (
        tier,
        rope.compose(unscaled, tier),
        unscaled,
        Tier(96, tier.factors, 0, 1.2),
        Tier(96, tier.factors, 8),
    ):
        loaded.rotation = rotation
        losses.append(loaded.losses(tokens))
    first, composed, *others = losses
    assert first.shape == (2, 95) and np.array_equal(first, composed)
    assert all(np.abs(first - other).max() > 1e-4 for other in others)


def test_only_judged_losses_are_computed(pico: Callable[..., Model]) -> None:
    """With a gradient and without; others are zero, and weights reach only what is judged."""
    model = pico("llama")
    loaded = LoadedModel(model, device="cpu")
    tokens = np.random.default_rng(1).integers(0, model.shape.vocab, (1, 40))
    whole, part = loaded.losses(tokens), loaded.losses(tokens, (10, 20))
    np.testing.assert_allclose(part[:, 10:20], whole[:, 10:20], atol=1e-6)
    assert not part[:, :10].any() and not part[:, 20:].any()
    weights = np.zeros((1, 39))
    weights[:, 10:20] = 0.1
    same, gradient = loaded.losses_and_gradient(tokens, weights, (10, 20))
    np.testing.assert_allclose(same, part, atol=1e-5)
    _, everywhere = loaded.losses_and_gradient(tokens, weights)
    np.testing.assert_allclose(gradient, everywhere, atol=1e-6)
    assert loaded.rope.log_factors is None


def test_an_unknown_kernel_is_an_error_before_anything_is_loaded() -> None:
    nothing: Model = None  # type: ignore[assignment]
    with pytest.raises(UsageError, match="no attention kernel 'fast'; there are cudnn, flash"):
        LoadedModel(nothing, device="cpu", attention="fast")
