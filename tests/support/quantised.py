# SPDX-License-Identifier: Apache-2.0
"""Small quantised models in every layout that is read, packed here value by value, and what their weights mean.

Codes, zero points and scales are drawn, so a weight is known in float64 from the formula alone: nothing is unpacked,
and no code is shared with the decoders. Each maker takes a module's shape [out, in] and returns the stored parts and
the weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from support.pico import pico_config, pico_tensors

Array = np.ndarray[Any, Any]
Made = tuple[dict[str, Array], Array]
Maker = Callable[[np.random.Generator, tuple[int, int]], Made]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs the n-th four bits of a word hold
NF4 = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
FP4 = (0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25, 0.0, -0.0052083333, -0.6666667, -1.0,
       -0.3333333, -0.5, -0.1666667, -0.25)  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Layout:
    """A way to store a module, and the section of config.json that says so. `plain`: modules that stay as they are."""

    section: dict[str, Any]
    make: Maker
    plain: tuple[str, ...] = ("lm_head",)


def words(values: Array, bits: int) -> Array:
    """Whole numbers packed along the last dimension into int32, the first into the lowest bits."""
    each = 32 // bits
    found = np.zeros((*values.shape[:-1], -(-values.shape[-1] // each)), np.uint64)
    for place in range(values.shape[-1]):
        found[..., place // each] |= values[..., place].astype(np.uint64) << np.uint64(bits * (place % each))
    return found.astype(np.uint32).view(np.int32)


def scales_for(rng: np.random.Generator, shape: tuple[int, ...], largest: float, dtype: Any = np.float32) -> Array:
    """Scales that make weights of about the size that a model of 64 channels has."""
    return (rng.uniform(0.5, 1.5, shape) * 0.2 / largest).astype(dtype)


def wide(scales: Array, tall: int, across: int, shape: tuple[int, int]) -> Array:
    """A scale for every value, by its place: float64 [out, in]."""
    found = np.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            found[row, column] = float(scales[row // tall, column // across])
    return found


def one_less(packed: Array, bits: int) -> Array:
    """GPTQ's version 1 of packed zero points: whole words less 1 in every place, so that a 0 borrows from the next."""
    ones = np.uint32(sum(1 << place for place in range(0, 32, bits)))
    return (packed.view(np.uint32) - ones).view(np.int32)


# --- float8 and int8 ---------------------------------------------------------------------------------------


