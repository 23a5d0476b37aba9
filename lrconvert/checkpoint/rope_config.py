# SPDX-License-Identifier: Apache-2.0
"""Which rotation a Hugging Face config means, in any version's spelling, as tiers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from lrconvert import rope
from lrconvert.errors import InputError
from lrconvert.families import ModelShape, rope_section
from lrconvert.recipe import SCHEMA_VERSION, parse_recipe
from lrconvert.rope import Tier

LONGROPE_KEY = "longrope"  # ours, top level: what the artifact's own code reads. Published names are permanent.
LONGROPE_VERSION = 1
MAX_WINDOW = 2**31 - 1  # beyond it a length is damage, not a window


@dataclass(frozen=True)
class FoundRope:
    """The rotation that a config describes. `scaled` is False for a plain, unscaled one."""

    kind: str
    original_window: int
    tiers: tuple[Tier, ...]
    notes: tuple[str, ...] = ()

    @property
    def scaled(self) -> bool:
        return self.kind != "default"

    @property
    def window(self) -> int:
        """Up to where the rotation serves, in tokens."""
        return self.tiers[-1].max_length


def _positive(value: object) -> TypeGuard[float]:
    """A finite number above zero, whatever JSON made of it (10**400 is an int there)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


class _Section:
    """Checked access to a config's rotary settings."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape) -> None:
        self.config, self.shape, self.values = config, shape, rope_section(config)
        self.notes: list[str] = []

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        value = default if value is None else value
        if not _positive(value):
            found = "missing" if value is None else repr(value)
            raise InputError(f"config.json: rope_scaling.{key} is {found}; a positive number is needed")
        return float(value)

    def factors(self, key: str) -> tuple[float, ...]:
        value, needed = self.values.get(key), self.shape.rotary_dim // 2
        if not isinstance(value, list):
            raise InputError(f"config.json: rope_scaling.{key} is missing; {needed} numbers are needed")
        if len(value) != needed:
            raise InputError(
                f"config.json: rope_scaling.{key} has {len(value)} values; the model rotates "
                f"{self.shape.rotary_dim} dimensions, so {needed} are needed"
            )
        for index, item in enumerate(value):
            if not _positive(item):
                raise InputError(f"config.json: rope_scaling.{key}[{index}] is {item!r}; a positive number is needed")
        return tuple(float(item) for item in value)

    def original_window(self, default: int | None = None) -> int:
        """Top level wins over inner, as in transformers 5; else `default`, else the config's window."""
        for where, values in (("", self.config), ("rope_scaling.", self.values)):
            value = values.get("original_max_position_embeddings")
            if value is None:
                continue
            if not _positive(value) or value != int(value) or not 2 <= value <= MAX_WINDOW:
                raise InputError(
                    f"config.json: {where}original_max_position_embeddings is {value!r}; an integer above 1 is needed"
                )
            return int(value)
        return default or self.shape.window


def _longrope(section: _Section) -> FoundRope:
    window, original = section.shape.window, section.original_window()
    ratio = window / original
    stated = section.values.get("factor")
    if stated is not None and abs(section.number("factor") - ratio) > 1e-6 * ratio:
        section.notes.append(
            f"rope_scaling.factor is {stated}, window / original window is {ratio:g}: versions of transformers "
            "disagree on which counts"
        )
    formula = rope.longrope_attention_factor(ratio, original)
    both = section.number("attention_factor", formula)
    if section.values.get("attention_factor") is None:
        short_scale, long_scale = section.number("short_mscale", both), section.number("long_mscale", both)
    else:
        short_scale = long_scale = both
    short = Tier(original, section.factors("short_factor"), attention_factor=short_scale)
    long_factors = section.factors("long_factor")
    if window <= original:
        if long_factors != short.factors:
            section.notes.append(f"long_factor is never used: the window, {window}, is the original one")
        return FoundRope("longrope", original, (short,))
    return FoundRope("longrope", original, (short, Tier(window, long_factors, attention_factor=long_scale)))


def _extended(section: _Section, original: int, ratio: float) -> int:
    """The window of a rule with a ratio: what it reaches, or what the config promises if that is more."""
    if original * ratio > MAX_WINDOW:
        raise InputError(f"config.json: rope_scaling.factor is {ratio:g}; windows end at {MAX_WINDOW} tokens")
    return max(round(original * ratio), section.shape.window, original)


