# SPDX-License-Identifier: Apache-2.0
"""fp8 as transformers' `fp8` and `mxfp8`, and FBGEMM's checkpoints, store it: float8 values, and a scale that they are
multiplied with, for each block, row or tensor.

`weight_scale_inv` is multiplied too: its name comes from DeepSeek's files. A block at an edge is cut off, not smaller.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from lrconvert.checkpoint.blocks import Array
from lrconvert.checkpoint.quantised.settings import Settings
from lrconvert.checkpoint.quantised.weight import EXPONENTS, FLOATS, FP8, Loaded, Parts, Weight, float8, scaled, spread
from lrconvert.errors import InputError

SCALES = ("weight_scale_inv", "weight_scale")
PARTS = ("weight", *SCALES)


def weight(settings: Settings, parts: Parts) -> Weight:
    """[out, in] of float8, with a scale for the blocks that the config names, else for rows or the whole."""
    out, columns = parts.matrix("weight", FP8)
    there = [name for name in SCALES if name in parts]
    if len(there) > 1:
        raise InputError(f"{parts.module} has {' and '.join(there)}: which of them counts isn't known")
    scale = there[0] if there else SCALES[0]
    stated = settings.pair("weight_block_size")
    if stated is not None:
        tall, wide = block = min(stated[0], out), min(stated[1], columns)
        parts.take(scale, (*FLOATS, *EXPONENTS), (-(-out // tall), -(-columns // wide)))
        kind = "fp8 (blocks of {} x {})".format(*stated)
        return parts.weight(kind, (out, columns), partial(grid_rows, parts, scale, block, columns), decode)
    info, rows, single = parts.info(scale), ((out, 1), (out,)), ((), (1,), (1, 1))
    if len(info.shape) == 2 and info.shape not in (*rows, *single):
        raise InputError(
            f"{info.file.name}: {info.name} has shape {list(info.shape)}, scales of blocks, and config.json has no "
            f"{settings.key}.weight_block_size"
        )
    parts.take(scale, FLOATS, *rows, *single)
    block = (1, columns) if info.shape in rows else (out, columns)
    kind = f"fp8 ({'rows' if info.shape in rows else 'tensors'})"
    return parts.weight(kind, (out, columns), partial(grid_rows, parts, scale, block, columns), decode)


def grid_rows(parts: Parts, scale: str, block: tuple[int, int], columns: int, start: int, stop: int) -> Loaded:
    """Rows of codes, and the scales of each: [rows, groups]. `scale` has one for every block, as a matrix or flat."""
    return parts.rows("weight", start, stop), scale_rows(parts, scale, block, columns, start, stop)


def scale_rows(parts: Parts, scale: str, block: tuple[int, int], columns: int, start: int, stop: int) -> Array:
    """The scales of rows `start` to `stop`, spread over the columns: [rows, columns], or [rows, 1] for whole rows."""
    tall, wide = block
    across = -(-columns // wide)
    first, last = start // tall, -(-stop // tall)
    read = parts.flat(scale, first * across, (last - first) * across)
    values = parts.finite(scale, read).reshape(last - first, across)
    return spread(values[np.arange(start, stop) // tall - first], wide, columns)


def decode(loaded: Loaded, start: int, stop: int) -> Array:
    codes, scales = loaded
    return scaled(float8(codes[start:stop]), scales[start:stop])
