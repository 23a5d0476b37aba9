# SPDX-License-Identifier: Apache-2.0
"""The model families, found by file name: `families/<model_type>.py` defines `FAMILY`."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from lrconvert.errors import UnsupportedError
from lrconvert.families.base import (
    NOT_READ,
    ExpectedTensor,
    Family,
    Key,
    ModelShape,
    TensorRow,
    expected_tensors,
)
from lrconvert.families.reading import read_shape, rope_section, with_defaults

__all__ = [
    "ExpectedTensor",
    "Family",
    "Key",
    "ModelShape",
    "TensorRow",
    "expected_tensors",
    "family_names",
    "get_family",
    "longrope_architecture",
    "read_shape",
    "rope_section",
    "with_defaults",
]


# Modules here that are no family.
HELPERS = ("base", "experts", "keys", "layers", "multipliers", "parts", "query_scale", "reading")


def family_names() -> list[str]:
    """Names of all families, sorted."""
    return list(_names_in(*__path__))


@cache
def _names_in(*folders: str) -> tuple[str, ...]:
    """Asked for every file that is opened; the folders are listed once."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folders) if module.name not in HELPERS))


def get_family(model_type: object) -> Family:
    """The family of a config's `model_type`; `UnsupportedError` (exit code 4) lists those that exist."""
    if model_type not in family_names():
        why = f": it {NOT_READ[model_type]}" if isinstance(model_type, str) and model_type in NOT_READ else ""
        raise UnsupportedError(
            f"model_type {model_type!r} is not a family that lrconvert reads{why}",
            remedy=f"Families: {', '.join(family_names())}",
        )
    return import_module(f"{__name__}.{model_type}").FAMILY


def longrope_architecture(family: Family) -> str:
    """The GGUF architecture to write for a family. Raises `UnsupportedError` that lists the families for which
    there is one."""
    if family.gguf_longrope is not None:
        return family.gguf_longrope
    working = [name for name in family_names() if get_family(name).gguf_longrope]
    raise UnsupportedError(
        f"llama.cpp's C++ ignores rope factors for {family.name}: a GGUF of it would run unscaled",
        remedy=f"GGUF works for {', '.join(working)}; for {family.name} use `lrconvert hf`",
    )
