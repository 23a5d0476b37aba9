# SPDX-License-Identifier: Apache-2.0
"""The names of float types: f32, bf16 and f16 are float32, bfloat16 and float16. Options take both."""

from __future__ import annotations

from lrconvert.errors import UsageError

LONG = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_SHORT = {long: short for short, long in LONG.items()}


def short_name(name: str) -> str:
    """f32 of float32; any other name stays as it is."""
    return _SHORT.get(name, name)


def long_name(name: str, option: str = "dtype") -> str:
    """float32 of f32 or float32. `UsageError` for what is neither of the three."""
    if (found := LONG.get(short_name(name))) is None:
        raise UsageError(f"{option} {name!r} is none of {', '.join((*LONG, *_SHORT))}")
    return found


ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
