# SPDX-License-Identifier: Apache-2.0
"""Which rotation a Hugging Face config means, in any version's spelling, as tiers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from lrconvert import rope
from lrconvert.errors import InputError, UsageError
from lrconvert.families import ModelShape, family_names, get_family, rope_section, with_defaults
from lrconvert.recipe import SCHEMA_VERSION, parse_recipe
from lrconvert.rope import Tier

LONGROPE_KEY = "longrope"  # ours, top level: what the artifact's own code reads. Published names are permanent.
LONGROPE_VERSION = 1
SAME_KIND = {"su": "longrope"}  # LongRoPE's name in the first Phi-3 configs
MAX_WINDOW = 2**31 - 1  # beyond it a length is damage, not a window


HOW_TO_SETTLE = (
    "Say how far the model serves with --window N; or where the short set ends, with `lrconvert recipe import "
    "--original-window N`"
)


@dataclass(frozen=True)
class FoundRope:
    """The rotation that a config describes. `scaled` is False for a plain, unscaled one."""

    kind: str
    original_window: int
    tiers: tuple[Tier, ...]
    notes: tuple[str, ...] = ()
    question: str = ""  # what the config leaves open, so that `tiers` are only what is certain

    @property
    def scaled(self) -> bool:
        return self.kind != "default"

    @property
    def window(self) -> int:
        """Up to where the rotation serves, in tokens."""
        return self.tiers[-1].max_length

    def settled(self, where: object) -> FoundRope:
        """This rotation, for who bakes it or builds on it. Raises `InputError` where the config leaves it open."""
        if self.question:
            raise InputError(f"{where}: {self.question}", remedy=HOW_TO_SETTLE)
        return self


def _positive(value: object) -> TypeGuard[float]:
    """A finite number above zero, whatever JSON made of it (10**400 is an int there)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


class _Section:
    """Checked access to a config's rotary settings. `stated`: the window that the user says it serves."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, stated: int | None = None) -> None:
        name = config.get("model_type")
        self.family = get_family(name) if name in family_names() else None
        self.config = with_defaults(config, self.family) if self.family else dict(config)
        self.shape, self.values, self.stated = shape, rope_section(self.config), stated
        self.notes: list[str] = []
        self.question = ""

    @property
    def lists(self) -> list[str]:
        """LongRoPE's factor lists, those that are there."""
        return [key for key in ("short_factor", "long_factor") if self.values.get(key) is not None]

    @property
    def kind(self) -> str:
        """The kind of scaling: a key of `_READERS`, or "default"."""
        named = [self.values[key] for key in ("rope_type", "type") if self.values.get(key) is not None]
        renamed = self.family.rope_kinds if self.family else {}
        kinds = [renamed.get(name, SAME_KIND.get(name, name)) if isinstance(name, str) else name for name in named]
        if any(kind != "default" and (not isinstance(kind, str) or kind not in _READERS) for kind in kinds):
            raise InputError(
                f"config.json: rope_type {named[0]!r} is not known", remedy=f"Known: {', '.join(sorted(_READERS))}"
            )
        if len(set(kinds)) > 1:
            raise InputError(
                f"config.json: rope_scaling says rope_type {named[0]!r} and type {named[1]!r}; versions of "
                "transformers disagree on which counts",
                remedy="Remove one of them",
            )
        kind = kinds[0] if kinds else "default"
        if self.lists and kind == "yarn" and self.values.get("factor") is None:
            return "longrope"  # Phi-3's first configs; a YaRN would have a factor
        if self.lists and kind != "longrope":
            raise InputError(
                f"config.json: rope_scaling says {kind!r} and carries {' and '.join(self.lists)}, which are longrope's",
                remedy="Remove the lists, or write longrope",
            )
        return kind

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        value = default if value is None else value
        if not _positive(value):
            found = "missing" if value is None else repr(value)
            raise InputError(f"config.json: rope_scaling.{key} is {found}; a positive number is needed")
        return float(value)

    def factors(self, key: str) -> tuple[float, ...]:
        value, needed, (low, high) = self.values.get(key), self.shape.rotary_dim // 2, rope.FACTORS
        if not isinstance(value, list):
            raise InputError(f"config.json: rope_scaling.{key} is missing; {needed} numbers are needed")
        if len(value) != needed:
            raise InputError(
                f"config.json: rope_scaling.{key} has {len(value)} values; the model rotates "
                f"{self.shape.rotary_dim} dimensions, so {needed} are needed"
            )
        for index, item in enumerate(value):
            if not _positive(item) or not low <= item <= high:
                raise InputError(
                    f"config.json: rope_scaling.{key}[{index}] is {item!r:.40}; a positive number is needed, "
                    f"from {low:g} to {high:g}"
                )
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
    """As transformers 5 computes it: the attention factor from `factor`, where there is one, else from the windows."""
    original, factor = section.original_window(), section.values.get("factor")
    window = _longrope_window(section, original)
    ratio = window / original if factor is None else section.number("factor")
    if factor is not None and abs(ratio - window / original) > 1e-6 * ratio:
        section.notes.append(
            f"rope_scaling.factor is {factor}, window / original window is {window / original:g}: the attention factor "
            "comes from the former, as in transformers 5; versions of transformers disagree on which counts"
        )
    formula = rope.longrope_attention_factor(ratio, original)
    both = section.number("attention_factor", formula)
    short_scale = long_scale = both
    own = section.family is not None and section.family.hf_scaling == "mscales"
    if own or section.values.get("attention_factor") is None:
        short_scale, long_scale = section.number("short_mscale", both), section.number("long_mscale", both)
    short = Tier(original, section.factors("short_factor"), attention_factor=short_scale)
    long = Tier(window, section.factors("long_factor"), attention_factor=long_scale)
    if window > original:
        return FoundRope("longrope", original, (short, long))
    if long.factors != short.factors:
        section.question = (
            f"config.json has two factor sets and one window: max_position_embeddings is {section.shape.window}, the "
            f"original window {original}, and no factor says how far the long set reaches"
        )
    return FoundRope("longrope", original, (short,))


