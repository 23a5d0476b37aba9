# SPDX-License-Identifier: Apache-2.0
"""What can't be read is refused by name: methods and layouts (exit code 4), damage and lost keys (exit code 3)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from support.pico import write_pico
from support.quantised import LAYOUTS, write_quantised

from lrconvert.checkpoint import open_checkpoint, open_model
from lrconvert.errors import InputError, LrconvertError, UnsupportedError

Q = "model.layers.0.self_attn.q_proj"
Stored = dict[str, np.ndarray]
Change = Callable[[Stored], Any]


def dropped(part: str) -> Change:
    return lambda stored: stored.pop(f"{Q}.{part}")


def cut(part: str, axis: int = 0) -> Change:
    """One row, or one column, is missing."""

    def change(stored: Stored) -> None:
        values = stored[f"{Q}.{part}"]
        stored[f"{Q}.{part}"] = np.ascontiguousarray(np.delete(values, -1, axis))

    return change


def replaced(part: str, make: Callable[[np.ndarray], Any]) -> Change:
    return lambda stored: stored.update({f"{Q}.{part}": np.ascontiguousarray(make(stored[f"{Q}.{part}"]))})


def first_is(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def make(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values.reshape(-1)[0] = value
        return values

    return make


def state_with(**changes: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.frombuffer(json.dumps({**json.loads(values.tobytes()), **changes}).encode(), np.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"


def shape(part: str, has: str, needed: str) -> str:
    """What an error says of a shape."""
    return rf"{part} has shape {re.escape(has)}; {re.escape(needed)} is needed"


def gone(part: str) -> str:
    return rf"{Q}\.{part} is missing"


NOT_FINITE = r" holds values that are not finite"
# Found when the folder is opened: the layout, what is wrong with it, and what the error says.
AT_ONCE: dict[str, tuple[str, Change, str]] = {
    "GPTQ without zero points": (
        "gptq-4",
        dropped("qzeros"),
        rf"{Q}\.qzeros is missing \(beside it: g_idx, qweight, scales",
    ),
    "GPTQ without scales": ("gptq-4", dropped("scales"), gone(r"scales")),
    "GPTQ without an order that it has": ("gptq-4-ordered", dropped("g_idx"), r"g_idx is missing, .*desc_act is true"),
    "GPTQ's scales cut": ("gptq-4", cut("scales"), shape(r"scales", "[1, 64]", "[2, 64]")),
    "GPTQ's zero points cut": ("gptq-4", cut("qzeros", 1), shape(r"qzeros", "[2, 7]", "[2, 8]")),
    "GPTQ's order cut": ("gptq-4", cut("g_idx"), shape(r"g_idx", "[63]", "[64]")),
    "GPTQ's codes cut": ("gptq-4", cut("qweight"), shape(r"g_idx", "[64]", "[56]")),
    "GPTQ's codes as floats": (
        "gptq-4",
        replaced("qweight", lambda v: v.astype(np.float32)),
        r"qweight is F32; I32 is needed",
    ),
    "AWQ's scales cut": ("awq", cut("scales", 1), shape(r"scales", "[2, 63]", "[2, 64]")),
    "AWQ without zero points": ("awq", dropped("qzeros"), gone(r"qzeros")),
    "AWQ's codes flat": ("awq", replaced("qweight", np.ravel), r"qweight has shape \[512\]; a matrix is needed"),
    "fp8 without scales": (
        "fp8-block",
        dropped("weight_scale_inv"),
        rf"{Q}\.weight_scale_inv is missing \(beside it: weight\)",
    ),
    "fp8 scales cut": ("fp8-block", cut("weight_scale_inv"), shape(r"weight_scale_inv", "[2, 2]", "[3, 2]")),
    "fp8 scales transposed": (
        "fp8-block",
        replaced("weight_scale_inv", np.transpose),
        r"has shape \[2, 3\]; \[3, 2\] is needed",
    ),
    "fp8 with two scales": (
        "fp8-block",
        lambda s: s.update({f"{Q}.weight_scale": np.ones((3, 2), np.float32)}),
        rf"{Q} has weight_scale_inv and weight_scale",
    ),
    "fp8 codes as integers": (
        "fp8-block",
        replaced("weight", lambda v: v.view(np.int8)),
        r"weight is I8; F8_E4M3 or F8_E5M2 is needed",
    ),
    "int8 without scales": ("ct-int8", dropped("weight_scale"), gone(r"weight_scale")),
    "int8 without zero points": ("ct-int8-asym", dropped("weight_zero_point"), gone(r"weight_zero_point")),
    "int4 scales cut": ("ct-int4", cut("weight_scale", 1), shape(r"weight_scale", "[64, 1]", "[64, 2]")),
    "int4 codes cut": (
        "ct-int4",
        cut("weight_packed", 1),
        r"weight_packed has shape \[64, 7\]; weight_shape \[64, 64\] in 4 bits needs \[64, 8\]",
    ),
    "int4 without a shape": ("ct-int4", dropped("weight_shape"), gone(r"weight_shape")),
    "int4 with a negative shape": ("ct-int4", replaced("weight_shape", first_is(-1)), r"weight_shape \[-1, 64\]"),
    "int4 zero points cut": ("ct-int4-asym", cut("weight_zero_point"), shape(r"weight_zero_point", "[7, 4]", "[8, 4]")),
    "nvfp4 without the scale of scales": ("ct-nvfp4", dropped("weight_global_scale"), gone(r"weight_global_scale")),
    "a part of another format": (
        "ct-int8",
        lambda s: s.update({f"{Q}.weight_shape": np.array([64, 64])}),
        rf"{Q}\.weight_shape: no part of compressed-tensors int8",
    ),
    "bitsandbytes' codes cut": ("bnb-nf4", cut("weight"), r"weight has 2047 bytes; 2048 are needed for \[64, 64\]"),
    "bitsandbytes without a state": ("bnb-nf4", dropped(STATE), rf"{Q}\.{STATE} is missing"),
    "bitsandbytes' scales cut": ("bnb-nf4", cut("weight.absmax"), shape(r"weight\.absmax", "[63]", "[64]")),
    "bitsandbytes' second scales gone": (
        "bnb-nf4-double",
        dropped("weight.nested_absmax"),
        r"weight\.nested_absmax is missing",
    ),
    "bitsandbytes' table cut": ("bnb-nf4", cut("weight.quant_map"), shape(r"weight\.quant_map", "[15]", "[16]")),
    "bitsandbytes' state is no JSON": ("bnb-nf4", replaced(STATE, lambda v: v[:-1]), r"bitsandbytes__nf4 is not JSON"),
    "bitsandbytes' state has no blocks": (
        "bnb-nf4",
        replaced(STATE, state_with(blocksize=0)),
        r"its quant_state has blocksize 0",
    ),
    "bitsandbytes' state has no shape": (
        "bnb-nf4",
        replaced(STATE, state_with(shape=[64])),
        r"has shape \[64\]; two whole numbers",
    ),
    "bitsandbytes' state is another's": (
        "bnb-nf4",
        replaced(STATE, state_with(quant_type="fp4")),
        r"does not say quant_type 'nf4'",
    ),
    "bitsandbytes' offset is gone": (
        "bnb-nf4-double",
        replaced(STATE, state_with(nested_offset=None)),
        r"nested_offset None; a number is needed",
    ),
    "bitsandbytes' rows scaled too few times": ("bnb-int8", cut("SCB"), r"SCB has shape \[63\]; \[64\]"),
    "a weight of another model": (
        "fp8-tensor",
        replaced("weight", lambda v: v[:32]),
        rf"{Q}\.weight has shape \[32, 64\]; the config needs \[64, 64\]",
    ),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_parts_that_do_not_fit_are_found_when_the_folder_is_opened(case: str, tmp_path: Path) -> None:
    layout, change, said = AT_ONCE[case]
    write_quantised(tmp_path, layout, change=change)
    with pytest.raises(InputError, match=said) as error:
        open_model(tmp_path)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 600


# Found when the weight is read.
WHEN_READ: dict[str, tuple[str, Change, str]] = {
    "a scale of GPTQ": ("gptq-4", replaced("scales", first_is(np.nan)), r"scales" + NOT_FINITE),
    "a scale of AWQ": ("awq", replaced("scales", first_is(np.inf)), r"scales" + NOT_FINITE),
    "a scale of fp8": ("fp8-block", replaced("weight_scale_inv", first_is(np.nan)), r"weight_scale_inv" + NOT_FINITE),
    "an exponent": ("mxfp8", replaced("weight_scale_inv", first_is(255)), r"weight_scale_inv" + NOT_FINITE),
    "a code of fp8": ("fp8-tensor", replaced("weight", first_is(np.nan)), r"weight" + NOT_FINITE),
    "a product": ("fp8-tensor", replaced("weight_scale", lambda _: np.array(3e38, np.float32)), r"weight" + NOT_FINITE),
    "a scale of int4": ("ct-int4", replaced("weight_scale", first_is(np.nan)), r"weight_scale" + NOT_FINITE),
    "the scale of scales": ("ct-nvfp4", replaced("weight_global_scale", first_is(0)), r"weight_global_scale is 0"),
    "a scale of bitsandbytes": ("bnb-nf4", replaced("weight.absmax", first_is(np.nan)), r"weight\.absmax" + NOT_FINITE),
    "a group that isn't there": (
        "gptq-4-ordered",
        replaced("g_idx", first_is(4)),
        rf"{Q}\.g_idx names group 4; there are 4",
    ),
    "a negative group": ("gptq-4-ordered", replaced("g_idx", first_is(-2)), rf"{Q}\.g_idx names group -2"),
    "a group of compressed-tensors": (
        "ct-int4-ordered",
        replaced("weight_g_idx", first_is(9)),
        r"weight_g_idx names group 9",
    ),
}


@pytest.mark.parametrize("case", WHEN_READ)
def test_damaged_values_are_found_when_they_are_read(case: str, tmp_path: Path) -> None:
    layout, change, said = WHEN_READ[case]
    write_quantised(tmp_path, layout, change=change)
    checkpoint = open_model(tmp_path).checkpoint
    with pytest.raises(InputError, match=said) as error:
        _ = checkpoint.read(f"{Q}.weight")
    assert str(tmp_path / "model.safetensors") in str(error.value) and "damaged" in (error.value.remedy or "")


# What isn't read, by the layout and the section's keys that are other.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another method": (
        "gptq-4",
        {"quant_method": "hqq"},
        r"quantised with 'hqq' can't be read.*gptq, awq, bitsandbytes",
    ),
    "three bits": ("gptq-4", {"bits": 3}, r"quantization_config\.bits is 3; 2, 4, 8 can be read"),
    "marlin": ("gptq-4", {"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin'; gptq, gptq_v2 can be read"),
    "marlin, before it had a name": ("gptq-4", {"is_marlin_format": True}, r"is_marlin_format is True"),
    "words of 16 bits": ("gptq-4", {"pack_dtype": "int16"}, r"pack_dtype is 'int16'"),
    "settings of their own": ("gptq-4", {"dynamic": {"-:a": {}, "+:b": {"bits": 8}}}, r"dynamic gives '\+:b' settings"),
    "gemv": ("awq", {"version": "gemv"}, r"version is 'gemv'; gemm can be read"),
    "gemv, as transformers 5 says it": ("awq", {"version": None, "format": "gemv"}, r"format is 'gemv'"),
    "llm-awq": ("awq", {"backend": "llm-awq"}, r"backend is 'llm-awq'"),
    "AWQ in 8 bits": ("awq", {"bits": 8}, r"bits is 8; 4 can be read"),
    "a sparse format": ("ct-int4", {"format": "marlin-24"}, r"format is 'marlin-24'"),
    "sparse weights": ("ct-int8", {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config\.format is"),
    "a transform": (
        "ct-int8",
        {"transform_config": {"config_groups": {"u": {}}}},
        r"transform_config is .* can't be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_layouts_are_refused_by_name(case: str, tmp_path: Path, cli: Callable[..., Result]) -> None:
    layout, changes, said = REFUSED[case]
    section = {key: value for key, value in {**LAYOUTS[layout].section, **changes}.items() if value is not None}
    write_quantised(tmp_path, layout, section=section)
    with pytest.raises(UnsupportedError, match=said):
        open_model(tmp_path)
    refused = cli("inspect", tmp_path)
    assert refused.code == 4 and "unquantised" in refused.err and "Traceback" not in refused.err
    assert open_checkpoint(tmp_path).config["model_type"] == "llama"  # its rotation can be imported all the same


def test_weights_in_columns_of_eight_bit_bitsandbytes_are_refused(tmp_path: Path) -> None:
    write_quantised(tmp_path, "bnb-int8", change=replaced("weight_format", lambda _: np.array(1, np.uint8)))
    with pytest.raises(UnsupportedError, match=rf"{Q}\.weight_format is 1; rows \(0\) can be read"):
        open_model(tmp_path)


# A section that says nothing, or something that can't be.
ODD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no method": ("gptq-4", {"quant_method": None}, r"quantization_config\.quant_method is missing"),
    "no bits": ("gptq-4", {"bits": None}, r"quantization_config\.bits is None; a whole number is needed"),
    "bits in words": ("gptq-4", {"bits": "four"}, r"bits is 'four'; a whole number is needed"),
    "groups of none": ("gptq-4", {"group_size": 0}, r"group_size is 0; -1 or more than 0 is needed"),
    "no blocks": (
        "fp8-block",
        {"weight_block_size": None},
        r"scales of blocks, and config\.json has no quantization_config\.weight_block_size",
    ),
    "blocks of one number": (
        "fp8-block",
        {"weight_block_size": [128]},
        r"weight_block_size is \[128\]; two whole numbers",
    ),
    "other blocks": ("fp8-block", {"weight_block_size": [64, 64]}, r"_inv has shape \[3, 3\]; \[1, 2\] is needed"),
    "no groups": ("ct-int8", {"config_groups": None}, r"config_groups is missing"),
    "a preset": ("ct-int8", {"config_groups": {"W8A8": ["Linear"]}}, r"W8A8 is \['Linear'\]; a section is needed"),
    "another type": (
        "ct-int8",
        {"config_groups": {"g": {"targets": [], "weights": {"num_bits": 8, "type": "float"}}}},
        r"type is 'float'; that is not how int-quantized stores",
    ),
    "a format of plain weights": (
        "ct-int8",
        {"format": "dense"},
        r"is quantised; config\.json says that the format is 'dense'",
    ),
    "a pattern that is none": (
        "ct-int8",
        {
            "config_groups": {
                str(bits): {"targets": ["re:("], "weights": {"num_bits": bits, "strategy": "channel"}}
                for bits in (4, 8)
            }
        },
        r"target re:\(, no pattern",
    ),
    "no module is named": (
        "ct-int8",
        {
            "config_groups": {
                str(bits): {"targets": ["Elsewhere"], "weights": {"num_bits": bits, "strategy": "channel"}}
                for bits in (4, 8)
            }
        },
        r"is quantised, and no target of config_groups",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_a_section_that_can_not_be_is_named(case: str, tmp_path: Path) -> None:
    layout, changes, said = ODD[case]
    section = {key: value for key, value in {**LAYOUTS[layout].section, **changes}.items() if value is not None}
    write_quantised(tmp_path, layout, section=section)
    with pytest.raises(InputError, match=said):
        open_model(tmp_path)


HUGE = 10**30


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("gptq-8", {"group_size": HUGE}),
        ("fp8-tensor", {"weight_block_size": [HUGE, HUGE]}),
        ("ct-int8", {"config_groups": {"g": {"targets": [], "weights": {"num_bits": 8, "group_size": HUGE}}}}),
    ],
)
def test_a_group_larger_than_a_row_is_the_row(layout: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """And overflows nowhere."""
    section = {**LAYOUTS[layout].section, **changes}

    def change(stored: Stored) -> None:
        if layout == "fp8-tensor":
            for name in [name for name in stored if name.endswith("weight_scale")]:
                stored[name] = stored[name].reshape(1, 1)

    meant = write_quantised(tmp_path, layout, section=section, change=change)
    found = open_model(tmp_path).checkpoint.read(f"{Q}.weight")
    assert np.array_equal(found, meant[f"{Q}.weight"].astype(np.float32))


def test_a_dtype_that_is_none_is_taken_from_the_weights(tmp_path: Path) -> None:
    """As one that nobody has is."""
    write_quantised(tmp_path, "fp8-tensor", torch_dtype=["float32"])
    assert open_model(tmp_path).checkpoint.dense_dtype == "F32"


@pytest.mark.parametrize("value", ["gptq", [], 4])
def test_a_section_of_another_type(value: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a section is needed"):
        open_model(write_pico(tmp_path, quantization_config=value))


@pytest.mark.parametrize(
    ("layout", "said", "key"),
    [("fp8-block", '"fp8"', "weight_block_size"), ("gptq-4", '"gptq" or "awq"', "bits and group_size"),
     ("ct-int4", '"compressed-tensors"', "config_groups"), ("ct-int8", '"compressed-tensors", "fp8"', "needs"),
     ("bnb-nf4", '"bitsandbytes"', "load_in_4bit"), ("bnb-int8", '"bitsandbytes"', "load_in_8bit")],
)  # fmt: skip
def test_a_config_that_lost_its_section_gets_one_line(
    layout: str, said: str, key: str, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """Nothing is guessed, and no tensor names pile up: which key is missing, and what it has to say."""
    write_quantised(tmp_path, layout, section={})
    result = cli("inspect", tmp_path)
    assert result.code == 3
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) <= 2 and len(result.err) < 700
    for needle in ("config.json has no quantization_config", said, key, "more)"):
        assert needle in result.err
    (tmp_path / "quantize_config.json").write_text("{}")
    assert "quantize_config.json beside it has the settings" in cli("inspect", tmp_path).err


def test_float8_without_scales_gets_one_line_too(tmp_path: Path) -> None:
    def change(stored: Stored) -> None:
        for name in [name for name in stored if name.endswith("_scale_inv")]:
            del stored[name]

    write_quantised(tmp_path, "fp8-block", section={}, change=change)
    with pytest.raises(InputError, match=r"13 more are F8_E4M3, without scales, and config\.json has no quantization"):
        open_model(tmp_path)


def test_a_section_beside_plain_weights(tmp_path: Path) -> None:
    """An artifact of another program that forgot to remove it."""
    with pytest.raises(InputError, match="quantised with gptq, and none is") as error:
        open_model(write_pico(tmp_path, quantization_config=LAYOUTS["gptq-4"].section))
    assert error.value.remedy == "Remove quantization_config from config.json, if they are plain"


def test_many_problems_are_a_few_lines(tmp_path: Path) -> None:
    """Three are named, and the rest counted."""

    def change(stored: Stored) -> None:
        for name in [name for name in stored if name.endswith(".qzeros")]:
            del stored[name]

    write_quantised(tmp_path, "gptq-4", change=change)
    with pytest.raises(InputError, match="and 11 more like these") as error:
        open_model(tmp_path)
    assert str(error.value).count("is missing") == 3


@pytest.mark.parametrize("layout", ["fp8-block", "ct-int4-asym", "gptq-4-ordered", "awq", "bnb-nf4-double", "bnb-int8"])
def test_no_damage_of_a_header_or_a_section_ends_in_a_traceback(layout: str, tmp_path: Path) -> None:
    """Random ones: a part gone, of another dtype or shape, a key of another type. What opens can be read, or says why
    it can't."""
    rng = np.random.default_rng(11)
    odd = (None, True, -1, "2x", 0, 7, 10**30, "x", [], {}, [1, 2, 3], 0.5)
    for round_ in range(60):

        def change(stored: Stored, rng: np.random.Generator = rng) -> None:
            parts = sorted(name for name in stored if name.startswith(Q))
            name = parts[rng.integers(len(parts))]
            values = stored[name]
            damages: tuple[Callable[[], Any], ...] = (
                lambda: stored.pop(name),
                lambda: stored.update({name: values.reshape(-1)[: rng.integers(values.size + 1)].copy()}),
                lambda: stored.update({name: values.reshape(1, *values.shape)}),
                lambda: stored.update({name: np.ascontiguousarray(values.T)}),
                lambda: stored.update({name: rng.integers(-9, 9, values.shape).astype(np.int8)}),
                lambda: stored.update({name: np.zeros(values.shape, np.float32)}),
                lambda: stored.update({name: rng.integers(0, 256, values.nbytes).astype(np.uint8)}),
            )
            damages[rng.integers(len(damages))]()

        section = dict(LAYOUTS[layout].section)
        if round_ % 3 == 0:
            keys = sorted(section)
            section[keys[rng.integers(len(keys))]] = odd[rng.integers(len(odd))]
        write_quantised(tmp_path, layout, section=section, change=change if round_ % 3 else None)
        try:
            _ = open_model(tmp_path).checkpoint.read(f"{Q}.weight")
        except LrconvertError as error:
            assert error.exit_code in (3, 4)
