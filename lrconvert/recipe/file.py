# SPDX-License-Identifier: Apache-2.0
"""Recipes: what to bake. Reading, checking, writing, deriving, and resolving against a model.

The dataclasses below *are* the definition of schema version 1: the reader, the error messages and the
JSON Schema shipped with the package (`data/recipe.schema.json`) all come from them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt, MinLen, MultipleOf

from lrconvert import rope
from lrconvert.data import RECIPES
from lrconvert.errors import EnvironmentFailure, InputError, UsageError
from lrconvert.rope import RopeSpec, Tier
from lrconvert.writing import replace_file

SCHEMA_VERSION = 1
RECIPE_FILE = "recipe.json"
MAX_RECIPE_BYTES = 16 * 2**20
# θ and attention factors that differ by less than this are the same number, written by different programs.
RELATIVE_TOLERANCE = 1e-9

Method = Literal["pi", "ntk", "yarn"]


@dataclass(frozen=True)
class Provenance:
    """How the numbers came to be, and which weights they fit."""

    __pydantic_config__: ClassVar = rope.STRICT

    kind: Literal["derived", "searched", "published", "extended"]
    method: str | None = None  # derived: pi, ntk, yarn; searched: the algorithm
    source: str | None = None  # published: where
    licence: str | None = None
    weights: str | None = None  # the weights that the factors fit, when not simply the base model
    search: dict[str, Any] | None = None  # seed, objective, text digest, evaluations, code version
    stages: tuple[dict[str, Any], ...] = ()  # extended: what each stage did, on what, and what it cost
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Factor sets for one model, ordered by the window they serve. Two tiers are a `longrope` config."""

    __pydantic_config__: ClassVar = rope.STRICT

    schema_version: Literal[1]
    name: Annotated[str, MinLen(1)]
    family: Annotated[str, MinLen(1)]
    original_window: Annotated[int, Ge(2)]
    rope_theta: Annotated[float, Gt(1)]
    rotary_dim: Annotated[int, Ge(2), MultipleOf(2)]
    tiers: Annotated[tuple[Tier, ...], MinLen(1)]
    provenance: Provenance
    base_model: str | None = None
    adapter: str | None = None
    evaluation: dict[str, Any] | None = None

    def problems(self) -> list[str]:
        """What makes the recipe unusable beyond the types of its values, each with its key."""
        names = {"name": self.name, "family": self.family, "base_model": self.base_model, "adapter": self.adapter}
        found = [f"{key} is {name!a}; no name of a file or a model" for key, name in names.items() if _is_odd(name)]
        for index, tier in enumerate(self.tiers):
            key = f"tiers[{index}]"
            if len(tier.factors) != self.rotary_dim // 2:
                found.append(
                    f"{key}.factors has {len(tier.factors)} values; rotary_dim {self.rotary_dim} needs "
                    f"{self.rotary_dim // 2}"
                )
            if tier.max_length < self.original_window:
                found.append(
                    f"{key}.max_length is {tier.max_length}; at least the original window, "
                    f"{self.original_window}, is needed"
                )
            if index and tier.max_length <= self.tiers[index - 1].max_length:
                found.append(
                    f"{key}.max_length is {tier.max_length}; tiers are ordered, so more than "
                    f"{self.tiers[index - 1].max_length} is needed"
                )
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """One line of a list of recipes."""
        return {
            "family": self.family,
            "original_window": self.original_window,
            "window": self.tiers[-1].max_length,
            "tiers": len(self.tiers),
            "kind": self.provenance.kind,
            "method": self.provenance.method,
        }

    def warnings(self) -> list[str]:
        """What is unusual but occurs in published models."""
        found = []
        for index, tier in enumerate(self.tiers):
            key, factors = f"tiers[{index}]", np.asarray(tier.factors)
            drops = np.flatnonzero(np.diff(factors) < 0) + 1
            if drops.size:
                found.append(f"{key}.factors: not monotone, drops at index {_listed(drops.tolist())}")
            below = np.flatnonzero(factors < 1)
            if below.size:
                found.append(f"{key}.factors: below 1 at index {_listed(below.tolist())}")
            if tier.start_tokens >= tier.max_length:
                found.append(f"{key}.start_tokens: covers the whole window, so nothing is scaled")
        return found

    def to_json(self) -> str:
        """The recipe file's text; floats with repr precision, so that reading it back is exact."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        values["provenance"] = {key: value for key, value in values["provenance"].items() if value not in (None, ())}
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _is_odd(name: str | None) -> bool:
    """Whether it has control characters: a NUL is in no path, and others write over a terminal."""
    return name is not None and any(ord(letter) < 32 or ord(letter) == 127 for letter in name)


def _listed(values: list[int], most: int = 8) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")


# --- reading ---------------------------------------------------------------------------------------------


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter  # a tenth of a second: only when a recipe is read

    return TypeAdapter(Recipe)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the recipe file, generated from the dataclasses above."""
    schema = _adapter().json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "lrconvert recipe, schema version 1",
    }


def parse_recipe(text: str | bytes, where: object = "recipe") -> Recipe:
    """A checked recipe from the text of a recipe file.

    Raises `InputError` (exit code 3) with all problems: key, what was found, what is needed.
    """
    from pydantic import ValidationError

    try:
        recipe = _adapter().validate_json(text)
    except ValidationError as error:
        # A tuple whose items are wrong is reported as too short as well: that would only repeat it.
        items = [item for item in error.errors() if not (item["type"] == "too_short" and item["input"])]
        raise InputError.collect(where, [_problem(item) for item in items]) from None
    if problems := recipe.problems():
        raise InputError.collect(where, problems)
    return recipe


