# SPDX-License-Identifier: Apache-2.0
"""Caches that change what they keep: right at every boundary, where they are filled anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import recipe_for
from support.generation import step_errors
from support.pico import WINDOW
from transformers import AutoModelForCausalLM

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model
from lrconvert.targets import hf


@pytest.mark.slow  # quanto compiles its kernels the first time
def test_a_quantised_cache_is_filled_anew_at_every_boundary(
    pico: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four bits cost accuracy at every step but two: those that cross, where the whole sequence is run again in
    full precision. Stale keys would show there as at the steps beside them."""
    pytest.importorskip("optimum.quanto", reason="the quantised cache needs optimum-quanto")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    # quanto packs groups of 64 channels; one channel group less than that would be refused.
    model = pico("llama", head_dim=64, hidden_size=256)
    bake_plan(hf.plan(model, recipe_for(model, tiers=3), tmp_path / "a"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)
    prompt = torch.randint(3, 100, (1, WINDOW - 4), generator=torch.Generator().manual_seed(1))
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    errors = step_errors(loaded, prompt, WINDOW + 16, **options)
    crossings = [5, WINDOW + 5]  # lengths 65 and 129
    assert all(errors[step] < 1e-3 for step in crossings), [errors[step] for step in crossings]
    others = [error for step, error in enumerate(errors) if step not in (0, *crossings)]
    assert sorted(others)[len(others) // 2] > 0.1
