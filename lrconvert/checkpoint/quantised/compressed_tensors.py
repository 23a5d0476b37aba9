# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors (llm-compressor): a format of the file, and a scheme of the weights for groups of modules.

    weight = (code − zero) · scale        of the tensor, row, group of columns or block that the code is in

Codes are float8 or int8 as they are; int4 and int8 packed into int32 along the input channels, the lowest bits first
and 2^(bits − 1) added; or two E2M1 in a byte, the lower four bits first (nvfp4: the scale is float8 and divided by a
global one; mxfp4: the scale is a power of two).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lrconvert.checkpoint.blocks import Array
from lrconvert.checkpoint.quantised.fp8 import scale_rows
from lrconvert.checkpoint.quantised.settings import Settings
from lrconvert.checkpoint.quantised.weight import (
    EXPONENTS,
    FLOAT4,
    FLOATS,
    FP8,
    Loaded,
    Parts,
    Weight,
    float8,
    scaled,
    spread,
    unpacked,
)
from lrconvert.errors import InputError, UnsupportedError

G_IDX = "weight_g_idx"
PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    G_IDX,
    "weight_shape",
    "weight_global_scale",
)
PLAIN = ("dense", "fakequant")
CODES = {  # dtypes of codes that aren't packed
    "int-quantized": ("I8",),
    "float-quantized": FP8,
    "mxfp8-quantized": FP8,
    "naive-quantized": (*FP8, "I8"),
}
FORMATS = (*CODES, "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are stored. `block`: rows and columns that share a scale, None for all."""

    targets: tuple[str, ...]
    format: str
    bits: int
    strategy: str
    block: tuple[int | None, int | None]
    symmetric: bool

    @property
    def words(self) -> str:
        """For people: "blocks of 128 x 128"."""
        tall, wide = self.block
        named = {"tensor": "tensors", "channel": "rows", "block": f"blocks of {tall} x {wide}"}
        return named.get(self.strategy, f"groups of {wide}")


def check(settings: Settings) -> None:
    """Refuse by name what isn't read. Transforms are rotations that the model computes as it runs."""
    _ = schemes(settings)
    if (sparsity := settings.inner("sparsity_config")) and sparsity.values.get("format") not in (None, *PLAIN):
        raise UnsupportedError(
            f"{sparsity.where('format')} is {sparsity.values['format']!r:.60}: sparse weights can't be read",
            remedy="Convert the unquantised checkpoint",
        )
    if (transform := settings.inner("transform_config")) and transform.values:
        settings.refuse("transform_config")


def schemes(settings: Settings) -> tuple[Scheme, ...]:
    """The schemes of `config_groups`, those with weights."""
    found = []
    groups = settings.inner("config_groups")
    overall = settings.one_of((*FORMATS, *PLAIN, "mixed-precision"), "format", default="dense")
    for name in groups.values if groups else ():
        group = groups.inner(name) if groups else None
        if group is not None and (weights := group.inner("weights")) is not None:
            found.append(_scheme(group, weights, overall))
    if not found:
        raise InputError(f"{settings.where('config_groups')} is missing: it says how weights are stored")
    return tuple(found)


def _scheme(group: Settings, weights: Settings, overall: str) -> Scheme:
    format = group.one_of((*FORMATS, *PLAIN), "format", default=overall if overall != "mixed-precision" else "")
    grouped = weights.group_size("group_size") is not None
    fallback = "group" if grouped else "channel" if weights.values.get("group_size") else "tensor"
    strategy = weights.one_of(STRATEGIES, "strategy", default=fallback)
    kind = weights.one_of(("int", "float"), "type", default="int")
    bits = weights.number("num_bits", known=(4, 8), default=8)
    whole = format in ("int-quantized", "pack-quantized")
    if format in FORMATS and format != "naive-quantized" and (kind == "int") != whole:
        raise InputError(f"{weights.where('type')} is {kind!r}; that is not how {format} stores weights")
    block: tuple[int | None, int | None] = {"tensor": (None, None), "channel": (1, None)}.get(strategy, (1, None))
    if strategy in ("group", "tensor_group"):
        block = (1, weights.group_size("group_size"))
    elif strategy == "block":
        block = weights.pair("block_structure") or (0, 0)
        if block == (0, 0):
            raise InputError(f"{weights.where('block_structure')} is missing")
    targets = group.values.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{group.where('targets')} is {targets!r:.60}; a list of names is needed")
    return Scheme(tuple(targets), format, bits, strategy, block, weights.flag("symmetric", True))


def scheme_of(module: str, found: tuple[Scheme, ...]) -> Scheme:
    """The scheme of a module: by its name, then by a pattern, then by its class. Raises `InputError` for none."""
    if len({(s.format, s.bits, s.strategy, s.block, s.symmetric) for s in found}) == 1:
        return found[0]
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and _matches(target[3:], module),
        lambda target: target == kind,
    )
    for test in tests:
        for scheme in found:
            if any(test(target) for target in scheme.targets):
                return scheme
    raise InputError(f"{module} is quantised, and no target of config_groups in config.json names it")


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise InputError(f"config.json: config_groups has the target re:{pattern:.60}, no pattern ({error})") from error