def _problem(error: Any) -> str:
    """One line for a pydantic error: key, found, needed."""
    key = ""
    for part in error["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    kind, found = error["type"], error["input"]
    if kind == "json_invalid":
        return f"not JSON: {error['msg'].removeprefix('Invalid JSON: ')}"
    if kind == "missing":
        return f"{key} is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key}"
    shown = repr(found)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{key or 'the file'} is {shown}; {error['msg'][0].lower()}{error['msg'][1:]}"


def read_bounded(path: Path, limit: int = MAX_RECIPE_BYTES) -> bytes:
    """The file's bytes, if it is a readable file of at most `limit` bytes; `InputError` otherwise."""
    try:
        if path.stat().st_size > limit:
            raise InputError(f"{path}: {path.stat().st_size} bytes; at most {limit} are read")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error


def load_recipe(reference: str | Path) -> Recipe:
    """A recipe by file, by folder with a recipe.json, or by the name of one that is shipped."""
    path = _recipe_path(reference)
    return parse_recipe(read_bounded(path), path)


def recipe_folder(reference: str | Path) -> Path:
    """The folder that holds a recipe, to which its `adapter` is relative."""
    return _recipe_path(reference).parent


def find_recipe(reference: str | Path) -> Path | None:
    """The file of a recipe: that file, the one in a folder, or a shipped one by name. None where there is none."""
    path = Path(reference)
    try:
        if not path.exists() and str(reference) in shipped_recipes():
            path = shipped_recipes()[str(reference)]
        if path.is_dir():
            path = path / RECIPE_FILE
        return path if path.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _recipe_path(reference: str | Path) -> Path:
    if (path := find_recipe(reference)) is None:
        raise InputError(
            f"{reference}: no such recipe file, folder or shipped recipe",
            remedy=f"Shipped: {', '.join(sorted(shipped_recipes())) or 'none'}; see `lrconvert recipe list`",
        )
    return path


def check_output(output: Path, *, force: bool = False) -> Path:
    """The file that a recipe for `output` is written to; refuses what `write_recipe` would refuse.

    Raises `UsageError` for a file that exists without `force`, and for a folder's name that is a file; `InputError` for
    a file that is not a recipe: it is never replaced.
    """
    if output.suffix != ".json" and output.is_file():
        raise UsageError(f"{output} is a file", remedy="Name a folder, or a file that ends in .json")
    path = output if output.suffix == ".json" else output / RECIPE_FILE
    if path.exists():
        if not force:
            raise UsageError(f"{path} exists", remedy="Choose another name, or replace it with --force")
        load_recipe(path)
    return path


def write_recipe(recipe: Recipe, output: Path, *, force: bool = False) -> Path:
    """Write `output` (a .json file, or a folder for recipe.json), whole or not at all; the file's path.

    Raises as `check_output`, and `EnvironmentFailure` where nothing can be written.
    """
    path = check_output(output, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, recipe.to_json())
    except OSError as error:
        raise EnvironmentFailure(f"{path}: can't be written ({error.strerror or error})") from error
    return path


def shipped_recipes() -> dict[str, Path]:
    """Name and recipe file of every recipe that comes with lrconvert."""
    return recipes_in(RECIPES)


def recipes_in(folder: Path) -> dict[str, Path]:
    """Name and recipe file of every folder in `folder` that has one, in order."""
    return {path.parent.name: path for path in sorted(folder.glob(f"*/{RECIPE_FILE}"))}


# --- resolving -------------------------------------------------------------------------------------------


def resolve(recipe: Recipe, *, family: str, rotary_dim: int, theta: float, window: int | None = None) -> RopeSpec:
    """The recipe against a model, once; `window` (tokens) may cut it short.

    Raises `InputError` when the recipe is for another model, naming both values of all that differs, and
    `UsageError` for a window that the recipe does not reach.
    """
    pairs = [
        ("family", recipe.family, family, recipe.family == family),
        ("rotary dimension", recipe.rotary_dim, rotary_dim, recipe.rotary_dim == rotary_dim),
        (
            "rope_theta",
            recipe.rope_theta,
            theta,
            abs(recipe.rope_theta - theta) <= RELATIVE_TOLERANCE * abs(theta),
        ),
    ]
    if differs := [f"{what} {wants} in the recipe, {has} in the model" for what, wants, has, ok in pairs if not ok]:
        raise InputError.collect(f"recipe {recipe.name} is for another model", differs)
    last = recipe.tiers[-1].max_length
    window = last if window is None else window
    if window > last:
        raise UsageError(
            f"--window {window} is beyond the recipe's last tier, {last}",
            remedy=f"Use at most {last}, or search for a longer recipe",
        )
    if window < recipe.original_window:
        raise UsageError(
            f"--window {window} is below the original window, {recipe.original_window}",
            remedy="The model reaches that far without a recipe",
        )
    serving = next(index for index, tier in enumerate(recipe.tiers) if tier.max_length >= window)
    tiers = recipe.tiers[: serving + 1]
    tiers = (*tiers[:-1], dataclasses.replace(tiers[-1], max_length=window))
    return RopeSpec(family, rotary_dim, float(theta), recipe.original_window, window, tiers)
