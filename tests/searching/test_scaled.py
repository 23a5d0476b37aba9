# SPDX-License-Identifier: Apache-2.0
"""A search on a model whose own rotation is scaled: it keeps that within its window, and searches on top of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.search_helpers import Landscape, planted

from lrconvert.errors import UsageError
from lrconvert.evals.texts import Text
from lrconvert.rope import compose, longrope_attention_factor, serving
from lrconvert.searching.plan import plan_search
from lrconvert.searching.request import SearchRequest
from lrconvert.searching.run import Search

WINDOW, TARGET = 1024, 4096
LISTS = {"short_factor": [1.0 + i / 50 for i in range(8)], "long_factor": [1.5**i for i in range(8)]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED: dict[str, dict[str, Any]] = {
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
    "longrope": {"rope_scaling": {"type": "longrope", **LISTS}, "original_max_position_embeddings": 256},
}


def request(folder: Path, **options: Any) -> SearchRequest:
    text = Text("book.txt", "ab" * 32, np.arange(2 * TARGET) % 101)
    return SearchRequest(**{"model": folder, "target": TARGET, "texts": [text], "budget": 30, **options})


def test_own_sets_stay_and_new_factors_multiply_them(pico_folder: Callable[..., Path]) -> None:
    """Up to its window the recipe is what the model does; beyond it, λ_own · λ_new and both attention factors."""
    for kind, changes in SCALED.items():
        plan = plan_search(request(pico_folder("llama", max_position_embeddings=WINDOW, **changes)))
        own = plan.model.rotation.tiers
        assert [tier.length for tier in plan.tiers] == [TARGET], kind
        (tier,) = plan.tiers
        assert tier.space.ratio == TARGET / WINDOW, kind
        optimum, loss = planted(tier.space)
        recipe = Search(plan, Landscape(loss), None, lambda progress: None).run()
        assert recipe.tiers[:-1] == own, kind
        best = recipe.tiers[-1]
        asked = [compose(own[-1], made.tier(TARGET)) for made in (optimum,)]
        assert best.max_length == TARGET and len(best.factors) == len(asked[0].factors), kind
        wanted = own[-1].attention_factor * longrope_attention_factor(TARGET / WINDOW, WINDOW)
        assert best.attention_factor == pytest.approx(wanted, rel=1e-12), kind
        new = np.asarray(best.factors) / np.asarray(own[-1].factors)
        assert np.abs(np.log(new) - np.log(optimum.factors)).max() < 1.0 and (new >= 1 - 1e-9).all(), kind
        assert tier.objective.rotation(optimum, TARGET) == asked[0], kind


def test_plain_rotation_is_asked_for(pico_folder: Callable[..., Path]) -> None:
    """`from_plain` starts from before the scaling, searches both sets, and says so."""
    folder = pico_folder("llama", max_position_embeddings=WINDOW, **SCALED["llama3"])
    plan = plan_search(request(folder, from_plain=True))
    assert [tier.length for tier in plan.tiers] == [128, TARGET]
    assert all(tier.objective.own is None for tier in plan.tiers) and not plan.kept
    assert "--from-plain" in plan.notes[0]


def test_targets_within_the_window_are_refused(pico_folder: Callable[..., Path]) -> None:
    """They would replace the model's rotation by a shorter one."""
    folder = pico_folder("llama", max_position_embeddings=WINDOW, **SCALED["yarn"])
    with pytest.raises(UsageError, match="within the window of 1024 tokens that the model serves with its own yarn"):
        plan_search(request(folder, target=WINDOW))


def test_another_rotation_is_another_search(pico_folder: Callable[..., Path]) -> None:
    """A journal of one can't go on as the other's, although the space is the same."""
    plans = [plan_search(request(pico_folder("llama", max_position_embeddings=WINDOW, **SCALED[kind])))
             for kind in ("llama3", "yarn")]  # fmt: skip
    first, second = ([tier["own"] for tier in plan.identity["tiers"]] for plan in plans)
    assert first != second
    assert [serving(plan.model.rotation.tiers, TARGET).factors == tuple(own["factors"])
            for plan, (own,) in zip(plans, (first, second), strict=True)] == [True, True]  # fmt: skip