def _linear(section: _Section) -> FoundRope:
    ratio, original = section.number("factor"), section.original_window()
    factors = tuple(rope.pi_factors(section.shape.rotary_dim, ratio).tolist())
    return FoundRope("linear", original, (Tier(_extended(section, original, ratio), factors),))


def _dynamic(section: _Section) -> FoundRope:
    ratio, original = section.number("factor"), section.original_window()
    end = _extended(section, original, ratio)
    lengths, length = [], original
    while length < end:
        lengths.append(length)
        length *= 2
    section.notes.append(
        "dynamic NTK has a factor set for every length: sampled at "
        f"{', '.join(str(n) for n in [*lengths, end])}, each serving the lengths below it"
    )
    tiers = tuple(
        Tier(n, tuple(rope.dynamic_ntk_factors(section.shape.rotary_dim, ratio, original, n).tolist()))
        for n in [*lengths, end]
    )
    return FoundRope("dynamic", original, tiers)


def _yarn(section: _Section) -> FoundRope:
    ratio, original, shape = section.number("factor"), section.original_window(), section.shape
    default = rope.yarn_attention_factor(ratio)
    if section.values.get("mscale") and section.values.get("mscale_all_dim"):
        default = rope.yarn_attention_factor(ratio, section.number("mscale")) / rope.yarn_attention_factor(
            ratio, section.number("mscale_all_dim")
        )
    factors = rope.yarn_factors(
        shape.rotary_dim,
        shape.theta,
        ratio,
        original,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.values.get("truncate", True) is not False,
    )
    tier = Tier(
        _extended(section, original, ratio),
        tuple(factors.tolist()),
        attention_factor=section.number("attention_factor", default),
    )
    return FoundRope("yarn", original, (tier,))


def _llama3(section: _Section) -> FoundRope:
    ratio, original, shape = section.number("factor"), section.original_window(), section.shape
    factors = rope.llama3_factors(
        shape.rotary_dim,
        shape.theta,
        ratio,
        original,
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
    )
    window = max(shape.window, original)
    return FoundRope("llama3", original, (Tier(window, tuple(factors.tolist())),))


_READERS: dict[str, Callable[[_Section], FoundRope]] = {
    "longrope": _longrope,
    "su": _longrope,  # LongRoPE's name in the first Phi-3 configs
    "yarn": _yarn,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
}


def read_rope(config: Mapping[str, Any], shape: ModelShape) -> FoundRope:
    """The rotation of a config in any version's spelling, as tiers. `InputError` names what is wrong."""
    if LONGROPE_KEY in config:
        return _read_own(config[LONGROPE_KEY], shape)
    section = _Section(config, shape)
    kind = section.values.get("rope_type", section.values.get("type")) or "default"
    if kind == "default":
        plain = Tier(shape.window, (1.0,) * (shape.rotary_dim // 2))
        return FoundRope("default", shape.window, (plain,))
    if not isinstance(kind, str) or kind not in _READERS:
        raise InputError(
            f"config.json: rope_type {kind!r} is not known", remedy=f"Known: {', '.join(sorted(_READERS))}"
        )
    found = _READERS[kind](section)
    return FoundRope(found.kind, found.original_window, found.tiers, tuple(section.notes))


def _read_own(value: Any, shape: ModelShape) -> FoundRope:
    """The tiers of an artifact of ours; the recipe file's reader checks them."""
    version = value.get("version") if isinstance(value, dict) else None
    if version != LONGROPE_VERSION:
        raise InputError(f"config.json: {LONGROPE_KEY}.version is {version!r}; this lrconvert reads {LONGROPE_VERSION}")
    recipe = {
        "schema_version": SCHEMA_VERSION,
        "name": "found",
        "family": "found",
        "original_window": value.get("original_window"),
        "rope_theta": value.get("rope_theta"),
        "rotary_dim": shape.rotary_dim,
        "tiers": value.get("tiers"),
        "provenance": {"kind": "published"},
    }
    found = parse_recipe(json.dumps(recipe), f"config.json: {LONGROPE_KEY}")
    return FoundRope("lrconvert", found.original_window, found.tiers)
