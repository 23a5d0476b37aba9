# SPDX-License-Identifier: Apache-2.0
"""Factors that no model has are refused where recipes are read: from a file, a config, a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import recipe_for
from support.pico import pico_config

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.rope_config import read_rope
from lrconvert.errors import InputError
from lrconvert.families import get_family, read_shape
from lrconvert.recipe import parse_recipe
from lrconvert.recipe.importing import import_recipe
from lrconvert.rope import ATTENTION, FACTORS, longrope_attention_factor, ntk_factors

ODD = [5e-324, 1e-30, 1e-4, 1e8, 1e39, 1e308]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("key", ["factors", "attention_factor"])
def test_a_recipe_file(pico: Callable[..., Model], key: str, value: float) -> None:
    recipe = json.loads(recipe_for(pico("llama")).to_json())
    tier = recipe["tiers"][-1]
    tier[key] = value if key == "attention_factor" else [*tier[key][:-1], value]
    with pytest.raises(InputError, match=rf"tiers\[1\]\.{key}.*should be (less|greater) than or equal to"):
        parse_recipe(json.dumps(recipe))


CONFIGS = {
    "long_factor": lambda value: {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [value] * 8},
    "attention": lambda value: {
        "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "attention_factor": value,
    },
    "yarn": lambda value: {"rope_type": "yarn", "factor": 4.0, "attention_factor": value},
}  # fmt: skip


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config(kind: str, value: float) -> None:
    config = pico_config(
        "llama",
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_scaling={"factor": 4.0, **CONFIGS[kind](value)},
    )
    with pytest.raises(InputError, match=r"config\.json: rope_scaling.*from .* to "):
        read_rope(config, read_shape(config, get_family("llama")))


@pytest.mark.parametrize("value", ODD)
def test_a_table(tmp_path: Path, value: float) -> None:
    path = tmp_path / "rescale_factors_8k.csv"
    path.write_text(",".join(["1.0"] * 7 + [repr(value)]))
    with pytest.raises(InputError, match="numbers from"):
        import_recipe([str(path)])


def test_what_methods_make_of_the_longest_window_is_within() -> None:
    """A thousandfold extension of a short model; the bounds are no limit of anybody's."""
    factors = ntk_factors(128, 2**31 / 2048)
    assert FACTORS[0] < 0.5 and factors.max() <= FACTORS[1]
    assert ATTENTION[0] < longrope_attention_factor(2**31 / 2048, 2048) < ATTENTION[1]
