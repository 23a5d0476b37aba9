# SPDX-License-Identifier: Apache-2.0
"""Reading a Hugging Face config: the checked numbers of a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families.base import HEAD_BIAS, Family, ModelShape
from lrconvert.families.experts import SPARSEMIXER_USED, Experts, StatedExperts
from lrconvert.families.keys import check_keys
from lrconvert.families.multipliers import Multipliers

# Counts beyond these are damage or malice, not a model; they also bound the time and memory of the checks.
MAX_LAYERS = MAX_EXPERTS = 4096
MAX_COUNT = {"num_hidden_layers": MAX_LAYERS, "default": 2**31 - 1}
LAYER_KINDS = ("sliding_attention", "full_attention")


def rope_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config's rotary settings, in whichever spelling: `rope_scaling` (v4) wins over
    `rope_parameters` (v5), as in transformers 5. Empty when there are none."""
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key)
        if isinstance(section, Mapping):
            nested = {name: value for name, value in section.items() if isinstance(value, Mapping)}
            first = next(iter(nested.values()), None)
            if first and all(value == first for value in section.values()):
                return first  # settings for each kind of layer, and all the same
            if nested:
                raise UnsupportedError(
                    f"config.json: {key} has separate settings for {', '.join(nested)}; lrconvert "
                    "converts models with one rotation for all layers"
                )
            if section:
                return section
        elif section is not None:
            raise InputError(f"config.json: {key} is {section!r}; an object or null is needed")
    return {}


class _Reader:
    """Reads checked values from a config; remembers all problems."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config = config
        self.values = {**family.defaults, **config}  # null is not a missing key: transformers computes a value then
        self.problems: list[str] = []

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        most = MAX_COUNT.get(key, MAX_COUNT["default"])
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self.problems.append(f"{key} is {_short(value)}; an integer from 1 to {most} is needed")
            return 1
        return value

    def number(self, key: str, default: float | None = None, at: Mapping[str, Any] | None = None) -> float:
        value = (at or {}).get(key)
        value = self.values.get(key) if value is None else value
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            self.problems.append(f"{key} is {_short(value)}; a positive number is needed")
            return 1.0
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            self.problems.append(f"{key} is {_short(value)}; true or false is needed")
        return value is True


def _sliding(reader: _Reader, family: Family) -> tuple[int, ...]:
    """How many tokens each layer attends to, as transformers reads it."""
    if family.sliding == "unclear":
        if reader.flag("use_sliding_window"):
            reader.problems.append(
                "use_sliding_window is true; versions of transformers disagree on which layers it means"
            )
        return ()
    if family.sliding is None or reader.values.get("sliding_window") in (None, False):
        return ()
    width, layers = reader.integer("sliding_window"), min(reader.integer("num_hidden_layers"), MAX_LAYERS)
    if family.sliding == "all":
        return (width,) * layers
    if not reader.flag("use_sliding_window"):
        return ()
    if family.sliding == "switched":
        return (width,) * layers
    kinds = reader.values.get("layer_types")
    if kinds is None:
        first = reader.values.get("max_window_layers")
        limited = [not isinstance(first, int) or layer >= first for layer in range(layers)]
    elif isinstance(kinds, list) and len(kinds) == layers and set(map(str, kinds)) <= set(LAYER_KINDS):
        limited = [kind == LAYER_KINDS[0] for kind in kinds]
    else:
        reader.problems.append(f"layer_types is {_short(kinds)}; {layers} of {' and '.join(LAYER_KINDS)} are needed")
        return ()
    return tuple(width if limit else 0 for limit in limited) if any(limited) else ()


def _theta(reader: _Reader, section: Mapping[str, Any]) -> float:
    """θ, from either place that versions of transformers read; a problem where the two differ."""
    inside, outside = section.get("rope_theta"), reader.config.get("rope_theta")
    if inside is not None and outside is not None and inside != outside:
        reader.problems.append(
            f"rope_theta is {_short(outside)} at the top level and {_short(inside)} in the rotary settings; versions "
            "of transformers disagree on which counts"
        )
    return reader.number("rope_theta", 10000.0, at=section)


def _multipliers(reader: _Reader, family: Family, shape: ModelShape) -> Multipliers:
    """Those that the family's configs state; zero, which would leave nothing of what it multiplies, is a problem."""
    found = {}
    for name, stated in family.multipliers.items():
        value = reader.number(stated.key)
        found[name] = stated.multiplier(value, shape.numbers)
        if not 0 < found[name] <= sys.float_info.max:
            reader.problems.append(f"{stated.key} is {_short(value)}, which leaves no number to multiply with")
    return Multipliers(**found)


def _experts(reader: _Reader, stated: StatedExperts) -> Experts:
    """How many there are, and how a token's are chosen."""
    count, used = reader.integer(stated.count), reader.integer(stated.used)
    if count > MAX_EXPERTS:
        reader.problems.append(f"{stated.count} is {count}; at most {MAX_EXPERTS} are read")
    other = None if stated.count_too is None else reader.config.get(stated.count_too)
    if other not in (None, count):
        reader.problems.append(f"{stated.count} is {count} and {stated.count_too} {_short(other)}; they contradict")
    if used > count:
        reader.problems.append(f"{stated.used} is {used}; there are {count} experts ({stated.count})")
    if stated.gating == "sparsemixer" and (used != SPARSEMIXER_USED or count < used):
        reader.problems.append(f"{stated.used} is {used} of {count}; this family's router chooses {SPARSEMIXER_USED}")
    return Experts(
        count=min(count, MAX_EXPERTS),
        used=used,
        ffn=reader.integer(stated.ffn),
        gating=stated.gating,
        normalised=stated.normalised is None or reader.flag(stated.normalised),
        shared=0 if stated.shared is None else reader.integer(stated.shared),
        jitter=0.0 if stated.jitter is None else reader.number(stated.jitter),
    )


def _short(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_shape(config: Mapping[str, Any], family: Family) -> ModelShape:
    """The checked numbers of a Hugging Face config. Raises `InputError` listing every bad key, and `UnsupportedError`
    naming those that change what the model computes and aren't understood."""
    reader = _Reader(config, family)
    section = rope_section(config)
    check_keys(config, section, family.name if family.rows else "", family.own_keys)
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", heads)
    head_dim = reader.integer("head_dim", max(hidden // heads, 1))
    partial = reader.number("partial_rotary_factor", 1.0, at=section)
    rotary_dim = int(head_dim * min(partial, 2.0))
    sound = not reader.problems  # else the numbers below are stand-ins
    if sound and heads % kv_heads:
        reader.problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if sound and (rotary_dim % 2 or not 2 <= rotary_dim <= head_dim):
        reader.problems.append(
            f"head_dim {head_dim} times partial_rotary_factor {partial:g} channels rotate; "
            f"an even number from 2 to {head_dim} is needed"
        )
    activation = reader.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        reader.problems.append(f"hidden_act is {_short(activation)}; only silu is known for {family.name}")
    shape = ModelShape(
        layers=reader.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        ffn=reader.integer("intermediate_size"),
        vocab=reader.integer("vocab_size"),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        theta=_theta(reader, section),
        window=reader.integer("max_position_embeddings"),
        tied=reader.flag("tie_word_embeddings"),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        sliding=_sliding(reader, family),
        experts=None if family.experts is None else _experts(reader, family.experts),
        norm=family.norm,
        head_bias=HEAD_BIAS in family.rows and reader.flag("lm_head_bias"),
    )
    shape = replace(shape, multipliers=_multipliers(reader, family, shape))
    if reader.problems:
        raise InputError.collect("config.json", reader.problems)
    return shape
