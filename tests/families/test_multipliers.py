# SPDX-License-Identifier: Apache-2.0
"""Multipliers: as transformers computes them, as configs and GGUF files state them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Result
from support.float64 import EXACT, by_reference, natively
from support.gguf_pico import make_pico
from support.pico import pico_config, write_pico

from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.fold import in_weights
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import family_names, get_family, read_shape
from lrconvert.families.base import GGUF_FIXED, GGUF_MULTIPLIERS
from lrconvert.families.multipliers import NAMES, Multipliers, Stated, power_of
from lrconvert.targets.gguf.metadata import multiplier_keys

pytest.importorskip("torch", reason="needs lrconvert[hf]")
pytest.importorskip("transformers", reason="needs lrconvert[hf]")

KEYS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
# Granite 3.x and 4: tied and not, with biases or without, one key head or as many as queries, each multiplier alone.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 4, "head_dim": None},
    {"num_key_value_heads": 1, "num_hidden_layers": 3},
    {"embedding_multiplier": 12, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125, "logits_scaling": 16},
    dict.fromkeys(KEYS),  # what a config leaves out is 1: of scores too, where others have 1 / sqrt(head_dim)
    *({**dict.fromkeys(KEYS, 1.0), "attention_multiplier": 0.25, key: 0.7} for key in KEYS),
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()))
def test_granite_is_what_transformers_computes(pico_folder: Callable[..., Path], changes: dict[str, Any]) -> None:
    folder = pico_folder("granite", **changes)
    assert np.abs(by_reference(open_model(folder)) - natively(folder)).max() <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_without_a_multiplier_it_is_far_off(pico_folder: Callable[..., Path], name: str) -> None:
    """What the bound above would say of a reader that drops one."""
    folder = pico_folder("granite")
    model = open_model(folder)
    dropped = replace(model, shape=replace(model.shape, multipliers=replace(model.shape.multipliers, **{name: 1.0})))
    assert np.abs(by_reference(dropped) - natively(folder)).max() > 1e6 * EXACT


@pytest.mark.parametrize("family", family_names())
def test_what_a_config_states_is_read_and_stated_again(family: str) -> None:
    """Every multiplier of a family, from its config and back; every other is 1. Its GGUF has room for each."""
    table, config = get_family(family), pico_config(family)
    shape = read_shape(config, table)
    for name, stated in table.multipliers.items():
        assert stated.value(getattr(shape.multipliers, name), shape.numbers) == pytest.approx(config[stated.key])
    stated = {name: getattr(shape.multipliers, name) for name in table.multipliers}
    fixed = {name: power_of(times, shape.numbers) for name, times in table.fixed.items()}
    assert shape.multipliers == Multipliers(**stated, **fixed)
    architecture = table.gguf_longrope or table.gguf_architecture
    if architecture in GGUF_FIXED:  # it computes its own, whatever a file says: others are refused
        with pytest.raises(UnsupportedError, match=r"gemma3 does not multiply as the model does: attention 1\.1547"):
            multiplier_keys(architecture, shape)
        return
    assert table.multipliers.keys() <= GGUF_MULTIPLIERS.get(architecture, {}).keys()
    assert len(multiplier_keys(architecture, shape)) == len(GGUF_MULTIPLIERS.get(architecture, {}))


def test_a_multiplier_that_an_architecture_lacks_is_refused_by_name() -> None:
    shape = read_shape(pico_config("granite"), get_family("granite"))
    with pytest.raises(UnsupportedError, match=r"embedding 12, residual 0\.6, attention 1\.5, logits 1\.25"):
        multiplier_keys("llama", shape)


BAD: list[tuple[dict[str, Any], str]] = [
    *(({key: 0}, f"{key} is 0; a positive number is needed") for key in KEYS),
    ({"logits_scaling": -8.0}, "logits_scaling is -8.0; a positive number is needed"),
    ({"residual_multiplier": "1"}, "residual_multiplier is '1'"),
    ({"attention_multiplier": float("nan")}, "attention_multiplier is nan"),
    ({"embedding_multiplier": True}, "embedding_multiplier is True"),
    ({"logits_scaling": 5e-324}, "logits_scaling is 5e-324, which leaves no number to multiply with"),
    ({"embedding_multiplier": None}, "embedding_multiplier is missing"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_a_multiplier_that_is_no_positive_number_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_shape({**pico_config("granite"), **changes}, get_family("granite"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"residual_multiplier": 0.0}, 3, "residual_multiplier is 0.0; a positive number is needed"),
        ({"scale_emb": 12, "lm_head_multiplier": 0.5}, 4, "scale_emb 12, lm_head_multiplier 0.5"),
        ({"final_logit_softcapping": 30.0}, 4, "final_logit_softcapping 30.0"),
    ],
)
def test_the_command_line_says_it(
    tmp_path: Path, cli: Callable[..., Result], changes: dict[str, Any], code: int, message: str
) -> None:
    folder = write_pico(tmp_path / "m", "granite")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    result = cli("hf", folder, "-o", tmp_path / "o")
    assert result.code == code and message in result.err


def test_every_multiplier_goes_into_weights(pico_folder: Callable[..., Path]) -> None:
    """Of a family whose folders would be a llama's: all four, biases included, tied and not."""
    for changes in ({}, {"tie_word_embeddings": True, "attention_bias": True}):
        model = open_model(pico_folder("granite", **changes))
        made = in_weights(replace(model, family=replace(model.family, hf_written="llama")), rounded=False)
        assert made.shape.multipliers == Multipliers() != model.shape.multipliers
        assert np.abs(by_reference(made) - by_reference(model)).max() <= EXACT


