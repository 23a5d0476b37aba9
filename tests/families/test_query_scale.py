# SPDX-License-Identifier: Apache-2.0
"""Queries that grow with the position (Ministral 3): as transformers computes them, and refused where a config
contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.float64 import EXACT, TOKENS, by_reference, natively, rotation_of
from support.pico import pico_config

from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.rope_config import read_rope
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import get_family, read_shape
from lrconvert.families.query_scale import QueryScale
from lrconvert.reference.decoder import Reference

pytest.importorskip("torch", reason="needs lrconvert[hf]")
pytest.importorskip("transformers", reason="needs lrconvert[hf]")

KEY, WINDOW = "llama_4_scaling_beta", "original_max_position_embeddings"


def settings(**more: Any) -> dict[str, Any]:
    """Of a model whose 48 tokens lie in four windows."""
    return {"rope_type": "default", "rope_theta": 1e4, KEY: 0.5, WINDOW: 13, **more}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"num_key_value_heads": 4, "num_hidden_layers": 3},
    {"num_key_value_heads": 1, "head_dim": 24},
    {"sliding_window": 12},
    {"rope_parameters": settings(llama_4_scaling_beta=0.1)},
    {"rope_parameters": settings(original_max_position_embeddings=1)},
    {"rope_parameters": settings(original_max_position_embeddings=48)},  # it never grows
    {"rope_parameters": settings(llama_4_scaling_beta=0)},
    {"rope_parameters": settings(max_position_embeddings=7)},  # which nobody reads
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda value: json.dumps(value).replace(" ", ""))
def test_it_is_what_transformers_computes(pico_folder: Callable[..., Path], changes: dict[str, Any]) -> None:
    folder = pico_folder("ministral3", **{"rope_parameters": settings(), **changes})
    assert np.abs(by_reference(open_model(folder)) - natively(folder)).max() <= EXACT


def unfloored(self: Reference, where: np.ndarray) -> torch.Tensor | None:
    scale = self.shape.query_scale
    assert scale is not None
    return torch.as_tensor(1.0 + scale.growth * np.log1p(where / scale.window))[:, None]


def without(model: Model) -> Model:
    return replace(model, shape=replace(model.shape, query_scale=None))


def with_window(window: int) -> Callable[[Model], Model]:
    return lambda model: replace(model, shape=replace(model.shape, query_scale=QueryScale(0.5, window)))


@pytest.mark.parametrize("wrong", [without, with_window(12), with_window(14), with_window(64)])
def test_a_scale_that_is_forgotten_or_grows_elsewhere_is_far_off(
    pico_folder: Callable[..., Path], wrong: Callable[[Model], Model]
) -> None:
    folder = pico_folder("ministral3", rope_parameters=settings())
    assert np.abs(by_reference(wrong(open_model(folder))) - natively(folder)).max() > 1e6 * EXACT


def test_a_scale_without_steps_is_far_off(pico_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pico_folder("ministral3", rope_parameters=settings())
    monkeypatch.setattr(Reference, "_query_scale", unfloored)
    assert np.abs(by_reference(open_model(folder)) - natively(folder)).max() > 1e6 * EXACT


def test_positions_decide_not_places(pico_folder: Callable[..., Path]) -> None:
    """Tokens far into a text are scaled as they are there, whatever stands before them."""
    model = open_model(pico_folder("ministral3", rope_parameters=settings()))
    scaled, plain = (Reference(each, rotation_of(model)) for each in (model, without(model)))
    far = np.arange(40, 48)
    differ = scaled.logits(TOKENS[:8], positions=far) - plain.logits(TOKENS[:8], positions=far)
    assert np.abs(differ).max() > 1e6 * EXACT
    assert np.array_equal(scaled.logits(TOKENS[:8]), plain.logits(TOKENS[:8]))


# --- what configs say ------------------------------------------------------------------------------------


def test_the_scale_is_read_from_the_rotary_settings() -> None:
    """In either section, with the window inside or at the top level; without growth there is none."""
    family = get_family("ministral3")
    inside, outside = settings(), {k: v for k, v in settings().items() if k != WINDOW}
    for changes, wanted in (
        ({"rope_parameters": inside}, QueryScale(0.5, 13)),
        ({"rope_parameters": None, "rope_scaling": inside}, QueryScale(0.5, 13)),
        ({"rope_parameters": outside, WINDOW: 13}, QueryScale(0.5, 13)),
        ({"rope_parameters": inside, WINDOW: 13}, QueryScale(0.5, 13)),
        ({"rope_parameters": settings(llama_4_scaling_beta=0.0)}, None),
        ({"rope_parameters": settings(llama_4_scaling_beta=None)}, None),
    ):
        assert read_shape(pico_config("ministral3", **changes), family).query_scale == wanted


def test_a_config_without_rotary_settings_has_those_of_its_class() -> None:
    """A YaRN of 16 from 16,384 on, whose attention factor is one."""
    config = pico_config("ministral3", rope_parameters=None, rope_theta=None, max_position_embeddings=None)
    config["rope_scaling"] = None
    shape = read_shape(config, get_family("ministral3"))
    assert (shape.query_scale, shape.theta, shape.window) == (QueryScale(0.1, 16384), 1e6, 262144)
    found = read_rope(config, shape)
    assert (found.kind, found.original_window, found.window) == ("yarn", 16384, 262144)
    assert found.tiers[-1].attention_factor == 1.0 and found.tiers[-1].factors[-1] == 16.0


BAD: list[tuple[dict[str, Any], str]] = [
    ({KEY: -0.1}, f"{KEY} is -0.1; a positive number is needed"),
    ({KEY: True}, f"{KEY} is True; a positive number is needed"),
    ({KEY: "0.1"}, f"{KEY} is '0.1'; a positive number is needed"),
    ({WINDOW: 0}, f"{WINDOW} is 0; an integer from 1"),
    ({WINDOW: None}, f"{WINDOW} is missing; an integer from 1"),
    ({WINDOW: 2.5}, f"{WINDOW} is 2.5; an integer from 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_contradictory_scales_are_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_shape(pico_config("ministral3", rope_parameters=settings(**changes)), get_family("ministral3"))
    assert message in str(caught.value)


def test_two_windows_contradict() -> None:
    config = pico_config("ministral3", rope_parameters=settings(), **{WINDOW: 26})
    with pytest.raises(InputError, match=f"{WINDOW} is 26 at the top level and 13 in the rotary settings"):
        read_shape(config, get_family("ministral3"))


def test_families_without_it_refuse_the_key() -> None:
    """At the top level it is nobody's."""
    for family, changes in (
        ("mistral", {"rope_theta": None, "rope_parameters": settings()}),
        ("ministral3", {KEY: 0.1}),
    ):
        with pytest.raises(UnsupportedError, match=KEY):
            read_shape(pico_config(family, **changes), get_family(family))
