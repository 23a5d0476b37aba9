# SPDX-License-Identifier: Apache-2.0
"""A model in memory under any rotation. tests/searching/test_evaluator.py holds its losses against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.extending import scaled

from lrconvert import rope
from lrconvert.checkpoint import Model
from lrconvert.errors import UsageError
from lrconvert.rope import Tier
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.losses import MAX_LOGITS


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


# --- rows with positions of their own, and gradients of the weights --------------------------------------------


def test_rows_with_their_own_positions_are_each_row_alone(pico: Callable[..., Model]) -> None:
    """With jumps; positions that are written out but do not jump change nothing, and a jump does."""
    model = pico("llama")
    loaded = LoadedModel(model, device="cpu")
    loaded.rotation = scaled(model, 900)
    tokens = np.random.default_rng(3).integers(0, model.shape.vocab, (3, 48))
    at = np.stack([np.arange(48), np.arange(48) + 700 * (np.arange(48) > 20), np.arange(48) * 17])
    together = loaded.losses(tokens, at=at)
    for index in range(3):
        alone = loaded.losses(tokens[index : index + 1], at=at[index])
        np.testing.assert_allclose(together[index], alone[0], atol=1e-5)
    plain = loaded.losses(tokens)
    np.testing.assert_allclose(together[0], plain[0], atol=1e-5)
    assert (np.abs(together[1:] - plain[1:]).max(1) > 1e-2).all()
    # What stands before a jump does not know of it; and no token behind it takes the row for another document.
    np.testing.assert_allclose(together[1, :20], plain[1, :20], atol=1e-5)
    changed = tokens.copy()
    changed[1, 0] = (changed[1, 0] + 1) % model.shape.vocab
    assert np.abs(loaded.losses(changed, at=at)[1, 30:] - together[1, 30:]).max() > 1e-4


def test_gradients_in_factors_take_positions_too(pico: Callable[..., Model]) -> None:
    """The gradient of rows that jump is the slope of their losses, by differences."""
    model = pico("llama")
    loaded = LoadedModel(model, device="cpu")
    tier = scaled(model, 900)
    tokens = np.random.default_rng(4).integers(0, model.shape.vocab, (2, 32))
    at = np.stack([np.arange(32) + 60 * (np.arange(32) > 9), np.arange(32) + 90 * (np.arange(32) > 20)])
    weights = np.full((2, 31), 1 / 62)
    loaded.rotation = tier
    losses, gradient = loaded.losses_and_gradient(tokens, weights, at=at)
    np.testing.assert_allclose(losses, loaded.losses(tokens, at=at), atol=1e-5)
    index, step = 4, 2e-3
    slopes = []
    for by in (step, -step):
        factors = list(tier.factors)
        factors[index] *= np.exp(by)
        loaded.rotation = replace(tier, factors=tuple(factors))
        slopes.append(float((loaded.losses(tokens, at=at) * weights).sum()))
    assert gradient[index] == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_backward_is_autograd_through_the_logits(family: str, pico: Callable[..., Model]) -> None:
    """Gradients of weights add up over calls; chunked losses and one pass back through the decoder give what autograd
    gives for a plain cross entropy of transformers' own logits."""

    def adapt(network: Any) -> None:
        network.get_decoder().layers.requires_grad_(True)

    model = pico(family)
    loaded = LoadedModel(model, device="cpu", adapt=adapt)
    loaded.rotation = scaled(model, 900)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, model.shape.vocab, (2, 40))
    at = np.stack([np.arange(40), np.arange(40) + 300 * (np.arange(40) > 10)])
    weights = rng.random((2, 39)) * (rng.random((2, 39)) < 0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MAX_LOGITS, "cpu", 7 * model.shape.vocab)  # many chunks
        losses = loaded.backward(tokens, weights, at)
    ids = torch.from_numpy(tokens)
    given = {"input_ids": ids, "position_ids": torch.from_numpy(at), "attention_mask": torch.ones_like(ids)}
    logits = loaded.network(**given, use_cache=False).logits[:, :-1]
    naive = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    np.testing.assert_allclose(losses, naive.detach().numpy(), atol=1e-5)
    wanted = torch.autograd.grad((naive * torch.from_numpy(weights)).sum(), loaded.trainable)
    for weight, gradient in zip(loaded.trainable, wanted, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient, atol=1e-4, rtol=1e-3)
    loaded.backward(tokens, weights, at)
    weight, gradient = loaded.trainable[0], wanted[0]
    torch.testing.assert_close(weight.grad, 2 * gradient, atol=1e-4, rtol=1e-3)
    assert loaded.head.weight.grad is None


def test_scores_are_losses_and_first_choices(pico: Callable[..., Model]) -> None:
    """Of the last tokens of a document: the losses that `losses` has, and true where a token is the likeliest one."""
    model = pico("llama")
    loaded = LoadedModel(model, device="cpu")
    loaded.rotation = scaled(model, 64)
    tokens = np.random.default_rng(6).integers(0, model.shape.vocab, 50)
    with torch.no_grad():
        ids = torch.from_numpy(tokens[None])
        likeliest = loaded.network(input_ids=ids, use_cache=False).logits[0, :-1].argmax(-1).numpy()
    tokens[-1] = likeliest[-1]  # one that it would write
    losses, preferred = loaded.scores(tokens, 7)
    np.testing.assert_allclose(losses, loaded.losses(tokens[None])[0, -7:], atol=1e-6)
    assert preferred.tolist() == (likeliest[-7:] == tokens[-7:]).tolist() and preferred[-1] and not preferred.all()