# --- GGUF ------------------------------------------------------------------------------------------------


def granite_gguf(path: Path, **scales: float) -> Path:
    """A file by gguf-py, with these of its scales."""

    def edit(writer: gguf.GGUFWriter) -> None:
        for key, value in scales.items():
            writer.add_float32(f"granite.{key.replace('__', '.')}", value)

    return make_pico(path, "granite", edit=edit).path


def test_a_file_s_scales_are_the_config_s(tmp_path: Path) -> None:
    """The keys of gguf-py's own table, as llama.cpp reads them: a divisor of logits, a scale of scores."""
    scales = {"embedding_scale": 12.0, "residual_scale": 0.22, "attention__scale": 0.0078125, "logit_scale": 16.0}
    named = (gguf.Keys.LLM.EMBEDDING_SCALE, gguf.Keys.LLM.RESIDUAL_SCALE, gguf.Keys.Attention.SCALE)
    assert {key.format(arch="granite") for key in (*named, gguf.Keys.LLM.LOGIT_SCALE)} == {
        f"granite.{key.replace('__', '.')}" for key in scales
    }
    model = open_model(granite_gguf(tmp_path / "m.gguf", **scales))
    assert {key: model.checkpoint.config[key] for key in KEYS} == dict(
        zip(KEYS, (12.0, 0.22, 0.0078125, 16.0), strict=True)
    )
    assert model.shape.multipliers == Multipliers(12.0, 0.22, 0.0078125 * 4, 1 / 16)


def test_scales_that_a_file_leaves_out_or_at_zero_are_off(tmp_path: Path) -> None:
    """As in llama.cpp: scores are divided by sqrt(head_dim) then."""
    for name, zeros in (("absent", {}), ("zero", dict.fromkeys(("embedding_scale", "attention__scale"), 0.0))):
        model = open_model(granite_gguf(tmp_path / f"{name}.gguf", logit_scale=1.0, **zeros))
        assert model.shape.multipliers == Multipliers()
        assert model.checkpoint.config["attention_multiplier"] == 0.25


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({}, "missing metadata: granite.logit_scale"),
        ({"logit_scale": 0.0}, "granite.logit_scale is 0.0; a positive number is needed"),
        ({"logit_scale": 1.0, "residual_scale": -1.0}, "granite.residual_scale is -1.0; a positive number is needed"),
        ({"logit_scale": float("inf")}, "granite.logit_scale is inf; a positive number is needed"),
    ],
)
def test_a_file_with_a_scale_that_means_nothing_is_refused(
    tmp_path: Path, scales: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        open_model(granite_gguf(tmp_path / "m.gguf", **scales))
    assert message in str(caught.value)


def test_both_directions_of_a_statement_are_one_formula() -> None:
    stated = Stated("depth", times={"layers": -0.5})
    assert stated.multiplier(1.4, {"layers": 49, "hidden": 1, "head_dim": 1}) == pytest.approx(0.2)
    assert stated.value(0.2, {"layers": 49, "hidden": 1, "head_dim": 1}) == pytest.approx(1.4)
    divisor = Stated("base", power=-1, times={"hidden": 1})
    assert divisor.value(divisor.multiplier(16.0, {"hidden": 64}), {"hidden": 64}) == pytest.approx(16.0)