def _longrope_window(section: _Section, original: int) -> int:
    """How far the long set reaches: what the user says, else the config's window, else `factor` times the original
    one (a block of somebody's model card, pasted in, whose window nobody raised)."""
    if section.stated is not None:
        return section.stated
    window, factor = section.shape.window, section.values.get("factor")
    if window > original or factor is None or section.number("factor") <= 1:
        return window
    reached = _limited(section, original)
    section.notes.append(
        f"max_position_embeddings is {window}, not beyond the original window: the long set reaches "
        f"rope_scaling.factor times that, {reached}"
    )
    return reached


def _limited(section: _Section, original: int) -> int:
    """`factor` times the original window, in tokens."""
    ratio = section.number("factor")
    if original * ratio > MAX_WINDOW:
        raise InputError(f"config.json: rope_scaling.factor is {ratio:g}; windows end at {MAX_WINDOW} tokens")
    return round(original * ratio)


def _extended(section: _Section, original: int) -> int:
    """The window of a rule with a ratio: what the user says, else what it reaches, or what the config promises if that
    is more."""
    if section.stated is not None:
        return section.stated
    return max(_limited(section, original), section.shape.window, original)


def _unsure_window(section: _Section, original: int, end: int) -> None:
    """A note for rules whose configs say one window and not which one that is."""
    if section.stated is None and end != section.shape.window:
        section.notes.append(
            f"max_position_embeddings, {original}, is taken as the window from before the scaling, so that the model "
            f"serves {end} tokens; if it is the one from after it, say so with --window {original}"
        )


def _linear(section: _Section) -> FoundRope:
    ratio, original = section.number("factor"), section.original_window()
    end = _extended(section, original)
    _unsure_window(section, original, end)
    return FoundRope("linear", original, (Tier(end, tuple(rope.pi_factors(section.shape.rotary_dim, ratio).tolist())),))


def _dynamic(section: _Section) -> FoundRope:
    """The rule has a set for every length. It starts at `max_position_embeddings`, whatever other keys say."""
    ratio, original = section.number("factor"), section.shape.window
    end = _extended(section, original)
    _unsure_window(section, original, end)
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
    return FoundRope("dynamic", min(original, end), tiers)


def _yarn(section: _Section) -> FoundRope:
    original, shape = section.original_window(), section.shape
    ratio = section.number("factor", shape.window / original if original < shape.window else None)
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
    implied = section.values.get("factor") is None  # the config's window is what it reaches
    end = section.stated or (shape.window if implied else _extended(section, original))
    tier = Tier(end, tuple(factors.tolist()), attention_factor=section.number("attention_factor", default))
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
    window = section.stated or max(shape.window, original)
    return FoundRope("llama3", original, (Tier(window, tuple(factors.tolist())),))


_READERS: dict[str, Callable[[_Section], FoundRope]] = {
    "longrope": _longrope,
    "yarn": _yarn,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
}


def read_rope(config: Mapping[str, Any], shape: ModelShape, *, window: int | None = None) -> FoundRope:
    """The rotation of a config in any version's spelling, as tiers. `InputError` names what is wrong.

    `window`: up to where it serves, in tokens, where the config doesn't say or says otherwise. Raises `UsageError` for
    one below the original window.
    """
    if LONGROPE_KEY in config:
        return _read_own(config[LONGROPE_KEY], shape)
    section = _Section(config, shape, window)
    kind = section.kind
    if kind == "default":
        served = window or shape.window
        plain = Tier(served, (1.0,) * (shape.rotary_dim // 2))
        return FoundRope("default", served, (plain,))
    if window is not None and kind != "dynamic" and window < section.original_window():
        raise UsageError(f"--window {window} is below the original window, {section.original_window()}")
    found = _READERS[kind](section)
    _check_bounds(found.tiers)
    return FoundRope(found.kind, found.original_window, found.tiers, tuple(section.notes), section.question)


def _check_bounds(tiers: tuple[Tier, ...]) -> None:
    """`InputError` for sets that no model has: nothing but zeros and infinities would come of them."""
    for tier in tiers:
        for what, values, (low, high) in (
            ("a factor", tier.factors, rope.FACTORS),
            ("an attention factor", (tier.attention_factor,), rope.ATTENTION),
        ):
            if odd := [value for value in values if not low <= value <= high]:
                raise InputError(
                    f"config.json: rope_scaling makes {what} of {odd[0]:g} for {tier.max_length} tokens; "
                    f"from {low:g} to {high:g} is needed"
                )


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
