# SPDX-License-Identifier: Apache-2.0
"""The formulas against two other implementations: transformers' own, and the reference's second writing of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lrconvert import rope
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.reference import FactorSet, Rotation
from lrconvert.rope import RopeSpec, Tier

DIM, BASE, L0 = 64, 500000.0, 4096


def transformers_rope(scaling: dict, window: int = L0, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    """Inverse frequencies and attention factor as transformers computes them (float32)."""
    make: Any = LlamaConfig  # both spellings of the scaling are accepted, one is typed
    config = make(
        hidden_size=DIM,
        num_attention_heads=1,
        max_position_embeddings=window,
        rope_theta=BASE,
        rope_scaling={**scaling, "rope_theta": BASE},
    )
    inverse, attention = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=seq_len)
    return inverse.numpy(), attention


CASES = {
    "linear": ({"factor": 4.0}, rope.pi_factors(DIM, 4.0), 1.0),
    "yarn": (
        {"factor": 8.0, "original_max_position_embeddings": L0},
        rope.yarn_factors(DIM, BASE, 8.0, L0),
        rope.yarn_attention_factor(8.0),
    ),
    "llama3": (
        {"factor": 8.0, "original_max_position_embeddings": L0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        rope.llama3_factors(DIM, BASE, 8.0, L0, low_freq_factor=1.0, high_freq_factor=4.0),
        1.0,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_analytic_sets_divide_to_what_transformers_computes(kind: str) -> None:
    """PI, YaRN and Llama 3 as factor sets give transformers' inverse frequencies, to float32 rounding."""
    extra, factors, attention = CASES[kind]
    inverse, scale = transformers_rope({"rope_type": kind, **extra})
    np.testing.assert_allclose(rope.inverse_frequencies(DIM, BASE) / factors, inverse, rtol=1e-6)
    assert scale == pytest.approx(attention, rel=1e-9)


@pytest.mark.parametrize("length", [L0, 2 * L0, 5 * L0])
def test_dynamic_ntk_equals_transformers_at_every_length(length: int) -> None:
    inverse, _ = transformers_rope({"rope_type": "dynamic", "factor": 4.0}, seq_len=length)
    factors = rope.dynamic_ntk_factors(DIM, 4.0, L0, length)
    np.testing.assert_allclose(rope.inverse_frequencies(DIM, BASE) / factors, inverse, rtol=2e-6)


def test_ntk_is_a_change_of_base() -> None:
    """NTK-aware is defined as base · s^(d/(d−2)); as factors it ends at exactly s."""
    factors = rope.ntk_factors(DIM, 8.0)
    rebased = rope.inverse_frequencies(DIM, BASE * 8.0 ** (DIM / (DIM - 2)))
    np.testing.assert_allclose(rope.inverse_frequencies(DIM, BASE) / factors, rebased, rtol=1e-12)
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)


def test_attention_factors() -> None:
    """LongRoPE's and YaRN's formulas at published points; never below 1."""
    assert rope.longrope_attention_factor(32, 4096) == pytest.approx(1.1902380714238083, rel=1e-12)  # Phi-3
    assert rope.longrope_attention_factor(0.5, 4096) == 1.0
    assert rope.yarn_attention_factor(8) == pytest.approx(1.2079441541679836, rel=1e-12)
    assert rope.yarn_attention_factor(1) == 1.0


