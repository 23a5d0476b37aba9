# SPDX-License-Identifier: Apache-2.0
"""The registry of targets: every format that a recipe can be baked into, one row each.

    target_of(path).open(path)          an artifact, read back
    bake(get_target("hf").plan(model, recipe, output))

A new target is a folder here and a row in `_MODULES`; `register` adds one from outside the package.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from lrconvert.artifact.target import Target
from lrconvert.errors import UsageError

# Imported when they are needed. A path is shown to them in this order: a folder is a Hugging Face one if it is
# nothing more special.
_MODULES = {"gguf": "lrconvert.targets.gguf", "onnx": "lrconvert.targets.onnx", "hf": "lrconvert.targets.hf"}
_REGISTERED: dict[str, Target[Any]] = {}


def target_names() -> tuple[str, ...]:
    """Registered targets come before the package's own."""
    return (*_REGISTERED, *_MODULES)


def get_target(name: str) -> Target[Any]:
    """The row of a name; `UsageError` for one that isn't known."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _MODULES:
        raise UsageError(f"{name} is not a target", remedy=f"Targets: {', '.join(target_names())}")
    return import_module(_MODULES[name]).TARGET


def all_targets() -> list[Target[Any]]:
    return [get_target(name) for name in target_names()]


def target_of(path: Path) -> Target[Any]:
    """The target of an artifact, by what lies at `path` (or would, by its name)."""
    return next((target for target in all_targets() if target.recognises(path)), get_target("hf"))


def register(target: Target[Any]) -> None:
    """Add a target, or replace one of this name."""
    _REGISTERED[target.name] = target


def unregister(name: str) -> None:
    """Take a registered target away again."""
    _REGISTERED.pop(name, None)
