# SPDX-License-Identifier: Apache-2.0
"""The step to propose after this one, in the user's own words and with an output that nobody has yet."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

MOST_NAME = 80  # characters of a proposed name: models may be called anything
SUFFIXES = {"gguf": ".gguf"}  # of outputs that are files


def free_name(stem: str, suffix: str = "", *taken: str | Path | None) -> str:
    """A name for an output: `stem`, with a number where something of that name lies here or is among `taken`."""
    stem = stem[:MOST_NAME]
    others = {Path(name).resolve() for name in taken if name is not None}
    number, name = 1, f"{stem}{suffix}"
    while Path(name).exists() or Path(name).resolve() in others:
        number += 1
        name = f"{stem}-{number}{suffix}"
    return name


def bake_step(target: str, model: str, stem: str, recipe: str | Path | None = None, *more: str) -> str:
    """The command that bakes `model` into a target, by default with the rotation it carries; `more`: further words."""
    suffix = SUFFIXES.get(target, "")
    name = free_name(Path(stem).name, suffix, model, recipe)
    named = [] if recipe is None else ["--recipe", str(recipe)]
    return shlex.join(["lrconvert", target, model, *named, *more, "-o", name])


def derive_step(model: str, *ratio: str) -> str:
    """The command that makes a recipe which extends `model`."""
    output = free_name("my-recipe")
    return shlex.join(["lrconvert", "recipe", "derive", model, "--method", "yarn", *ratio, "-o", output])


def other_format(targets: Mapping[str, str | None], format: str) -> str | None:
    """The format to propose to a model that is in `format`: one that it can become and isn't yet."""
    own = {"safetensors": "hf"}.get(format, format)
    possible = [name for name in ("gguf", "hf", "onnx") if name in targets and targets[name] is None]
    return next((name for name in possible if name != own), possible[0] if possible else None)
