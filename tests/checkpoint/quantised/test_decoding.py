# SPDX-License-Identifier: Apache-2.0
"""Every layout is read as its definition says, by rows, in any order, and in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.pico import pico_config, write_pico
from support.quantised import LAYOUTS, bnb4, quantised_tensors, scales_for, write_quantised

from lrconvert.checkpoint import Checkpoint, blocks, open_model
from lrconvert.checkpoint.folder import FolderCheckpoint
from lrconvert.checkpoint.quantised import bitsandbytes, compressed_tensors, fp8, gptq, weight
from lrconvert.checkpoint.quantised.settings import Settings
from lrconvert.checkpoint.tensor_file import TensorFile
from lrconvert.errors import InputError

# Weights that are a product of more than two numbers: each more rounds once, to a part in 2^24.
ROUNDED = {"ct-nvfp4", "bnb-nf4-double", "bnb-int8"}
ONE = np.ones(1, np.float32)
FEW = ("fp8-block", "ct-int4-asym", "gptq-4-ordered", "awq", "bnb-nf4-double")


def differs(checkpoint: Checkpoint, meant: dict[str, np.ndarray], *, steps: int = 0) -> str | None:
    """The first weight that isn't what it means in float32, give or take some `steps` of its last place."""
    for name, values in meant.items():
        wanted, found = values.astype(np.float32), checkpoint.read(name).astype(np.float32)
        if not (np.abs(found - wanted) <= steps * np.spacing(np.abs(wanted))).all():
            return name
    return None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_what_the_layout_defines(layout: str, tmp_path: Path) -> None:
    meant = write_quantised(tmp_path, layout)
    model = open_model(tmp_path)
    assert differs(model.checkpoint, meant, steps=4 if layout in ROUNDED else 0) is None
    assert model.quantised is not None
    assert set(model.checkpoint.tensors) >= set(meant)
    assert "quantization_config" not in model.checkpoint.config


@pytest.mark.parametrize("family", ["phi3", "qwen2"])
@pytest.mark.parametrize("layout", FEW)
def test_fused_and_biased_modules_too(layout: str, family: str, tmp_path: Path) -> None:
    """Phi-3 has q, k and v, and gate and up, in one tensor each; Qwen2's have biases, which stay as they are."""
    meant = write_quantised(tmp_path, layout, family)
    assert differs(open_model(tmp_path).checkpoint, meant, steps=4 if layout in ROUNDED else 0) is None


