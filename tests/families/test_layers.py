# SPDX-License-Identifier: Apache-2.0
"""Decoders beyond Llama's: layers of several kinds, norms behind attention and MLP, norms of whole q and k. As
transformers computes them, and refused where a config contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from support.float64 import EXACT, by_reference, natively
from support.pico import pico_config, v5_rope, write_pico

from lrconvert.checkpoint import open_model
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import get_family, read_shape

pytest.importorskip("torch", reason="needs lrconvert[hf]")
pytest.importorskip("transformers", reason="needs lrconvert[hf]")

FULL, SLIDING = "full_attention", "sliding_attention"
SHARED: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 4, "num_hidden_layers": 3},
    {"num_key_value_heads": 1, "head_dim": 24},
]
OWN: dict[str, list[dict[str, Any]]] = {
    "smollm3": [
        {"attention_bias": True, "mlp_bias": True},
        {"no_rope_layer_interval": None, "num_hidden_layers": 5},
        {"no_rope_layers": [0, 1]},
        {"no_rope_layers": [1, 1, 0]},  # more than there are
        {"no_rope_layers": [1, 1]},
        {"use_sliding_window": True, "sliding_window": 12},  # layers without rotation slide
        {"use_sliding_window": True, "sliding_window": 12, "layer_types": [SLIDING, FULL]},
    ],
    "olmo2": [{"attention_bias": True}, {"rms_norm_eps": 1e-3}],
    "olmo3": [
        {"layer_types": None, "num_hidden_layers": 5},  # every fourth sees all
        {"sliding_window": 4096},
        {"layer_types": [FULL, FULL]},
        {"layer_types": [SLIDING, SLIDING], "sliding_window": 1},
        {
            "rope_theta": None,
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 1e4},
                SLIDING: {"rope_type": "default", "rope_theta": 3e3},
            },
        },
    ],
}
OWN["gemma3_text"] = [
    {"layer_types": None, "num_hidden_layers": 7},  # every sixth sees all
    {"layer_types": None, "num_hidden_layers": 4, "sliding_window_pattern": 2},
    {"sliding_window": 4096},
    {"layer_types": [FULL, FULL]},
    {"final_logit_softcapping": 3.0},
    {"attention_bias": True},
    {"query_pre_attn_scalar": 16, "hidden_size": 96, "head_dim": 16},  # a scale of embeddings that float32 rounds
    {"rope_local_base_freq": None, "rope_theta": None},  # its class has two
    v5_rope("gemma3_text"),
]
OWN["glm4"] = [
    {"attention_bias": False},
    {"partial_rotary_factor": 1.0},
    {"partial_rotary_factor": 0.25, "head_dim": 32},
    v5_rope("glm4"),
]
VARIANTS = [(family, changes) for family, own in OWN.items() for changes in [*SHARED, *own]]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=lambda value: json.dumps(value).replace(" ", ""))
def test_it_is_what_transformers_computes(
    pico_folder: Callable[..., Path], family: str, changes: dict[str, Any]
) -> None:
    folder = pico_folder(family, **changes)
    assert np.abs(by_reference(open_model(folder)) - natively(folder)).max() <= EXACT


@pytest.mark.parametrize("family", OWN)
def test_layers_taken_for_one_kind_are_far_off(pico_folder: Callable[..., Path], family: str) -> None:
    """What the bound above would say of a reader that forgets which layers are others."""
    folder = pico_folder(family)
    model = open_model(folder)
    same = set(model.shape.own_theta) <= {None, model.shape.theta}  # until a recipe scales the others
    for forgotten in ({"sliding": ()}, *(() if same else ({"own_theta": ()},))):
        name, value = next(iter(forgotten.items()))
        if getattr(model.shape, name) != value:
            wrong = replace(model, shape=replace(model.shape, **forgotten))
            assert np.abs(by_reference(wrong) - natively(folder)).max() > 1e6 * EXACT, name


@pytest.mark.parametrize("family", ["olmo2", "olmo3", "gemma3_text", "glm4"])
def test_a_norm_elsewhere_is_far_off(pico_folder: Callable[..., Path], family: str) -> None:
    """Behind attention or before the MLP: the tensor has one name. Over each head or over all: the shapes differ."""
    folder = pico_folder(family)
    model = open_model(folder)
    for role in ("attention_post_norm", "ffn_post_norm"):
        roles = {key: tensor for key, tensor in model.roles.items() if tensor.role != role}
        assert np.abs(by_reference(replace(model, roles=roles)) - natively(folder)).max() > 1e6 * EXACT, role
    if not model.family.whole_qk_norms:
        return
    by_head = replace(model, family=replace(model.family, rows=get_family("llama").rows))
    with pytest.raises(RuntimeError):
        by_reference(by_head)


# --- what configs say ------------------------------------------------------------------------------------


def test_layers_without_rotation_are_read() -> None:
    """By the list, by the interval, by its default."""
    family = get_family("smollm3")
    for changes, wanted in (
        ({"num_hidden_layers": 8, "no_rope_layer_interval": None}, (None, None, None, 0.0) * 2),
        ({"num_hidden_layers": 3, "no_rope_layer_interval": 2}, (None, 0.0, None)),
        ({"num_hidden_layers": 3, "no_rope_layers": [0, 0, 1]}, (0.0, 0.0, None)),
        ({"num_hidden_layers": 2, "no_rope_layers": [1, 1]}, ()),
    ):
        assert read_shape(pico_config("smollm3", **changes), family).own_theta == wanted


BAD: list[tuple[str, dict[str, Any], str]] = [
    (
        "olmo3",
        {"rope_parameters": {FULL: {"rope_theta": 5e5}, SLIDING: [3]}},
        "the rotary settings of sliding_attention are [3]; an object is needed",
    ),
    ("olmo3", {"rope_theta": 1e4}, "rope_theta is 10000.0, and nothing says θ of the layers that slide"),
    (
        "olmo3",
        {"rope_parameters": {"rope_theta": 5e5}},
        "rope_parameters has no full_attention; olmo3 has settings for",
    ),
    ("olmo3", {"layer_types": [FULL]}, "layer_types is ['full_attention']; 2 of"),
    ("olmo3", {"layer_types": [FULL, "chunked_attention"]}, "layer_types is ['full_attention', 'chunked_attention']"),
    ("gemma3_text", {"sliding_window": False}, "1 of 2 layers slide; a sliding_window is needed"),
    ("gemma3_text", {"sliding_window": 0}, "1 of 2 layers slide; a sliding_window"),
    (
        "gemma3_text",
        {"layer_types": None, "sliding_window_pattern": 0},
        "sliding_window_pattern is 0; an integer from 1",
    ),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; a positive number is needed"),
    ("gemma3_text", {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0; a positive number is needed"),
    ("gemma3_text", {"rope_local_base_freq": -1.0}, "rope_local_base_freq is -1.0; a positive number is needed"),
    ("gemma3_text", {"hidden_activation": "relu"}, "hidden_activation is 'relu'; only gelu_pytorch_tanh is known"),
    (
        "gemma3_text",
        {**v5_rope("gemma3_text"), "rope_local_base_freq": 5e3},
        "rope_local_base_freq is 5000.0, and 3000.0 in rope_parameters; they contradict",
    ),
    ("glm4", {"partial_rotary_factor": 0.03}, "head_dim 32 times partial_rotary_factor 0.03 channels rotate"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is [1]; 0 or 1 for each of 2 layers is needed"),
    ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers is [1, 2]; 0 or 1"),
    ("smollm3", {"no_rope_layers": "1, 0"}, "no_rope_layers is '1, 0'; 0 or 1"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0; an integer from 1"),
    ("smollm3", {"layer_types": [FULL]}, "layer_types is ['full_attention']; 2 of sliding_attention and full_att"),
    (
        "smollm3",
        {"layer_types": [FULL, SLIDING], "sliding_window": 12},
        "1 of 2 layers slide; use_sliding_window and a sliding_window is needed",
    ),
]


@pytest.mark.parametrize(("family", "changes", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_contradictory_layers_are_bad_input(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_shape(pico_config(family, **changes), get_family(family))
    assert message in str(caught.value)


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("smollm3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ("smollm3", {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
    ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers [1, 0]"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("olmo3", {"embedding_multiplier": 2.0}, "embedding_multiplier 2.0"),
    ("glm4", {"rope_interleave": True}, "rope_interleave True"),
    (
        "llama",
        v5_rope("olmo3"),
        "separate rotary settings for full_attention, sliding_attention; layers of llama rotate",
    ),
    (
        "olmo3",
        {"rope_parameters": {FULL: {"rope_theta": 5e5}, SLIDING: {"rope_type": "linear", "factor": 2.0}}},
        "layers that slide have a scaled rotation of their own",
    ),
]


@pytest.mark.parametrize(("family", "changes", "message"), OTHERS, ids=[message for _, _, message in OTHERS])
def test_what_a_family_has_not_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_shape(pico_config(family, **changes), get_family(family))
    assert message in str(caught.value)


def test_the_command_line_says_it(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Exit code 3 for what contradicts itself, 4 for what the family has not."""
    folder = write_pico(tmp_path / "m", "smollm3")
    config = json.loads((folder / "config.json").read_text())
    for changes, code, name in (
        ({"no_rope_layers": [1]}, 3, "no_rope_layers is [1]"),
        ({"logits_scaling": 8.0}, 4, "logits_scaling 8.0"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        result = cli("hf", folder, "-o", tmp_path / "o")
        assert result.code == code and name in result.err
