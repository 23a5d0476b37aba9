# SPDX-License-Identifier: Apache-2.0
"""GPTQ as AutoGPTQ and GPTQModel store it, and AWQ's gemm layout: whole numbers packed into int32, rows side by side.

    weight[o, i] = (q[i, o] − zero[g, o]) · scale[g, o]        g: the group of input channel i

In GPTQ's files q is packed along the input channels, the lowest bits first, and g comes from `g_idx`. Version 1 stores
zero − 1, version 2 ("gptq_v2") zero. AWQ packs q along the output channels, eight in an order of its own, and its
groups are consecutive.
"""

from __future__ import annotations

import numpy as np

from lrconvert.checkpoint.blocks import Array
from lrconvert.checkpoint.quantised.settings import Settings
from lrconvert.checkpoint.quantised.weight import Loaded, Parts, Weight, scaled, unpacked
from lrconvert.errors import InputError, UnsupportedError

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_PARTS = ("qweight", "qzeros", "scales")
WORD = 32  # bits
# Where each of eight neighbouring outputs lies in a word of AWQ's.
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def gptq_settings(settings: Settings) -> None:
    """Refuse by name what the layout below isn't."""
    settings.number("bits", known=(2, 4, 8))
    settings.one_of(("gptq", "gptq_v2"), "checkpoint_format", "format", default="gptq")
    settings.one_of(("int32", "torch.int32"), "pack_dtype", default="int32")
    settings.refuse("is_marlin_format", "adapter", "planar")
    rules = settings.values.get("dynamic") or {}
    if others := [str(rule) for rule in rules if not str(rule).startswith("-:")]:
        raise UnsupportedError(
            f"{settings.where('dynamic')} gives {others[0]!r:.60} settings of its own, which can't be read",
            remedy="Convert the unquantised checkpoint",
        )


def gptq(settings: Settings, parts: Parts) -> Weight:
    """qweight [in · bits / 32, out], qzeros [groups, out · bits / 32], scales [groups, out], g_idx [in]."""
    bits, size = settings.number("bits"), settings.group_size("group_size")
    words, out = parts.matrix("qweight", ("I32",))
    each = WORD // bits
    columns = words * each
    wide = min(size or columns, columns)
    groups = -(-columns // wide)
    parts.take("scales", ("F16", "BF16", "F32"), (groups, out))
    parts.take("qzeros", ("I32",), (groups, -(-out // each)))
    if "g_idx" in parts:
        parts.take("g_idx", ("I32", "I64"), (columns,))
    elif settings.flag("desc_act", False):
        raise InputError(f"{parts.module}.g_idx is missing, and config.json: {settings.key}.desc_act is true")
    version = settings.one_of(("gptq", "gptq_v2"), "checkpoint_format", "format", default="gptq")
    offset = 1 if version == "gptq" else 0

    def load(start: int, stop: int) -> Loaded:
        zeros = _zeros(parts.columns("qzeros", start // each, -(-stop // each)), bits, offset)
        scales = parts.finite("scales", parts.columns("scales", start, stop))
        group = _groups(parts, columns, wide, groups)
        return parts.columns("qweight", start, stop), zeros[:, start % each :], scales, group

    def decode(loaded: Loaded, start: int, stop: int) -> Array:
        packed, zeros, scales, group = loaded
        codes = unpacked(packed[:, start:stop].T, bits)
        return _weights(codes, zeros[:, start:stop], scales[:, start:stop], group)

    kind = f"GPTQ {bits} bits ({f'groups of {size}' if size else 'rows'})"
    return parts.weight(kind, (out, columns), load, decode, banded=True)


def _zeros(packed: Array, bits: int, offset: int) -> Array:
    """Zero points of a group and output, [groups, outputs]. The offset is added to whole words, as GPTQModel does: a
    zero point of 0 was stored as −1 and took a carry from its neighbour."""
    if offset:
        ones = sum(1 << place for place in range(0, WORD, bits))
        packed = packed.view(np.uint32) + np.uint32(ones)  # wraps
    return unpacked(packed, bits)


def _groups(parts: Parts, columns: int, size: int, groups: int) -> Array:
    """The group of every input channel. Raises `InputError` for one that isn't there."""
    if "g_idx" not in parts:
        return np.arange(columns) // size
    found = parts.whole("g_idx").astype(np.int64)
    if odd := found[(found < 0) | (found >= groups)].tolist():
        raise parts.damaged("g_idx", f"names group {odd[0]}; there are {groups}")
    return found


def awq_settings(settings: Settings) -> None:
    """Refuse by name what the layout below isn't."""
    settings.number("bits", "w_bit", known=(4,))
    settings.one_of(("gemm",), "version", "format", default="gemm")
    settings.one_of(("autoawq", "auto"), "backend", default="autoawq")


def awq(settings: Settings, parts: Parts) -> Weight:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""
    bits, size = settings.number("bits", "w_bit"), settings.group_size("group_size", "q_group_size")
    columns, words = parts.matrix("qweight", ("I32",))
    each = WORD // bits
    out = words * each
    wide = min(size or columns, columns)
    groups = -(-columns // wide)
    parts.take("scales", ("F16", "BF16", "F32"), (groups, out))
    parts.take("qzeros", ("I32",), (groups, words))
    group = np.arange(columns) // wide

    def load(start: int, stop: int) -> Loaded:  # bands begin with a word
        scales = parts.finite("scales", parts.columns("scales", start, stop))
        packed = [parts.columns(part, start // each, -(-stop // each)) for part in ("qweight", "qzeros")]
        return packed[0], _in_order(packed[1], bits), scales

    def decode(loaded: Loaded, start: int, stop: int) -> Array:
        packed, zeros, scales = loaded
        first = start // each
        codes = _in_order(packed[:, first : -(-stop // each)], bits)[:, start - first * each :][:, : stop - start]
        return _weights(codes.T, zeros[:, start:stop], scales[:, start:stop], group)

    kind = f"AWQ {bits} bits ({f'groups of {size}' if size else 'rows'})"
    return parts.weight(kind, (out, columns), load, decode, banded=True)


def _in_order(packed: Array, bits: int) -> Array:
    """AWQ's words as the outputs follow each other."""
    codes = unpacked(packed, bits)
    return codes.reshape(len(codes), -1, WORD // bits)[:, :, AWQ_PLACES].reshape(len(codes), -1)


def _weights(codes: Array, zeros: Array, scales: Array, group: Array) -> Array:
    """codes [rows, in]; zeros and scales [groups, rows]; the group of every input channel."""
    return scaled(codes, scales.T[:, group], zeros.T[:, group])
