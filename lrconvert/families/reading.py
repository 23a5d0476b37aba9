# SPDX-License-Identifier: Apache-2.0
"""Reading a Hugging Face config: the checked numbers of a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families.base import ACTIVATIONS, HEAD_BIAS, Family, ModelShape
from lrconvert.families.experts import SPARSEMIXER_USED, Experts, StatedExperts
from lrconvert.families.keys import check_keys
from lrconvert.families.layers import FULL, LAYER_KINDS, SLIDING
from lrconvert.families.multipliers import Multipliers, power_of
from lrconvert.families.query_scale import QueryScale

# Counts beyond these are damage or malice, not a model; they also bound the time and memory of the checks.
MAX_LAYERS = MAX_EXPERTS = 4096
MAX_COUNT = {"num_hidden_layers": MAX_LAYERS, "default": 2**31 - 1}
ROPE_KEYS = ("rope_parameters", "rope_scaling")  # the newer one, which alone has settings for each kind of layer


def rope_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings of a config's full layers, in whichever spelling: `rope_scaling` (v4) wins over
    `rope_parameters` (v5), as in transformers 5. Empty when there are none."""
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key)
        if isinstance(section, Mapping):
            nested = {name: value for name, value in section.items() if isinstance(value, Mapping)}
            first = next(iter(nested.values()), None)
            if first and all(value == first for value in section.values()):
                return first  # settings for each kind of layer, and all the same
            if nested.get(FULL) and set(section) <= set(LAYER_KINDS):
                return nested[FULL]
            if nested:
                raise UnsupportedError(
                    f"config.json: {key} has separate settings for {', '.join(nested)}; lrconvert "
                    "converts models with one rotation for all layers, or with a plain one in those that slide"
                )
            if section:
                return section
        elif section is not None:
            raise InputError(f"config.json: {key} is {section!r}; an object or null is needed")
    return {}


