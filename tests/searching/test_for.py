# SPDX-License-Identifier: Apache-2.0
"""A search for a runtime: its candidates are what that can express, so the recipe goes there unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pico import query_scale
from support.search_helpers import Landscape, planted

from lrconvert.checkpoint import open_model
from lrconvert.engines.capability import SEARCHABLE
from lrconvert.errors import UsageError
from lrconvert.evals.texts import Text
from lrconvert.recipe import derive_recipe, write_recipe
from lrconvert.searching.plan import plan_search
from lrconvert.searching.request import SearchRequest
from lrconvert.searching.run import Search


def request(folder: Path, **options: Any) -> SearchRequest:
    text = Text("book.txt", "ab" * 32, np.arange(1024) % 101)
    return SearchRequest(**{"model": folder, "target": 512, "texts": [text], "budget": 30, **options})


def test_nothing_is_dropped_from_a_recipe_for_a_runtime(pico_folder: Callable[..., Path]) -> None:
    """Fitting it to that runtime changes nothing, whatever the search would like best."""
    folder = pico_folder("llama")
    model = open_model(folder)
    for name, able in SEARCHABLE.items():
        plan = plan_search(request(folder, runtime=name, start_tokens=able.start_tokens))
        short, long = plan.tiers
        _, wish = planted(long.space, max(long.space.usable_start_tokens))
        recipe = Search(plan, Landscape(wish), None, lambda progress: None).run()
        fitted, dropped = able.fit(model.resolve(recipe))
        assert dropped in ([], [word for word in dropped if "chooses one factor set" in word]), name
        assert [tier.attention_factor for tier in fitted.tiers] == [
            tier.attention_factor for tier in model.resolve(recipe).tiers[-len(fitted.tiers) :]
        ], name
        assert (short.space.start_tokens == (0,)) == (not able.start_tokens), name


def test_sets_that_are_kept_are_what_the_runtime_can_express(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    """One set of a recipe with start tokens and two attention factors is searched again: the other is kept as every
    runtime can have it, and both get one factor. Without a runtime it is kept as it is."""
    folder = pico_folder("llama")
    model = open_model(folder)
    own = derive_recipe("yarn", 8, family="llama", rotary_dim=16, theta=model.shape.theta, original_window=64)
    start = replace(own, tiers=(own.tiers[0], replace(own.tiers[1], start_tokens=4, attention_factor=1.5)))
    path = write_recipe(start, tmp_path / "start")
    for tier, other in (("short", 1), ("long", 0)):
        plan = plan_search(request(folder, runtime="any", start_from=path, tiers=(tier,)))
        assert ["start tokens: the first 4" in note for note in plan.notes if note.startswith("of llama")] == [
            True,
            False,
        ]
        (searched,) = plan.tiers
        recipe = Search(plan, Landscape(planted(searched.space)[1]), None, lambda progress: None).run()
        assert SEARCHABLE["any"].fit(model.resolve(recipe))[1] == []
        assert recipe.tiers[other].factors == start.tiers[other].factors
        free = plan_search(request(folder, start_from=path, tiers=(tier,)))
        assert free.kept == (start.tiers[other],) and free.notes == ()


def test_more_than_a_runtime_knows_is_refused(pico_folder: Callable[..., Path]) -> None:
    """Before anything is evaluated, with what it knows."""
    folder = pico_folder("llama")
    with pytest.raises(UsageError, match=r"sets for 64, 256, 512 tokens; llama\.cpp knows 2"):
        plan_search(request(folder, runtime="gguf", tiers=(256, "long")))
    with pytest.raises(UsageError, match="--attention-factor: every runtime computes LongRoPE's formula"):
        plan_search(request(folder, runtime="any", attention_factor=1.2))
    with pytest.raises(UsageError, match=r"--start-tokens: llama\.cpp knows none"):
        plan_search(request(folder, runtime="gguf", start_tokens=True))
    assert len(plan_search(request(folder, runtime="onnx", tiers=(256, "long"))).tiers) == 2


def test_sets_that_change_where_a_runtime_can_not_are_refused(pico_folder: Callable[..., Path]) -> None:
    """Where queries grow from another length on than the model's own rotation reaches to."""
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **query_scale("ministral3")}
    folder = pico_folder("ministral3", rope_parameters=scaled, max_position_embeddings=256)
    with pytest.raises(UsageError, match=r"would change after 256 tokens; llama\.cpp changes them after 64 alone"):
        plan_search(request(folder, runtime="gguf"))
    for more in ({"runtime": "onnx"}, {"runtime": "gguf", "from_plain": True}):
        assert plan_search(request(folder, **more)).tiers
