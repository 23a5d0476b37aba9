# SPDX-License-Identifier: Apache-2.0
"""The judge against an independent implementation: transformers' native models in float64, all families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import FAMILIES
from transformers import AutoModelForCausalLM

from lrconvert.checkpoint import open_model
from lrconvert.reference import FactorSet, Reference, Rotation
from lrconvert.reference import decoder as decoder_module

TOKENS = np.random.default_rng(3).integers(0, 101, size=40)
# What float32 inverse frequencies in native code leave of float64 agreement at 40 positions.
ROUNDING = 5e-4

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("qwen3", {"attention_bias": True}),
    ("phi3", {"partial_rotary_factor": None}),
]


def plain(model: Any, scale: float = 1.0) -> Rotation:
    """An unscaled rotation; `scale` spoils it, for controls."""
    width = model.shape.rotary_dim
    return Rotation(model.shape.theta, width, [FactorSet(2**20, [scale] * (width // 2), 0, 1.0)])


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=[f"{f}-{'-'.join(c) or 'plain'}" for f, c in VARIANTS])
def test_the_decoder_computes_what_transformers_computes(
    pico_folder: Callable[..., Path], family: str, changes: dict[str, Any]
) -> None:
    """Without any scaling, logits agree to the rounding of float32 tables; a spoiled rotation is far off."""
    folder = pico_folder(family, sliding_window=None, **changes)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = native(torch.as_tensor(TOKENS)[None]).logits[0].numpy()
    model = open_model(folder)
    ours = Reference(model, plain(model)).logits(TOKENS)
    assert ours.dtype == np.float64
    assert np.abs(ours - theirs).max() < ROUNDING
    spoiled = Reference(model, plain(model, 1.5)).logits(TOKENS)
    assert np.abs(spoiled - theirs).max() > 100 * ROUNDING


def test_chunks_do_not_change_the_result(pico_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and logits in chunks of a few rows are the same numbers; `keep` picks rows."""
    model = open_model(pico_folder("llama"))
    whole = Reference(model, plain(model)).logits(TOKENS)
    monkeypatch.setattr(decoder_module, "MAX_SCORES", {"cpu": 4 * 40 * 3})
    monkeypatch.setattr(decoder_module, "MAX_LOGITS", 101 * 7)
    chunked = Reference(model, plain(model)).logits(TOKENS)
    np.testing.assert_allclose(chunked, whole, atol=1e-12)
    picked = Reference(model, plain(model)).logits(TOKENS, keep=[3, 39])
    np.testing.assert_allclose(picked, whole[[3, 39]], atol=1e-12)


def test_weights_need_not_stay_in_memory(pico_folder: Callable[..., Path]) -> None:
    """With no room to keep weights they are read again for every pass, with the same result."""
    model = open_model(pico_folder("qwen2"))
    kept, read = Reference(model, plain(model)), Reference(model, plain(model), keep_bytes=0)
    np.testing.assert_array_equal(kept.logits(TOKENS), read.logits(TOKENS))
    assert not read._kept


def test_the_set_is_chosen_by_the_length_of_the_sequence(pico_folder: Callable[..., Path]) -> None:
    """Short and long sets, start tokens and magnitude all reach the logits, and only where they belong."""
    model = open_model(pico_folder("llama"))
    width = model.shape.rotary_dim // 2
    short, long = FactorSet(20, [1.0] * width, 0, 1.0), FactorSet(64, [3.0] * width, 0, 1.0)
    both = Rotation(model.shape.theta, 2 * width, [short, long])

    def logits(rotation: Rotation, count: int) -> np.ndarray:
        return Reference(model, rotation).logits(TOKENS[:count])

    def only(chosen: FactorSet) -> Rotation:
        return Rotation(model.shape.theta, 2 * width, [chosen])

    np.testing.assert_array_equal(logits(both, 20), logits(only(short), 20))
    np.testing.assert_array_equal(logits(both, 21), logits(only(long), 21))
    assert np.abs(logits(both, 21) - logits(only(short), 21)).max() > 0.1
    start = FactorSet(64, [3.0] * width, 8, 1.0)
    # Positions below n̂ are unscaled: while there are no others, the set is the plain one.
    np.testing.assert_allclose(logits(only(start), 8), logits(only(short), 8), atol=1e-12)
    assert np.abs(logits(only(start), 12) - logits(only(long), 12)).max() > 0.1
    loud = FactorSet(64, [3.0] * width, 0, 1.2)
    assert np.abs(logits(only(loud), 21) - logits(only(long), 21)).max() > 0.1


def test_stored_dtype_rounds_the_weights(pico_folder: Callable[..., Path]) -> None:
    """An artifact in bfloat16 is judged by a reference on the weights it stores."""
    model = open_model(pico_folder("llama"))
    exact = Reference(model, plain(model)).logits(TOKENS)
    rounded = Reference(model, plain(model), stored_dtype="BF16").logits(TOKENS)
    assert 1e-3 < np.abs(exact - rounded).max() < 2.0