def test_cos_and_sin_agree_with_the_reference_far_out() -> None:
    """Two independent writings agree at 2M to 1e-9; float32 angles would be off by 1e-2 (the control)."""
    factors = tuple((1 + np.arange(DIM // 2) / 4).tolist())
    tier = Tier(2**21, factors, start_tokens=16, attention_factor=1.3)
    positions = np.array([0, 1, 15, 16, 17, 4095, 262143, 2097151])
    cos, sin = tier.cos_sin(positions, BASE)
    chosen = FactorSet(2**21, factors, 16, 1.3)
    theirs = Rotation(BASE, DIM, [chosen]).tables(torch.as_tensor(positions), chosen, torch.float64)
    np.testing.assert_allclose(cos, theirs[0].numpy(), atol=1e-9)
    np.testing.assert_allclose(sin, theirs[1].numpy(), atol=1e-9)
    narrow = positions.astype(np.float32)[:, None] * (rope.inverse_frequencies(DIM, BASE) / factors).astype(np.float32)
    assert np.abs(np.cos(narrow) * 1.3 - cos).max() > 1e-2


def test_start_tokens_are_the_first_positions_only() -> None:
    tier = Tier(64, (4.0,) * 4, start_tokens=3)
    angles = tier.angles(np.arange(5), 100.0)[:, 0]
    assert angles.tolist() == [0.0, 1.0, 2.0, 0.75, 1.0]


def test_a_sequence_gets_the_first_tier_that_holds_it() -> None:
    tiers = tuple(Tier(length, (1.0,)) for length in (4, 8, 16))
    spec = RopeSpec("llama", 2, 10000.0, 4, 16, tiers)
    chosen = [spec.tier_for(length).max_length for length in (1, 4, 5, 8, 9, 16, 17)]
    assert chosen == [4, 4, 8, 8, 16, 16, 16]
    assert spec.boundaries == (4, 8)


# --- composition -----------------------------------------------------------------------------------------

OWN = Tier(8192, tuple(rope.yarn_factors(DIM, BASE, 2.0, L0).tolist()), attention_factor=1.1)
NEW = Tier(32768, tuple(np.linspace(1.0, 4.0, DIM // 2).tolist()), attention_factor=1.2)
UNSCALED = Tier(16384, (1.0,) * (DIM // 2))


def test_composed_sets_rotate_as_one_after_the_other() -> None:
    """λ_total = λ_own · λ_new: the angles of the new set over the frequencies that the own set left."""
    total = rope.compose(OWN, NEW)
    positions = np.array([0, 1, 4095, 32767])
    left = rope.inverse_frequencies(DIM, BASE) / np.asarray(OWN.factors)
    np.testing.assert_allclose(total.angles(positions, BASE), positions[:, None] * left / np.asarray(NEW.factors))
    cos, _ = total.cos_sin(np.array([0]), BASE)
    assert cos == pytest.approx(1.1 * 1.2)  # both scale cos and sin
    assert total.max_length == NEW.max_length


def test_an_unscaled_set_changes_nothing() -> None:
    """Neither below nor on top; its start tokens mean nothing and are not kept."""
    scaled = replace(NEW, start_tokens=8)
    assert rope.compose(replace(UNSCALED, start_tokens=4), scaled) == scaled
    assert rope.compose(scaled, UNSCALED) == replace(scaled, max_length=UNSCALED.max_length)


def test_start_tokens_have_to_agree() -> None:
    """Equal ones are kept; two different numbers are no single tier, and so are sets of different sizes."""
    both = rope.compose(replace(OWN, start_tokens=4), replace(NEW, start_tokens=4))
    assert both.start_tokens == 4
    for own, new in ((0, 4), (4, 0), (4, 8)):
        with pytest.raises(UnsupportedError, match=f"{new} start tokens can't be applied on top of one with {own}"):
            rope.compose(replace(OWN, start_tokens=own), replace(NEW, start_tokens=new))
    with pytest.raises(InputError, match="a set of 1 factors can't be applied on top of one of 32"):
        rope.compose(OWN, Tier(64, (2.0,)))


def test_tiers_compose_at_every_boundary_of_either() -> None:
    """The own sets end at 4k and 8k, the new ones at 16k and 32k: each length has the product of what serves it."""
    short = replace(UNSCALED, max_length=L0)
    total = rope.compose_tiers((short, OWN), (UNSCALED, NEW))
    assert [tier.max_length for tier in total] == [L0, 8192, 16384, 32768]
    for length in (1, L0, L0 + 1, 8192, 8193, 16385, 32768):
        own, new = rope.serving((short, OWN), length), rope.serving((UNSCALED, NEW), length)
        assert rope.serving(total, length).factors == rope.compose(own, new).factors
    assert [tier.max_length for tier in rope.compose_tiers((short, OWN), (short,))] == [L0]


@pytest.mark.parametrize(
    ("width", "base", "window", "ratio", "betas"),
    [
        (128, 1e6, 32768, 4.0, (32.0, 1.0)),
        (32, 1e4, 256, 4.0, (32.0, 1.0)),
        (128, 1e4, 4096, 40.0, (64.0, 2.0)),
        (64, 5e5, 8192, 8.0, (16.0, 0.5)),
        (32, 1e4, 256, 2.5, (8.0, 7.5)),
    ],
)
def test_a_yarn_is_recognised_with_its_parameters(
    width: int, base: float, window: int, ratio: float, betas: tuple[float, float]
) -> None:
    """Whatever its ramp: s and L0 are those it was made with, and the turns make the same set, in float32 too."""
    fast, slow = betas
    made = rope.yarn_factors(width, base, ratio, window, beta_fast=fast, beta_slow=slow)
    for factors in (made, made.astype(np.float32)):
        found = rope.as_yarn(factors.tolist(), base, window)
        assert found is not None and (found.ratio, found.original_window) == (pytest.approx(ratio), window)
        again = rope.yarn_factors(width, base, ratio, window, beta_fast=found.beta_fast, beta_slow=found.beta_slow)
        np.testing.assert_allclose(again, made, rtol=1e-6)
    assert rope.as_yarn(made.tolist(), base, window) == rope.Yarn(ratio, window) or betas != (32.0, 1.0)


def test_what_is_no_yarn_is_not_taken_for_one() -> None:
    """PI, NTK, plain, a YaRN with one factor off, a falling set."""
    made = rope.yarn_factors(64, 1e4, 8.0, 4096)
    off = made * np.where(np.arange(32) == 20, 1.0001, 1.0)
    for factors in (rope.pi_factors(64, 8.0), rope.ntk_factors(64, 8.0), np.ones(32), off, made[::-1], 1 / made):
        assert rope.as_yarn(factors.tolist(), 1e4, 4096) is None
