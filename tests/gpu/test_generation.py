# SPDX-License-Identifier: Apache-2.0
"""Generation on a GPU: every cache that the version has, across both boundaries of three tiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import recipe_for
from support.generation import step_errors
from support.pico import WINDOW

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model
from lrconvert.targets import hf

pytestmark = pytest.mark.gpu
# Static caches make generate compile its step; that is the last test's concern.
PLAIN = {"disable_compile": True}
CACHES: dict[str, dict[str, object]] = {
    "default": {},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static", **PLAIN},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded_static": {"cache_implementation": "offloaded_static", **PLAIN},
}
# float32 on a GPU, logits up to 45; a stale key moves them by more than 1.
BOUND = 5e-3


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("cache", CACHES)
def test_every_step_equals_a_fresh_pass(
    pico: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, cache: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = pico(family)
    bake_plan(hf.plan(model, recipe_for(model, tiers=3, start_tokens=4), tmp_path / "a"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)
    loaded = loaded.to("cuda").eval()
    prompt = torch.randint(3, 100, (1, WINDOW - 4), generator=torch.Generator().manual_seed(1)).to("cuda")
    errors = step_errors(loaded, prompt, WINDOW + 12, **CACHES[cache])
    assert max(errors) < BOUND, (cache, max(errors))


def test_native_code_fails_the_same_check(
    pico: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: native code keeps stale keys."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = pico("llama")
    bake_plan(hf.plan(model, recipe_for(model, even=True), tmp_path / "a"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded = loaded.to("cuda").eval()
    prompt = torch.randint(3, 100, (1, WINDOW - 4), generator=torch.Generator().manual_seed(1)).to("cuda")
    assert max(step_errors(loaded, prompt, 16)) > 100 * BOUND


@pytest.mark.parametrize("custom", [False, True], ids=["native", "custom"])
def test_a_compiled_static_step(
    pico: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, custom: bool
) -> None:
    """generate compiles its step for a static cache: within a tier for both codes, across boundaries for ours."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = pico("llama")
    bake_plan(hf.plan(model, recipe_for(model, tiers=3 if custom else 2, even=not custom), tmp_path / "a"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=custom)
    loaded = loaded.to("cuda").eval()
    start, count = (WINDOW - 4, WINDOW + 12) if custom else (20, 30)
    prompt = torch.randint(3, 100, (1, start), generator=torch.Generator().manual_seed(1)).to("cuda")
    assert max(step_errors(loaded, prompt, count, cache_implementation="static")) < BOUND