def float8_codes(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.uniform(-440, 440, shape).astype(ml_dtypes.float8_e4m3fn)


def fp8(block: tuple[int, int] | None, name: str = "weight_scale_inv", dtype: Any = np.float32) -> Maker:
    """Blocks; None: one scale."""

    def make(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
        tall, across = block or shape
        codes = float8_codes(rng, shape)
        scales = scales_for(rng, (-(-shape[0] // tall), -(-shape[1] // across)), 448, dtype)
        weight = codes.astype(np.float64) * wide(scales, tall, across, shape)
        return {"weight": codes, name: scales if block else scales.reshape(())}, weight

    return make


def mxfp8(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
    codes, exponents = float8_codes(rng, shape), rng.integers(113, 118, (shape[0], shape[1] // 32)).astype(np.uint8)
    weight = codes.astype(np.float64) * wide(2.0 ** (exponents.astype(int) - 127), 1, 32, shape)
    return {"weight": codes, "weight_scale_inv": exponents}, weight


def rows_of(codes: Callable[..., Array], dtype: Any, *, zeros: bool = False) -> Maker:
    """A scale for each row, as compressed-tensors stores it."""

    def make(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
        stored = codes(rng, shape)
        scales = scales_for(rng, (shape[0], 1), 448 if stored.dtype != np.int8 else 128, dtype)
        parts, values = {"weight": stored, "weight_scale": scales}, stored.astype(np.float64)
        if zeros:
            parts["weight_zero_point"] = rng.integers(-20, 20, (shape[0], 1)).astype(np.int8)
            values -= parts["weight_zero_point"].astype(np.float64)
        return parts, values * scales.astype(np.float64)

    return make


def int8_codes(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.integers(-128, 128, shape).astype(np.int8)


# --- packed whole numbers ------------------------------------------------------------------------------------


def packed(bits: int, size: int, *, symmetric: bool, ordered: bool = False) -> Maker:
    """compressed-tensors' pack-quantized: signed codes, stored with 2^(bits − 1) added."""
    half = 2 ** (bits - 1)

    def make(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
        out, columns = shape
        codes = rng.integers(-half, half, shape)
        groups = columns // size if size > 0 else 1
        scales = scales_for(rng, (out, groups), half, ml_dtypes.bfloat16)
        zeros = np.zeros((out, groups), np.int64) if symmetric else rng.integers(-half, half, (out, groups))
        group = (
            rng.permutation(np.arange(columns) * groups // columns)
            if ordered
            else np.arange(columns) * groups // columns
        )
        parts = {
            "weight_packed": words(codes + half, bits),
            "weight_scale": scales,
            "weight_shape": np.array(shape, np.int64),
        }
        if not symmetric:
            parts["weight_zero_point"] = np.ascontiguousarray(words((zeros + half).T, bits).T)
        if ordered:
            parts["weight_g_idx"] = group.astype(np.int32)
        weight = np.empty(shape)
        for column in range(columns):
            g = group[column]
            weight[:, column] = (codes[:, column] - zeros[:, g]) * scales[:, g].astype(np.float64)
        return parts, weight

    return make


def float4(size: int, *, global_scale: bool) -> Maker:
    """nvfp4 with a scale of scales, mxfp4 with powers of two."""

    def make(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
        out, columns = shape
        codes = rng.integers(0, 16, shape)
        octets = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        signs = np.where(codes >= 8, -1.0, 1.0)
        values = np.array([E2M1[code % 8] for code in codes.reshape(-1)]).reshape(shape) * signs
        if global_scale:
            scales = rng.uniform(1, 200, (out, columns // size)).astype(ml_dtypes.float8_e4m3fn)
            whole = np.array([3000.0], np.float32)
            parts = {"weight_packed": octets, "weight_scale": scales, "weight_global_scale": whole}
            return parts, values * wide(scales.astype(np.float64) / 3000.0, 1, size, shape)
        exponents = rng.integers(121, 125, (out, columns // size)).astype(np.uint8)
        parts = {"weight_packed": octets, "weight_scale": exponents}
        return parts, values * wide(2.0 ** (exponents.astype(int) - 127), 1, size, shape)

    return make


def gptq(
    bits: int, size: int, *, symmetric: bool, ordered: bool = False, version: int = 1, biases: bool = False
) -> Maker:
    most = 2**bits - 1

    def make(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
        out, columns = shape
        groups = columns // size if size > 0 else 1
        codes = rng.integers(0, most + 1, (columns, out))
        zeros = np.full((groups, out), (most + 1) // 2) if symmetric else rng.integers(0, most + 1, (groups, out))
        scales = scales_for(rng, (groups, out), most / 2, np.float16)
        group = np.arange(columns) * groups // columns
        group = rng.permutation(group) if ordered else group
        parts = {
            "qweight": np.ascontiguousarray(words(codes.T, bits).T),
            "qzeros": words(zeros, bits) if version == 2 else one_less(words(zeros, bits), bits),
            "scales": scales,
            "g_idx": group.astype(np.int32),
        }
        if biases:
            parts["bias"] = np.zeros(out, np.float16)
        weight = np.empty(shape)
        for column in range(columns):
            g = group[column]
            weight[:, column] = (codes[column] - zeros[g]) * scales[g].astype(np.float64)
        return parts, weight

    return make


def awq(size: int) -> Maker:
    def make(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
        out, columns = shape
        codes, zeros = rng.integers(0, 16, (columns, out)), rng.integers(0, 16, (columns // size, out))
        scales = scales_for(rng, (columns // size, out), 8, np.float16)

        def shuffled(values: Array) -> Array:
            found = np.empty_like(values)
            for first in range(0, values.shape[1], 8):
                for place, output in enumerate(AWQ_ORDER):
                    found[:, first + place] = values[:, first + output]
            return words(found, 4)

        weight = np.empty(shape)
        for column in range(columns):
            g = column // size
            weight[:, column] = (codes[column] - zeros[g]) * scales[g].astype(np.float64)
        return {"qweight": shuffled(codes), "qzeros": shuffled(zeros), "scales": scales}, weight

    return make


# --- bitsandbytes ------------------------------------------------------------------------------------------


def bnb4(kind: str, *, double: bool, block: int = 64, storage: Any = np.uint8) -> Maker:
    table = np.array(NF4 if kind == "nf4" else FP4, np.float32)

    def make(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
        count = shape[0] * shape[1]
        codes = rng.integers(0, 16, count)
        octets = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(shape)}
        blocks = -(-count // block)
        parts: dict[str, Array] = {"weight": octets.view(storage).reshape(-1, 1), "weight.quant_map": table}
        if double:
            inner = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            outer = rng.uniform(0.05, 0.15, -(-blocks // 256)).astype(np.float32)
            stored = rng.integers(0, 256, blocks).astype(np.uint8)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.3}
            absmax = np.array([float(inner[code]) * float(outer[n // 256]) + 0.3 for n, code in enumerate(stored)])
            parts |= {"weight.absmax": stored, "weight.nested_absmax": outer, "weight.nested_quant_map": inner}
        else:
            parts["weight.absmax"] = rng.uniform(0.1, 0.5, blocks).astype(np.float32)
            absmax = parts["weight.absmax"].astype(np.float64)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = text.copy()
        values = np.array([float(table[code]) * absmax[n // block] for n, code in enumerate(codes)])
        return parts, values.reshape(shape)

    return make


def bnb8(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
    codes, scales = rng.integers(-127, 128, shape).astype(np.int8), rng.uniform(0.1, 0.4, shape[0]).astype(np.float32)
    parts = {"weight": codes, "SCB": scales, "weight_format": np.array(0, np.uint8)}
    return parts, codes.astype(np.float64) * scales.astype(np.float64)[:, None] / 127


# --- the table -----------------------------------------------------------------------------------------------


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "observer": "minmax", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def gptq_section(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, **more}


def fp8_section(block: list[int] | None, **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block, **more}


NF4_SECTION = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LAYOUTS: dict[str, Layout] = {
    "fp8-block": Layout(fp8_section([24, 40]), fp8((24, 40))),
    "fp8-block-128": Layout(fp8_section([128, 128]), fp8((128, 128))),
    "fp8-tensor": Layout(fp8_section(None), fp8(None, "weight_scale")),
    "mxfp8": Layout(fp8_section([1, 32], quant_method="mxfp8"), mxfp8),
    "fbgemm-fp8": Layout({"quant_method": "fbgemm_fp8"}, rows_of(float8_codes, np.float32)),
    "ct-fp8-channel": Layout(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
        rows_of(float8_codes, ml_dtypes.bfloat16),
    ),
    "ct-fp8-block": Layout(
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 16]),
        fp8((32, 16), "weight_scale", ml_dtypes.bfloat16),
    ),
    "ct-int8": Layout(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        rows_of(int8_codes, ml_dtypes.bfloat16),
    ),
    "ct-int8-asym": Layout(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        rows_of(int8_codes, np.float32, zeros=True),
    ),
    "ct-int4": Layout(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
        packed(4, 32, symmetric=True),
    ),
    "ct-int4-asym": Layout(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False),
        packed(4, 16, symmetric=False),
    ),
    "ct-int4-ordered": Layout(
        compressed(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=True, actorder="group"
        ),
        packed(4, 16, symmetric=True, ordered=True),
    ),
    "ct-int8-packed": Layout(
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        packed(8, -1, symmetric=True),
    ),
    "ct-nvfp4": Layout(
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        float4(16, global_scale=True),
    ),
    "ct-mxfp4": Layout(
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        float4(32, global_scale=False),
    ),
    "gptq-4": Layout(gptq_section(4, 32), gptq(4, 32, symmetric=True)),
    "gptq-4-asym": Layout(gptq_section(4, 16, sym=False), gptq(4, 16, symmetric=False)),
    "gptq-4-ordered": Layout(gptq_section(4, 16, desc_act=True), gptq(4, 16, symmetric=True, ordered=True)),
    "gptq-4-v2": Layout(
        gptq_section(4, 16, sym=False, checkpoint_format="gptq_v2"), gptq(4, 16, symmetric=False, version=2)
    ),
    "gptq-8": Layout(gptq_section(8, -1, sym=False), gptq(8, -1, symmetric=False)),
    "gptq-2": Layout(gptq_section(2, 32), gptq(2, 32, symmetric=True)),
    "gptq-zero-biases": Layout(gptq_section(4, 32), gptq(4, 32, symmetric=True, biases=True)),
    "awq": Layout({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq(32)),
    "bnb-nf4": Layout(NF4_SECTION, bnb4("nf4", double=False)),
    "bnb-nf4-double": Layout({**NF4_SECTION, "bnb_4bit_use_double_quant": True}, bnb4("nf4", double=True)),
    "bnb-fp4": Layout({**NF4_SECTION, "bnb_4bit_quant_type": "fp4"}, bnb4("fp4", double=False, block=128)),
    "bnb-stored-bf16": Layout(NF4_SECTION, bnb4("nf4", double=False, storage=ml_dtypes.bfloat16)),
    "bnb-int8": Layout({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
}


def quantised_tensors(
    layout: Layout, config: dict[str, Any], seed: int = 7
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What a folder stores, and what its weights mean (float64 where they are quantised), by name."""
    stored, meant = dict[str, Array](), dict[str, Array]()
    for number, (name, values) in enumerate(pico_tensors(config, seed).items()):
        module = name.removesuffix(".weight")
        if not module.endswith(("_proj", "lm_head")) or module.endswith(layout.plain):
            stored[name] = meant[name] = values
            continue
        parts, meant[name] = layout.make(np.random.default_rng([seed, number]), (values.shape[0], values.shape[1]))
        stored |= {f"{module}.{part}": array for part, array in parts.items()}
    return stored, meant


def write_quantised(
    folder: Path,
    name: str,
    family: str = "llama",
    *,
    change: Callable[[dict[str, Array]], Any] | None = None,
    section: dict[str, Any] | None = None,
    plain: tuple[str, ...] | None = None,
    seed: int = 7,
    **changes: Any,
) -> dict[str, Array]:
    """A quantised pico model of a layout; what its weights mean. `change` may edit what is stored; `section` and
    `plain` take the place of the layout's."""
    layout = LAYOUTS[name]
    layout = replace(layout, plain=layout.plain if plain is None else plain)
    config = pico_config(family, **changes)
    stored, meant = quantised_tensors(layout, config, seed)
    if change is not None:
        change(stored)
    folder.mkdir(parents=True, exist_ok=True)
    said = layout.section if section is None else section
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said} if said else config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant
