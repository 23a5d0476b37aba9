# SPDX-License-Identifier: Apache-2.0
"""Recipes from what others published: configs, LongRoPE's CSV tables, factor files, GGUF files.

A source is recognised by what it holds, not by options. Several sources become the tiers of one recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le

from lrconvert import rope
from lrconvert.checkpoint import GGUF_MAGIC, first_bytes, locate_config, names_hub_id, open_checkpoint, read_json
from lrconvert.checkpoint.folder import CONFIG
from lrconvert.checkpoint.other_configs import familiar, text_part
from lrconvert.checkpoint.rope_config import FoundRope, read_rope
from lrconvert.errors import InputError, UsageError, first_problem
from lrconvert.families import Family, ModelShape, family_names, get_family, read_shape
from lrconvert.families.parts import is_larger, language_config
from lrconvert.recipe import (
    MAX_RECIPE_BYTES,
    RECIPE_FILE,
    SCHEMA_VERSION,
    Provenance,
    Recipe,
    find_recipe,
    load_recipe,
    parse_recipe,
    read_bounded,
    shipped_recipes,
)
from lrconvert.recipe.models import portable_name
from lrconvert.rope import FACTORS, Tier

_READ: Any = {"strict": True, "allow_inf_nan": False}
MAX_DIMENSION = 65_536  # of a head in a factor file
_LENGTH_IN_NAME = re.compile(r"^(?:ft_[a-z0-9]+_)?(\d+)k", re.IGNORECASE)


@dataclass(frozen=True)
class Base:
    """What tables of factors leave out about their model; None: not known."""

    family: str | None = None
    theta: float | None = None
    original_window: int | None = None
    model: str | None = None
    window: int | None = None  # up to where a config's rotation serves, where it doesn't say or says otherwise
    rotary_dim: int | None = None


@dataclass(frozen=True)
class _Piece:
    """What one source holds."""

    base: Base
    rotary_dim: int
    tiers: tuple[Tier, ...]
    source: str
    licence: str | None = None
    notes: tuple[str, ...] = ()
    formula: bool = False  # attention factors were not published: LongRoPE's formula, tier by tier


def import_recipe(
    sources: Sequence[str], given: Base | None = None, name: str | None = None
) -> tuple[Recipe, list[str]]:
    """One recipe from one or more sources, and notes on what was assumed. `given` overrides the sources.

    A CSV source may be followed by `=LENGTH`, the window it serves. Raises `InputError` for sources that can't
    be read or don't fit together, `UsageError` when an option is needed.
    """
    given = given or Base()
    if given.model is not None:
        given = _completed(given)
    pieces = [_read(source, given) for source in sources]
    base = _agreed(pieces, given)
    missing = [
        option
        for option, value in (
            ("--family", base.family),
            ("--theta", base.theta),
            ("--original-window", base.original_window),
        )
        if value is None
    ]
    if missing:
        raise UsageError(
            f"{', '.join(sources)}: does not say {' and '.join(missing)}",
            remedy="Give these options, or name the model with --model",
        )
    assert base.family is not None and base.theta is not None and base.original_window is not None
    tiers = _ordered(pieces, base.original_window)
    notes = [note for piece in pieces for note in piece.notes]
    if base.family not in family_names():
        notes.append(f"family {base.family}: this lrconvert can't convert models of it yet")
    licences = sorted({piece.licence for piece in pieces if piece.licence})
    recipe = Recipe(
        schema_version=SCHEMA_VERSION,
        name=name or _name_of(sources, base),
        family=base.family,
        base_model=base.model,
        original_window=base.original_window,
        rope_theta=base.theta,
        rotary_dim=pieces[0].rotary_dim,
        tiers=tiers,
        provenance=Provenance(
            kind="published",
            source="; ".join(dict.fromkeys(piece.source for piece in pieces)),
            licence="; ".join(licences) or None,
            notes=tuple(notes),
        ),
    )
    try:
        return parse_recipe(recipe.to_json(), ", ".join(sources)), notes  # nothing that no recipe may hold
    except ValueError as error:  # a number that JSON has no word for
        raise InputError(f"{', '.join(sources)}: {error}") from error


def open_recipe(reference: str | Path) -> tuple[Recipe, Path, list[str]]:
    """What `--recipe` names: the recipe, the folder that its adapter is relative to, and notes on what was assumed.

    A recipe file, a folder with one, or a shipped name; else a config.json, a model's folder, a GGUF or a Hub id, whose
    rotation is imported. A folder that holds both is a recipe's. Raises as `load_recipe` and `import_recipe`.
    """
    path = find_recipe(reference)
    if path is None:
        try:
            where = locate_config(reference)
        except InputError as error:
            raise InputError(
                f"{reference}: no such recipe file, folder, shipped recipe or model",
                remedy=f"Shipped: {', '.join(sorted(shipped_recipes())) or 'none'}; see `lrconvert recipe list`",
            ) from error
        if where.is_dir() and not (where / CONFIG).is_file():
            raise InputError(f"{reference}: holds neither {RECIPE_FILE} nor {CONFIG}")
    elif first_bytes(path) != GGUF_MAGIC and not _is_config(path):
        return load_recipe(path), path.parent, []
    recipe, notes = import_recipe([str(reference)])
    return recipe, Path(), notes


def _is_config(path: Path) -> bool:
    """Whether a JSON file is a model's config. What isn't JSON is left to the reader of recipes."""
    try:
        return "model_type" in read_json(path, MAX_RECIPE_BYTES)
    except InputError:
        return False


def _name_of(sources: Sequence[str], base: Base) -> str:
    if base.model:
        return f"{Path(base.model).name}-longrope"
    path = Path(sources[0].partition("=")[0])
    return path.parent.name if path.name == "config.json" and path.parent.name else path.stem


def _completed(given: Base) -> Base:
    """`given` with what the named model's config says where an option doesn't."""
    assert given.model is not None
    config, shape, _ = _config_of(given.model)
    found = read_rope(config, shape)
    return Base(
        family=given.family or config.get("model_type"),
        theta=given.theta or shape.theta,
        original_window=given.original_window or found.original_window,
        model=given.model,
        window=given.window,
        rotary_dim=shape.rotary_dim,
    )


def _agreed(pieces: list[_Piece], given: Base) -> Base:
    """What all sources agree on about the model. Raises `InputError` with both values where two differ."""
    values: dict[str, Any] = {}
    problems = []
    if len(widths := sorted({piece.rotary_dim for piece in pieces})) > 1:
        problems.append(f"sources rotate {' and '.join(str(width) for width in widths)} dimensions")
    elif given.rotary_dim not in (None, widths[0]):
        problems.append(f"they rotate {widths[0]} dimensions, {given.model} {given.rotary_dim}")
    for key in ("family", "theta", "original_window", "model"):
        override = getattr(given, key)
        values_found = list(dict.fromkeys(v for piece in pieces if (v := getattr(piece.base, key)) is not None))
        if override is None and len(values_found) > 1 and key != "model":
            problems.append(f"sources differ in {key}: {' and '.join(str(value) for value in values_found)}")
        values[key] = override if override is not None else values_found[0] if values_found else None
    if problems:
        raise InputError.collect("sources", problems)
    return Base(**values)


def _ordered(pieces: list[_Piece], original_window: int) -> tuple[Tier, ...]:
    tiers: dict[int, tuple[Tier, str]] = {}
    for piece in pieces:
        for tier in piece.tiers:
            if piece.formula:
                ratio = tier.max_length / original_window
                tier = replace(tier, attention_factor=rope.longrope_attention_factor(ratio, original_window))
            if tier.max_length in tiers and tiers[tier.max_length][0] != tier:
                other = tiers[tier.max_length][1]
                raise InputError(
                    f"{other} and {piece.source} both serve {tier.max_length} tokens, with different values"
                )
            tiers[tier.max_length] = (tier, piece.source)
    return tuple(tiers[length][0] for length in sorted(tiers))


# --- one source ------------------------------------------------------------------------------------------


def _read(source: str, given: Base) -> _Piece:
    path_text, _, length = source.partition("=")
    path = Path(path_text)
    if path.suffix.lower() == ".csv":
        return _read_csv(path, length)
    if path.is_file() and path.suffix.lower() == ".json":
        values = read_json(path, MAX_RECIPE_BYTES)
        if "model_type" not in values and {"short_factor", "long_factor"} & set(values):
            return _read_factor_file(path, values, given)
    config, shape, notes = _config_of(source)
    if given.theta is not None:
        shape = replace(shape, theta=given.theta)
    if given.original_window is not None:  # at the top level, where it wins
        config = {**config, "original_max_position_embeddings": given.original_window}
    found = read_rope(config, shape, window=given.window).settled(source)
    if not found.scaled:
        raise InputError(f"{source}: carries no scaled RoPE", remedy="`lrconvert recipe derive` makes a recipe for it")
    base = Base(config.get("model_type"), shape.theta, found.original_window, _model_in(config))
    described = f"{portable_name(source, path)} ({found.kind})"
    return _Piece(base, shape.rotary_dim, found.tiers, described, notes=(*notes, *found.notes))


def _model_in(config: Mapping[str, Any]) -> str | None:
    """What a config calls its model: a Hub id, or the last part of a path on somebody's machine. None: nothing."""
    name = config.get("_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    return name if names_hub_id(name) else PurePath(name.replace("\\", "/")).name or None


def _config_of(reference: str) -> tuple[dict[str, Any], ModelShape, tuple[str, ...]]:
    """Config and shape of a config.json, a model folder, a GGUF file or a Hub id, of any family."""
    path = Path(reference)
    if path.is_file() and path.suffix.lower() == ".json":
        config = read_json(path)
    else:
        path = locate_config(reference)
        config = read_json(path / CONFIG) if path.is_dir() else open_checkpoint(path).config
    if is_larger(config):
        part, notes = language_config(config), [f"the language model of a {config['model_type']}"]
    else:
        part, notes = text_part(config)
    model_type = part.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{reference}: model_type is {model_type!r}; not a Hugging Face config")
    if model_type in family_names():
        return dict(part), read_shape(part, get_family(model_type)), tuple(notes)
    # A recipe needs only what decides the rotation; let a config of another family omit the rest.
    found, more = familiar(part)
    blanks = {"intermediate_size": 1, "vocab_size": 1, "num_hidden_layers": 1, "hidden_act": "silu"}
    shape = read_shape({**found, **blanks}, Family(model_type, "", "", rows=()))
    return found, shape, (*notes, *more)


def _read_csv(path: Path, length: str) -> _Piece:
    """LongRoPE's own layouts, without a header: one row of d/2 factors per layer, all rows the same, as its tables are
    published; or one factor a line, as its search writes its result."""
    text = read_bounded(path).decode("utf-8", errors="replace")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    if not rows:
        raise InputError(f"{path}: empty; rows of factors are needed")
    try:
        numbers = [[float(cell) for cell in row] for row in rows]
    except ValueError as error:
        raise InputError(f"{path}: not a table of numbers ({error})") from error
    if all(len(row) == 1 for row in numbers):
        numbers = [[row[0] for row in numbers]]
    if len(numbers[0]) == 1:
        raise InputError(f"{path}: holds one number; a factor for each rotated pair of channels is needed")
    for index, row in enumerate(numbers):
        if row != numbers[0]:
            raise InputError(f"{path}: row {index + 1} differs from row 1; one factor set for all layers is needed")
    low, high = FACTORS
    bad = [value for value in numbers[0] if not low <= value <= high]
    if bad:
        raise InputError(f"{path}: holds {bad[0]}; numbers from {low:g} to {high:g} are needed")
    matched = _LENGTH_IN_NAME.match(path.name) or re.search(r"_(\d+)k\.csv$", path.name, re.IGNORECASE)
    if length:
        if not length.isdecimal():
            raise UsageError(f"{path}={length}: the window after = must be a number of tokens")
        window = int(length)
    elif matched:
        window = int(matched.group(1)) * 1024
    else:
        raise UsageError(f"{path}: the file name does not tell which window it serves", remedy=f"Write {path}=LENGTH")
    tier = Tier(window, tuple(numbers[0]))
    notes = (f"{path.name}: serves {window} tokens; no start tokens, attention factor by LongRoPE's formula",)
    return _Piece(Base(), 2 * len(numbers[0]), (tier,), path.name, notes=notes, formula=True)


@dataclass(frozen=True)
class _Origin:
    """Where a factor file's numbers come from."""

    __pydantic_config__: ClassVar = _READ

    repo: str | None = None
    ref: str | None = None
    path: str | None = None
    licence: str | None = None

    @property
    def described(self) -> str:
        return " ".join(filter(None, (self.repo, self.ref, self.path)))


@dataclass(frozen=True)
class _FactorFile:
    """A published set as plain data; a null is a key that is not there, and other keys are ignored. Factors are looked
    at by who reads those of configs. `attention_factor` is a number for both sets, or an object with one for each."""

    __pydantic_config__: ClassVar = _READ

    rotary_dim: Annotated[int, Ge(1), Le(MAX_DIMENSION)]
    head_dim: Annotated[int, Ge(1), Le(MAX_DIMENSION)]
    original_max_position_embeddings: Annotated[int, Ge(1)] | None = None
    max_position_embeddings: int | None = None
    target_length: int | None = None
    rope_theta: Annotated[float, Gt(0)] | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None
    attention_factor: float | dict[str, float] | None = None
    start_tokens: Annotated[int, Ge(0)] | None = None
    model: str | None = None
    source: _Origin | None = None


def _read_factor_file(path: Path, values: dict[str, Any], given: Base) -> _Piece:
    """`short_factor`, `long_factor` and what their config has beside them."""
    from pydantic import TypeAdapter, ValidationError

    plain = {**values, "source": values["source"] if isinstance(values.get("source"), dict) else None}
    try:
        read = TypeAdapter(_FactorFile).validate_json(json.dumps(plain))
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error, 'the file')}") from error
    origin = read.source or _Origin()
    original = given.original_window or read.original_max_position_embeddings
    if original is None:
        raise InputError(f"{path}: original_max_position_embeddings is missing", remedy="Give --original-window")
    theta = given.theta or read.rope_theta
    both = read.short_factor is not None and read.long_factor is not None
    lengths = [read.max_position_embeddings, read.target_length]
    target = next((length for length in (lengths if both else lengths[::-1]) if length is not None), None)
    if target is None:
        raise InputError(f"{path}: neither max_position_embeddings nor target_length")
    only = read.short_factor or read.long_factor
    published = read.attention_factor
    scale = published if isinstance(published, dict) else {"attention_factor": published}
    config = {
        "model_type": given.family or "unknown",
        "hidden_size": read.head_dim,
        "num_attention_heads": 1,
        "head_dim": read.head_dim,
        "partial_rotary_factor": read.rotary_dim / read.head_dim,
        "max_position_embeddings": target,
        "rope_theta": theta or 10000.0,
        "original_max_position_embeddings": original,
        "intermediate_size": 1,
        "vocab_size": 1,
        "num_hidden_layers": 1,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": read.short_factor or only,
            "long_factor": read.long_factor or only,
            **scale,
        },
    }
    found = _checked(path, config)
    tiers = found.tiers if both else (replace(found.tiers[-1], max_length=target),)
    tiers = tuple(replace(tier, start_tokens=read.start_tokens or 0) for tier in tiers)
    return _Piece(
        Base(given.family, theta, original, read.model),
        read.rotary_dim,
        tiers,
        origin.described or path.name,
        licence=origin.licence,
        notes=found.notes,
        formula=not both and published is None,
    )


def _checked(path: Path, config: dict[str, Any]) -> FoundRope:
    try:
        return read_rope(config, read_shape(config, Family(config["model_type"], "", "", rows=())))
    except InputError as error:
        raise InputError(error.message.replace("config.json", str(path), 1)) from error