def weight(settings: Settings, parts: Parts) -> Weight:
    """By the format of the module's scheme."""
    scheme = scheme_of(parts.module, schemes(settings))
    if scheme.format in PLAIN:
        raise InputError(f"{parts.module} is quantised; config.json says that the format is {scheme.format!r}")
    maker: Mapping[str, Callable[[Scheme, Parts], Weight]] = {
        "pack-quantized": _packed,
        "nvfp4-pack-quantized": _float4,
        "mxfp4-pack-quantized": _float4,
    }
    return maker.get(scheme.format, _plain)(scheme, parts)


def _grid(scheme: Scheme, shape: tuple[int, int]) -> tuple[tuple[int, int], list[tuple[int, ...]]]:
    """The block that shares a scale, and the shapes that the scales may have."""
    tall, wide = (min(side or whole, whole) for side, whole in zip(scheme.block, shape, strict=True))
    grid = (-(-shape[0] // tall), -(-shape[1] // wide))
    shapes: list[tuple[int, ...]] = [grid]
    shapes += [(), (1,)] if grid == (1, 1) else [(grid[0],)] if grid[1] == 1 else []
    return (tall, wide), shapes


def _plain(scheme: Scheme, parts: Parts) -> Weight:
    """Codes as they are: float8, or int8."""
    shape = parts.matrix("weight", CODES[scheme.format])
    block, shapes = _grid(scheme, shape)
    parts.take("weight_scale", EXPONENTS if scheme.format == "mxfp8-quantized" else FLOATS, *shapes)
    has_zeros = "weight_zero_point" in parts
    if has_zeros:
        parts.take("weight_zero_point", ("I8", *FP8), *shapes)
    elif not scheme.symmetric:
        parts.info("weight_zero_point")
    _check_order(parts, block, shape[1])

    def load(start: int, stop: int) -> Loaded:
        codes = parts.rows("weight", start, stop)
        return (
            float8(codes) if codes.dtype != np.int8 else codes,
            _spread(parts, "weight_scale", block, shape[1], start, stop),
            _spread(parts, "weight_zero_point", block, shape[1], start, stop) if has_zeros else np.zeros((1, 1)),
        )

    word = "int8" if parts.info("weight").dtype == "I8" else "fp8"
    return parts.weight(f"compressed-tensors {word} ({scheme.words})", shape, load, _decode)


def _decode(loaded: Loaded, start: int, stop: int) -> Array:
    codes, scales, zeros = loaded
    return scaled(codes[start:stop], _some(scales, start, stop), _some(zeros, start, stop))


def _some(values: Array, start: int, stop: int) -> Array:
    return values if len(values) == 1 else values[start:stop]


def _spread(parts: Parts, part: str, block: tuple[int, int], columns: int, start: int, stop: int) -> Array:
    """Scales or zero points of some rows, one for every column or for all of them."""
    if G_IDX not in parts:
        return scale_rows(parts, part, block, columns, start, stop)
    across = -(-columns // block[1])
    found = parts.finite(part, parts.flat(part, start * across, (stop - start) * across))
    return found.reshape(-1, across)[:, _order(parts, block[1], columns)]


def _order(parts: Parts, wide: int, columns: int) -> Array:
    """The group of every column: those that GPTQ chose, or consecutive ones, for which some files say −1."""
    found, groups = parts.whole(G_IDX).astype(np.int64), -(-columns // wide)
    if (found == -1).all():
        return np.arange(columns) // wide
    if odd := found[(found < 0) | (found >= groups)].tolist():
        raise parts.damaged(G_IDX, f"names group {odd[0]}; there are {groups}")
    return found


def _check_order(parts: Parts, block: tuple[int, int], columns: int) -> None:
    if G_IDX in parts:
        parts.take(G_IDX, ("I32", "I64"), (columns,))
        if block[0] != 1:
            raise InputError(f"{parts.module} has an order of its columns, and its scales are not those of groups")


def _packed(scheme: Scheme, parts: Parts) -> Weight:
    """weight_packed [out, in · bits / 32], weight_shape [2]; zero points are packed along the output channels."""
    bits = scheme.bits
    out, words = parts.matrix("weight_packed", ("I32",))
    parts.take("weight_shape", ("I64", "I32"), (2,))
    stated = tuple(int(value) for value in parts.whole("weight_shape"))
    if stated[0] != out or not 0 <= stated[1] <= words * 32 // bits or -(-stated[1] * bits // 32) != words:
        raise InputError(
            f"{parts.info('weight_packed').file.name}: {parts.names['weight_packed']} has shape {[out, words]}; "
            f"weight_shape {list(stated)} in {bits} bits needs {[stated[0], -(-stated[1] * bits // 32)]}"
        )
    shape = (out, stated[1])
    block, shapes = _grid(scheme, shape)
    parts.take("weight_scale", FLOATS, *shapes)
    has_zeros = not scheme.symmetric or "weight_zero_point" in parts
    if has_zeros:
        parts.take("weight_zero_point", ("I32",), (-(-out * bits // 32), shapes[0][1]))
    _check_order(parts, block, shape[1])
    each = 32 // bits

    def load(start: int, stop: int) -> Loaded:
        codes = unpacked(parts.rows("weight_packed", start, stop), bits)[:, : shape[1]]
        scales = _spread(parts, "weight_scale", block, shape[1], start, stop)
        if not has_zeros:
            return codes, scales, np.full((1, 1), 2 ** (bits - 1))
        found = unpacked(parts.rows("weight_zero_point", start // each, -(-stop // each)).T, bits).T
        zeros = found[start % each :][: stop - start]
        if G_IDX in parts:
            return codes, scales, zeros[:, _order(parts, block[1], shape[1])]
        return codes, scales, spread(zeros, block[1], shape[1])

    kind = f"compressed-tensors int{bits} ({scheme.words})"
    return parts.weight(kind, shape, load, _decode)


def _float4(scheme: Scheme, parts: Parts) -> Weight:
    """weight_packed [out, in / 2], scales of groups; nvfp4 with a scale of scales."""
    nvfp4 = scheme.format == "nvfp4-pack-quantized"
    out, octets = parts.matrix("weight_packed", ("U8",))
    shape = (out, 2 * octets)
    block, shapes = _grid(scheme, shape)
    parts.take("weight_scale", FP8 if nvfp4 else EXPONENTS, *shapes)
    if nvfp4:
        parts.take("weight_global_scale", FLOATS, (), (1,))

    def load(start: int, stop: int) -> Loaded:
        codes = FLOAT4[unpacked(parts.rows("weight_packed", start, stop), 4)]
        scales = scale_rows(parts, "weight_scale", block, shape[1], start, stop)
        if nvfp4:
            whole = parts.finite("weight_global_scale", parts.flat("weight_global_scale", 0, 1))
            if whole[0] == 0:
                raise parts.damaged("weight_global_scale", "is 0")
            scales = scales / whole
        return codes, scales, np.zeros((1, 1))

    return parts.weight(f"compressed-tensors {'nvfp4' if nvfp4 else 'mxfp4'} ({scheme.words})", shape, load, _decode)