@pytest.mark.parametrize("layout", [*FEW, "gptq-4-v2", "fp8-tensor", "ct-int8-asym", "ct-nvfp4"])
def test_blocks_join_without_gaps_in_any_order_and_thread(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of a few rows, and more rows than a band has: what is read at once of rows that lie side by side."""
    meant = write_quantised(tmp_path, layout, intermediate_size=192, num_hidden_layers=1)
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 64 * 5)
    monkeypatch.setattr(weight, "BAND_ROWS", 56)
    checkpoint = open_model(tmp_path).checkpoint
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        found = list(checkpoint.blocks(name))
        assert len(found) > 10
        assert [block.start for block in found] == [0, *(block.stop for block in found[:-1])]
        with ThreadPoolExecutor(4) as pool:
            rows = list(pool.map(lambda block: block.read(), reversed(found)))
        assert np.array_equal(np.concatenate(rows[::-1]), checkpoint.read(name))
    assert differs(checkpoint, meant, steps=4 if layout in ROUNDED else 0) is None


def test_a_weight_is_never_held_whole(tmp_path: Path) -> None:
    """64 MB of float32, read in order: a band of packed words and a block of rows are what is in memory."""
    rng, (out, columns) = np.random.default_rng(3), (4096, 4096)
    parts = {
        "m.qweight": rng.integers(-(2**31), 2**31, (columns // 8, out), np.int32),
        "m.qzeros": rng.integers(-(2**31), 2**31, (columns // 128, out // 8), np.int32),
        "m.scales": scales_for(rng, (columns // 128, out), 8, np.float16),
    }
    write_pico(tmp_path)
    save_file(parts, tmp_path / "model.safetensors")
    opened = weight.Parts(FolderCheckpoint(tmp_path), "m", {part: f"m.{part}" for part in gptq.AWQ_PARTS})
    found = gptq.gptq(Settings({"bits": 4, "group_size": 128}), opened)
    tracemalloc.start()
    total = sum(float(block.read().sum()) for block in found.blocks())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.isfinite(total)
    assert peak < out * columns * 4 / 4


def test_what_is_stored_beside_weights_is_left_out(tmp_path: Path) -> None:
    """Scales of activations and of a quantised cache; the note says what an artifact does instead."""
    section, attention = LAYOUTS["ct-fp8-channel"].section, "model.layers.0.self_attn"
    beside = dict.fromkeys([f"{attention}.{name}" for name in ("k_scale", "v_scale", "q_proj.input_scale")], ONE)
    group = {**section["config_groups"]["group_0"], "input_activations": {"num_bits": 8, "type": "float"}}
    section = {**section, "config_groups": {"group_0": group}}
    meant = write_quantised(tmp_path, "ct-fp8-channel", section=section, change=lambda stored: stored.update(beside))
    model = open_model(tmp_path)
    assert model.checkpoint.tensors.keys() == meant.keys()
    assert any("rounds activations or the cache too" in note for note in model.notes)


def test_zero_biases_of_autogptq_are_left_out_and_others_are_not(tmp_path: Path) -> None:
    write_quantised(tmp_path / "zero", "gptq-zero-biases")
    model = open_model(tmp_path / "zero")
    assert any("14 biases of quantised modules are zero" in note for note in model.notes)
    bias = "model.layers.0.self_attn.q_proj.bias"
    write_quantised(
        tmp_path / "other", "gptq-zero-biases", change=lambda stored: stored.update({bias: np.ones(64, np.float16)})
    )
    with pytest.raises(InputError, match=rf"llama does not have: {bias}$"):
        open_model(tmp_path / "other")


def test_modules_that_were_not_converted_stay_as_they_are(tmp_path: Path) -> None:
    """`modules_to_not_convert` names them, and their tensors are plain; a head that was quantised is read too."""
    named = ["lm_head", "model.layers.0.mlp.down_proj"]
    section = {**LAYOUTS["fp8-block-128"].section, "modules_to_not_convert": named}
    plain = ("lm_head", "layers.0.mlp.down_proj")
    meant = write_quantised(tmp_path / "some", "fp8-block-128", section=section, plain=plain)
    assert meant["model.layers.0.mlp.down_proj.weight"].dtype == np.float32
    assert differs(open_model(tmp_path / "some").checkpoint, meant) is None
    meant = write_quantised(tmp_path / "all", "fp8-block-128", plain=())
    assert meant["lm_head.weight"].dtype == np.float64
    assert differs(open_model(tmp_path / "all").checkpoint, meant) is None


@pytest.mark.parametrize("layout", ["fp8-block", "gptq-4-ordered", "bnb-nf4-double"])
def test_parts_may_lie_in_several_files_and_under_a_wrapper_s_names(layout: str, tmp_path: Path) -> None:
    """A weight in one shard, its scales in another, and a prefix of torch.compile's in front of all."""

    def wrapped(stored: dict[str, np.ndarray]) -> None:
        for name in list(stored):
            stored[f"_orig_mod.{name}"] = stored.pop(name)

    meant = write_quantised(tmp_path, layout, change=wrapped)
    stored = TensorFile(tmp_path / "model.safetensors")
    weight_map = {}
    for part in (0, 1):
        file = f"model-{part}.safetensors"
        names = sorted(stored.tensors)[part::2]
        save_file({name: stored.read(name) for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = open_model(tmp_path)
    assert differs(model.checkpoint, meant, steps=4 if layout in ROUNDED else 0) is None
    assert any("read under other names" in note for note in model.notes)


def test_blocks_may_be_spelled_in_words(tmp_path: Path) -> None:
    """ "32x16", as older files say it."""
    section = LAYOUTS["ct-fp8-block"].section
    group = section["config_groups"]["group_0"]
    group = {**group, "weights": {**group["weights"], "block_structure": "32x16"}}
    meant = write_quantised(tmp_path, "ct-fp8-block", section={**section, "config_groups": {"g": group}})
    assert differs(open_model(tmp_path).checkpoint, meant) is None


def test_two_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    """The most specific target counts: a module's name, then a pattern, then its class."""
    four, eight = LAYOUTS["ct-int4"], LAYOUTS["ct-int8"]
    other, there = quantised_tensors(eight, pico_config("llama"))

    def exchanged(stored: dict[str, np.ndarray]) -> None:
        for name in [name for name in stored if ".down_proj." in name]:
            del stored[name]
        stored |= {name: values for name, values in other.items() if ".down_proj." in name}

    groups = {
        "group_0": {**four.section["config_groups"]["group_0"], "format": "pack-quantized"},
        "group_1": {
            **eight.section["config_groups"]["group_0"],
            "format": "int-quantized",
            "targets": ["re:.*down_proj$"],
        },
    }
    section = {**four.section, "format": "mixed-precision", "config_groups": groups}
    meant = write_quantised(tmp_path, "ct-int4", section=section, change=exchanged)
    meant |= {name: values for name, values in there.items() if ".down_proj." in name}
    model = open_model(tmp_path)
    assert differs(model.checkpoint, meant) is None
    assert model.quantised == "compressed-tensors int4 (groups of 32), compressed-tensors int8 (rows)"


def test_a_dense_compressed_tensors_folder_is_plain(tmp_path: Path) -> None:
    write_pico(tmp_path, quantization_config={**LAYOUTS["ct-int8"].section, "format": "dense"})
    model = open_model(tmp_path)
    assert model.quantised is None and "config.json names compressed-tensors; the weights are plain" in model.notes


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [({"torch_dtype": "float16"}, "F16"), ({"torch_dtype": None, "dtype": "bfloat16"}, "BF16"),
     ({"torch_dtype": None}, "F32"), ({"torch_dtype": "auto"}, "F32")],
)  # fmt: skip
def test_dequantised_weights_have_the_dtype_that_the_model_computes_in(
    keys: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    """The config's; else that of the weights that are plain."""
    write_quantised(tmp_path, "gptq-4", **keys)
    assert open_model(tmp_path).checkpoint.dense_dtype == dtype


# --- mutants -----------------------------------------------------------------------------------------------


def swapped_nibbles(words: np.ndarray, bits: int) -> np.ndarray:
    right = weight.unpacked(words, bits)
    return right.reshape(*right.shape[:-1], -1, 2)[..., ::-1].reshape(right.shape)


def transposed_scales(parts: Any, scale: str, block: Any, columns: int, start: int, stop: int) -> np.ndarray:
    tall, wide = block
    grid = parts.whole(scale).astype(np.float32).reshape(-1)
    rows, across = np.arange(start, stop) // tall, np.arange(columns) // wide
    down = -(-parts.info("weight").shape[0] // tall)
    return grid[across[None, :] * down + rows[:, None]]


def low_nibble_first(octets: np.ndarray, skip: int, count: int) -> np.ndarray:
    return np.stack([octets & 15, octets >> 4], axis=1).reshape(-1)[skip : skip + count]


def no_nested_offset(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda parts, nested, first, last: right(parts, nested and {**nested, "nested_offset": 0.0}, first, last)


MUTANTS: dict[str, tuple[Any, str, Any, tuple[str, ...]]] = {
    "GPTQ's four bits in the other order": (gptq, "unpacked", swapped_nibbles, ("gptq-4", "gptq-4-v2", "awq")),
    "compressed-tensors' too": (compressed_tensors, "unpacked", swapped_nibbles, ("ct-int4", "ct-nvfp4", "ct-mxfp4")),
    "bitsandbytes' too": (bitsandbytes, "_nibbles", low_nibble_first, ("bnb-nf4", "bnb-fp4")),
    "AWQ's outputs in a row": (gptq, "AWQ_PLACES", list(range(8)), ("awq",)),
    "zero points of version 1 as they are stored": (
        gptq, "_zeros", lambda packed, bits, offset: weight.unpacked(packed, bits), ("gptq-4", "gptq-4-asym", "gptq-8")
    ),
    "zero points of version 2 plus 1": (
        gptq, "_zeros", lambda packed, bits, offset: weight.unpacked(packed, bits) + 1, ("gptq-4-v2",)
    ),
    "1 added to each zero point alone": (
        gptq, "_zeros", lambda packed, bits, offset: (weight.unpacked(packed, bits) + offset) & 15, ("gptq-4-asym",)
    ),
    "g_idx ignored": (
        gptq, "_groups", lambda parts, columns, size, groups: np.arange(columns) // size, ("gptq-4-ordered",)
    ),
    "weight_g_idx ignored": (
        compressed_tensors, "_order", lambda parts, wide, columns: np.arange(columns) // wide, ("ct-int4-ordered",)
    ),
    "scales of blocks transposed": (fp8, "scale_rows", transposed_scales, ("fp8-block",)),
    "scales of blocks transposed, compressed-tensors": (
        compressed_tensors, "scale_rows", transposed_scales, ("ct-fp8-block",)
    ),
    "double quantisation without its offset": (
        bitsandbytes, "_absmax", no_nested_offset(bitsandbytes._absmax), ("bnb-nf4-double",)
    ),
    "zeros of a mirrored float4": (compressed_tensors, "FLOAT4", np.abs(weight.FLOAT4), ("ct-nvfp4", "ct-mxfp4")),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_definitions_catch_every_likely_mistake(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, wrong, layouts = MUTANTS[mutant]
    monkeypatch.setattr(module, name, wrong)
    for layout in layouts:
        meant = write_quantised(tmp_path / layout, layout)
        assert differs(open_model(tmp_path / layout).checkpoint, meant, steps=1000) is not None, layout


def test_a_row_need_not_be_whole_blocks_of_bitsandbytes(tmp_path: Path) -> None:
    """Blocks run on from row to row: 96 channels are one and a half of 64. A block of rows begins within one."""
    rng = np.random.default_rng(9)
    stored, meant = bnb4("nf4", double=False)(rng, (40, 96))
    write_pico(tmp_path)
    save_file({f"m.{name}": values for name, values in stored.items()}, tmp_path / "model.safetensors")
    parts = weight.Parts(FolderCheckpoint(tmp_path), "m", {name: f"m.{name}" for name in stored})
    found = bitsandbytes.weight(Settings({}), parts)
    for start in (0, 1, 7, 39):
        rows = found.decode(found.load(start, start + 1), 0, 1)
        assert np.array_equal(rows[0], meant[start].astype(np.float32))


def test_exponents_and_float4_are_those_of_ml_dtypes() -> None:
    octets = np.arange(256, dtype=np.uint8)
    assert np.array_equal(weight.EXPONENT, octets.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), equal_nan=True)
    assert np.array_equal(weight.FLOAT4, octets[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32))
