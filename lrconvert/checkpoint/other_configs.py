# SPDX-License-Identifier: Apache-2.0
"""Configs of model types that lrconvert can't convert, as far as their rotation goes: under the keys that ours have.

Factors are imported from models of any family. What decides a rotation stands under other keys there; the names below
are those of the config classes in transformers 5.23 and of the models' own code. A key that sounds like the rotation
and isn't among them is refused by name: a default in its place would be silently wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lrconvert.errors import InputError, UnsupportedError

# Our key: what others call it. θ; the channels of a head that rotate; their share of a head; a head's size.
THETA = ("rope_theta", "rope_embedding_base", "rotary_emb_base", "rotary_embedding_base", "rotary_base", "rope_base")
CHANNELS = ("qk_rope_head_dim", "rotary_dim")
SHARE = ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_percent")
HEAD = ("head_dim", "kv_channels", "attention_head_dim")
# They sound like the rotation and don't change its frequencies: the settings themselves, and which channels are pairs.
SETTINGS = ("rope_scaling", "rope_parameters", "rope_interleave", "rope_interleaved")
SOUNDS_LIKE_ROTATION = re.compile(r"rope|rotary|theta", re.IGNORECASE)


def familiar(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config with the rotation under our keys, and notes on what stood elsewhere.

    Raises `InputError` for two keys that contradict each other and `UnsupportedError` for one that isn't understood.
    """
    found, notes = dict(config), list[str]()
    understood = {*THETA, *CHANNELS, *SHARE, *SETTINGS}
    odd = [key for key in config if SOUNDS_LIKE_ROTATION.search(key) and key not in understood]
    if odd := [key for key in odd if config[key] is not None]:
        raise UnsupportedError(
            f"config.json: {', '.join(f'{key} {config[key]!r:.40}' for key in odd)}: not known to lrconvert, and it "
            "sounds like the rotation",
            remedy="Import the factor lists from a file of their own, with --theta, --family and --original-window",
        )
    for ours, names in (("rope_theta", THETA), ("partial_rotary_factor", SHARE), ("head_dim", HEAD)):
        if (name := _stated(config, names)) is not None:
            found[ours] = config[name]
            notes += [f"{ours} is {config[name]}, from {name}"] if name != ours else []
    if (name := _stated(config, CHANNELS)) is not None:
        found["head_dim"], found["partial_rotary_factor"] = config[name], 1.0
        notes.append(f"{config[name]} channels of a head rotate, from {name}")
    if found.get("rope_theta") is None and not _inside(config, "rope_theta"):
        notes.append("the config has no rope_theta: 10000 is taken, transformers' default; --theta says otherwise")
    return found, notes


def text_part(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The settings of the language model, where a config of a larger model nests them, and a note on that."""
    if config.get("num_attention_heads") is not None:
        return config, []
    nested = [name for name, part in config.items() if isinstance(part, Mapping) and part.get("num_attention_heads")]
    texts = [name for name in nested if config[name].get("vocab_size") or _inside(config[name], "rope_type", "type")]
    if len(texts) > 1:
        raise InputError(
            f"config.json: {' and '.join(texts)} both describe a language model", remedy="Give one of them"
        )
    if not texts:
        return config, []
    part = config[texts[0]]
    return {"model_type": config.get("model_type"), **part}, [f"the language model's settings are those of {texts[0]}"]


def _stated(config: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the keys that has a value. Raises `InputError` where two have different ones."""
    stated = [name for name in names if config.get(name) is not None]
    if len({repr(config[name]) for name in stated}) > 1:
        raise InputError(f"config.json: {', '.join(f'{name} is {config[name]!r}' for name in stated)}; they contradict")
    return stated[0] if stated else None


def _inside(config: Mapping[str, Any], *keys: str) -> bool:
    """Whether the rotary settings have one of the keys."""
    sections = (config.get(name) for name in SETTINGS[:2])
    return any(isinstance(section, Mapping) and any(key in section for key in keys) for section in sections)
