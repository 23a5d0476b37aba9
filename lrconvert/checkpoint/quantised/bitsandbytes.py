# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' files: 4 bits (nf4 and fp4) in flat blocks, and 8 bits in rows.

    4 bits: weight[n] = quant_map[code n] · absmax[n / blocksize]       the higher four bits of a byte come first
    8 bits: weight[o, i] = code[o, i] · SCB[o] / 127

With double quantisation absmax is 8-bit codes of its own: nested_quant_map[code] · nested_absmax[block] + an offset.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from lrconvert.checkpoint.blocks import Array
from lrconvert.checkpoint.quantised.settings import Settings
from lrconvert.checkpoint.quantised.weight import Loaded, Parts, Weight, scaled
from lrconvert.errors import InputError, UnsupportedError

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
PARTS = ("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map", *NESTED, *STATES)
STORAGE = ("U8", "I8", "BF16", "F16", "F32")  # bnb_4bit_quant_storage: bytes under any name
MOST_STATE = 4096  # bytes of a quant_state


def weight(settings: Settings, parts: Parts) -> Weight:
    """By the parts that are there: an 8-bit weight has SCB, a 4-bit one absmax and a state."""
    if "SCB" in parts:
        return _eight(parts)
    return _four(parts)


def _eight(parts: Parts) -> Weight:
    out, columns = parts.matrix("weight", ("I8",))
    parts.take("SCB", ("F32", "F16", "BF16"), (out,), (out, 1))
    if "weight_format" in parts:
        parts.take("weight_format", ("U8", "I8", "I32", "I64"), (), (1,))
        layout = int(parts.flat("weight_format", 0, 1)[0])
        if layout != 0:
            raise UnsupportedError(
                f"{parts.module}.weight_format is {layout}; rows (0) can be read",
                remedy="Save the model again with a current bitsandbytes",
            )

    def load(start: int, stop: int) -> Loaded:
        scale = parts.finite("SCB", parts.flat("SCB", start, stop - start))
        return parts.rows("weight", start, stop), scale[:, None]

    return parts.weight("bitsandbytes int8", (out, columns), load, _decode_eight)


def _decode_eight(loaded: Loaded, start: int, stop: int) -> Array:
    codes, scales = loaded
    return scaled(codes[start:stop], scales[start:stop]) * np.float32(1 / 127)


def _four(parts: Parts) -> Weight:
    state, shape = _state(parts)
    count = math.prod(shape)
    block = min(state["blocksize"], count)
    packed = parts.take("weight", STORAGE)
    if packed.nbytes != (needed := -(-count // 2)):
        raise InputError(
            f"{packed.file.name}: {packed.name} has {packed.nbytes} bytes; {needed} are needed for {list(shape)}"
        )
    blocks = -(-count // block)
    parts.take("weight.quant_map", ("F32",), (16,))
    nested = any(name in parts for name in NESTED) or parts.info("weight.absmax").dtype == "U8"
    parts.take("weight.absmax", ("U8",) if nested else ("F32", "F16", "BF16"), (blocks,))
    if nested:
        inner, offset = min(_number(parts, state, "nested_blocksize"), blocks), state.get("nested_offset")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise InputError(f"{parts.module}: its quant_state has nested_offset {offset!r:.40}; a number is needed")
        parts.take("weight.nested_absmax", ("F32",), (-(-blocks // inner),))
        parts.take("weight.nested_quant_map", ("F32",), (256,))
    columns = shape[1]

    def load(start: int, stop: int) -> Loaded:
        first, last = start * columns, stop * columns
        codes = _nibbles(parts.octets("weight", first // 2, -(-last // 2) - first // 2), first % 2, last - first)
        scales = _absmax(parts, state if nested else None, first // block, -(-last // block))
        table = parts.finite("weight.quant_map", parts.whole("weight.quant_map"))
        values = table[codes] * scales[np.arange(first, last) // block - first // block]
        return (values.reshape(stop - start, columns),)

    kind = f"bitsandbytes {state['quant_type']} (blocks of {block}{', double' if nested else ''})"
    return parts.weight(kind, shape, load, _decoded)


def _decoded(loaded: Loaded, start: int, stop: int) -> Array:
    return loaded[0][start:stop]


def _nibbles(octets: Array, skip: int, count: int) -> Array:
    """Codes of 4 bits, the higher of a byte first; the first of them may be skipped."""
    pairs = np.stack([octets >> 4, octets & 15], axis=1)
    return pairs.reshape(-1)[skip : skip + count]


def _absmax(parts: Parts, nested: dict[str, Any] | None, first: int, last: int) -> Array:
    """The scales of blocks `first` to `last`, float32."""
    stored = parts.flat("weight.absmax", first, last - first)
    if nested is None:
        return parts.finite("weight.absmax", stored)
    inner = min(nested["nested_blocksize"], parts.info("weight.absmax").shape[0])
    start = first // inner
    scales = parts.finite(NESTED[0], parts.flat(NESTED[0], start, -(-last // inner) - start))
    table = parts.finite(NESTED[1], parts.whole(NESTED[1]))
    return table[stored] * scales[np.arange(first, last) // inner - start] + np.float32(nested["nested_offset"])


def _state(parts: Parts) -> tuple[dict[str, Any], tuple[int, int]]:
    """What bitsandbytes keeps beside a 4-bit weight, a JSON text in bytes, and the weight's shape."""
    there = [name for name in STATES if name in parts]
    if len(there) != 1:
        parts.info(STATES[0])
        raise InputError(f"{parts.module} has two states: {' and '.join(there)}")
    info = parts.take(there[0], ("U8",))
    where = f"{info.file.name}: {info.name}"
    try:
        state = json.loads(parts.flat(there[0], 0, min(info.nbytes, MOST_STATE)).tobytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from error
    if not isinstance(state, dict) or state.get("quant_type") != there[0].rpartition("__")[2]:
        raise InputError(f"{where} does not say quant_type {there[0].rpartition('__')[2]!r}")
    _number(parts, state, "blocksize")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(item) is int and item > 0 for item in shape):
        raise InputError(f"{where} has shape {shape!r:.60}; two whole numbers are needed")
    return state, (shape[0], shape[1])


def _number(parts: Parts, state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"{parts.module}: its quant_state has {key} {value!r:.40}; a whole number is needed")
    return value