def with_defaults(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A config with what it leaves out. Null is not a missing key (transformers computes a value then), but for the
    rotary settings."""
    stated = {key: value for key, value in config.items() if value is not None or key not in ROPE_KEYS}
    return {**family.defaults, **stated}


class _Reader:
    """Reads checked values from a config; remembers all problems."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config = config
        self.values = with_defaults(config, family)
        self.problems: list[str] = []

    def integer(self, key: str, default: int | None = None, at: Mapping[str, Any] | None = None) -> int:
        value = (at or {}).get(key)
        value = self.values.get(key) if value is None else value
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


def _slide(reader: _Reader, family: Family) -> list[bool]:
    """Which layers are of the kind that slides, whatever their window."""
    layers = min(reader.integer("num_hidden_layers"), MAX_LAYERS)
    kinds, stated = reader.values.get("layer_types"), family.layers
    if family.sliding in ("all", "switched"):
        return [True] * layers
    if kinds is not None:
        if isinstance(kinds, list) and len(kinds) == layers and set(map(str, kinds)) <= set(LAYER_KINDS):
            return [kind == SLIDING for kind in kinds]
        reader.problems.append(f"layer_types is {_short(kinds)}; {layers} of {' and '.join(LAYER_KINDS)} are needed")
        return [False] * layers
    if family.sliding == "named":
        first = reader.values.get("max_window_layers")
        return [not isinstance(first, int) or layer >= first for layer in range(layers)]
    if family.sliding == "unrotated":
        return [not turns for turns in _rotating(reader, family)]
    if family.sliding == "all but" and stated is not None:
        every = stated.full_every
        if stated.full_every_key is not None:
            every = reader.integer(stated.full_every_key, every)
        return [every is None or bool((layer + 1) % every) for layer in range(layers)]
    return [False] * layers


def _sliding(reader: _Reader, family: Family) -> tuple[int, ...]:
    """How many tokens each layer attends to, as transformers reads it."""
    if family.sliding == "unclear":
        if reader.flag("use_sliding_window"):
            reader.problems.append(
                "use_sliding_window is true; versions of transformers disagree on which layers it means"
            )
        return ()
    if family.sliding is None:
        return ()
    switched = family.sliding in ("switched", "named", "unrotated")
    off = reader.values.get("sliding_window") in (None, False) or (switched and not reader.flag("use_sliding_window"))
    if off and family.sliding in ("all", "switched", "named"):
        return ()
    limited = _slide(reader, family)
    if off and not (family.sliding == "unrotated" and reader.values.get("layer_types") is None) and any(limited):
        needed = "a sliding_window" if not switched else "use_sliding_window and a sliding_window"
        reader.problems.append(f"{limited.count(True)} of {len(limited)} layers slide; {needed} is needed")
    if off:
        return ()
    width = reader.integer("sliding_window")
    return tuple(width if limit else 0 for limit in limited) if any(limited) else ()


def _rotating(reader: _Reader, family: Family) -> list[bool]:
    """Which layers rotate at all."""
    layers, stated = min(reader.integer("num_hidden_layers"), MAX_LAYERS), family.layers
    if stated is None or stated.rotates is None:
        return [True] * layers
    listed = reader.values.get(stated.rotates)
    if listed is None:
        every = reader.integer(stated.unrotated_every or "")
        return [bool((layer + 1) % every) for layer in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers or not all(item in (0, 1) for item in listed):
        reader.problems.append(f"{stated.rotates} is {_short(listed)}; 0 or 1 for each of {layers} layers is needed")
        return [True] * layers
    return [item == 1 for item in listed[:layers]]


def _own_theta(reader: _Reader, family: Family) -> tuple[float | None, ...]:
    """Of each layer: None where the recipe rotates it; θ of its plain rotation; 0 for none. Empty where it does all."""
    stated = family.layers
    found: list[float | None] = [None if turns else 0.0 for turns in _rotating(reader, family)]
    sections = [section for key in ROPE_KEYS if isinstance(section := reader.config.get(key), Mapping)]
    nested = next((section for section in sections if FULL in section), {})
    own = nested.get(SLIDING)
    if stated is None or stated.own_theta is None:
        if own is not None and own != nested[FULL]:
            raise UnsupportedError(
                f"config.json: separate rotary settings for {FULL}, {SLIDING}; layers of {family.name} rotate alike"
            )
        return tuple(found) if set(found) != {None} else ()
    if own is not None and not isinstance(own, Mapping):
        reader.problems.append(f"the rotary settings of {SLIDING} are {_short(own)}; an object is needed")
        own = None
    if reader.config.get("rope_parameters") and not nested:
        reader.problems.append(f"rope_parameters has no {FULL}; {family.name} has settings for each kind of layer")
    theta = _plain_theta(reader, family, stated.own_theta, own or {})
    return tuple(theta if slides else None for slides in _slide(reader, family))


def _plain_theta(reader: _Reader, family: Family, key: str, section: Mapping[str, Any]) -> float:
    """θ of layers that slide. `section`: their rotary settings, where they have some of their own."""
    odd = {name: value for name, value in section.items() if name not in ("rope_theta", "rope_type", "type")}
    if odd or any(section.get(name) not in (None, "default") for name in ("rope_type", "type")):
        raise UnsupportedError(
            "config.json: layers that slide have a scaled rotation of their own; lrconvert converts models in which "
            "they rotate plainly"
        )
    inside, outside = section.get("rope_theta"), reader.config.get(key)
    if key == "rope_theta" and inside is None and outside not in (None, family.defaults.get(key)):
        reader.problems.append(
            f"rope_theta is {_short(outside)}, and nothing says θ of the layers that slide; versions of transformers "
            f"disagree on it: state it in rope_parameters.{SLIDING}"
        )
    elif key != "rope_theta" and None not in (inside, outside) and inside != outside:
        reader.problems.append(f"{key} is {_short(outside)}, and {_short(inside)} in rope_parameters; they contradict")
    return reader.number(key if inside is None else "rope_theta", at=section)


def _theta(reader: _Reader, section: Mapping[str, Any]) -> float:
    """θ, from either place that versions of transformers read; a problem where the two differ."""
    inside, outside = section.get("rope_theta"), reader.config.get("rope_theta")
    if inside is not None and outside is not None and inside != outside:
        reader.problems.append(
            f"rope_theta is {_short(outside)} at the top level and {_short(inside)} in the rotary settings; versions "
            "of transformers disagree on which counts"
        )
    return reader.number("rope_theta", 10000.0, at=section)


def _cap(reader: _Reader, key: str | None) -> float:
    """0 where logits have no cap."""
    return 0.0 if key is None or reader.values.get(key) is None else reader.number(key)


def _multipliers(reader: _Reader, family: Family, shape: ModelShape) -> Multipliers:
    """Those that the family's configs state; zero, which would leave nothing of what it multiplies, is a problem."""
    found = {name: power_of(times, shape.numbers) for name, times in family.fixed.items()}
    for name, stated in family.multipliers.items():
        value = reader.number(stated.key)
        found[name] = stated.multiplier(value, shape.numbers)
        if not 0 < found[name] <= sys.float_info.max:
            reader.problems.append(f"{stated.key} is {_short(value)}, which leaves no number to multiply with")
    return Multipliers(**found)


def _query_scale(reader: _Reader, family: Family, section: Mapping[str, Any]) -> QueryScale | None:
    """From the rotary settings, where transformers reads growth and window. Both have to be there: what it takes for a
    window that isn't depends on the kind of rotation."""
    key, window = family.query_scale, "original_max_position_embeddings"
    growth = None if key is None else section.get(key)
    if key is None or growth is None or (growth == 0 and not isinstance(growth, bool)):
        return None
    inside, outside = section.get(window), reader.config.get(window)
    if None not in (inside, outside) and inside != outside:
        reader.problems.append(
            f"{window} is {_short(outside)} at the top level and {_short(inside)} in the rotary settings; {key} counts "
            "from one of them"
        )
    return QueryScale(reader.number(key, at=section), reader.integer(window, at=section))


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
    section = rope_section(reader.values)
    # Of the latter only a copy stands there, which nobody reads.
    settings = () if family.query_scale is None else (family.query_scale, "max_position_embeddings")
    check_keys(config, section, family.name if family.rows else "", family.own_keys, settings)
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
    named = [name for name, kind in ACTIVATIONS.items() if kind == family.activation]
    activation = reader.values.get(family.activation_key, next(iter(named)))
    if activation not in named:
        reader.problems.append(
            f"{family.activation_key} is {_short(activation)}; only {named[0]} is known for {family.name}"
        )
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
        own_theta=_own_theta(reader, family),
        query_scale=_query_scale(reader, family, section),
        experts=None if family.experts is None else _experts(reader, family.experts),
        norm=family.norm,
        norm_offset=family.norm_offset,
        activation=family.activation,
        neighbours=family.neighbours,
        logits_cap=_cap(reader, family.logits_cap),
        head_bias=HEAD_BIAS in family.rows and reader.flag("lm_head_bias"),
    )
    shape = replace(shape, multipliers=_multipliers(reader, family, shape))
    if reader.problems:
        raise InputError.collect("config.json", reader.problems)
    return shape
