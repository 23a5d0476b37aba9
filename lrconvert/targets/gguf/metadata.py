# SPDX-License-Identifier: Apache-2.0
"""The metadata of a GGUF: what a local runtime has to know besides the tensors.

The rope keys are the ones that llama.cpp reads (formats measured with its C++; docs/gguf.md):
`rope.scaling.type` longrope, `original_context_length`, `attn_factor`, and the factors as two F32 tensors. Never
`rope.scaling.factor`: it stacks on the factors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lrconvert import __version__
from lrconvert.artifact.card import SourceCard
from lrconvert.artifact.redaction import local_name
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.gguf_config import LONG, MAX_INTEGER, SHORT, STATIC
from lrconvert.checkpoint.gguf_header import GgufHeader
from lrconvert.errors import UnsupportedError
from lrconvert.families import ModelShape
from lrconvert.families.base import GGUF_FIXED, GGUF_FIXED_AT, GGUF_MULTIPLIERS, GGUF_SLIDING
from lrconvert.families.multipliers import NAMES, power_of
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec
from lrconvert.targets.gguf.layers import layer_keys
from lrconvert.targets.gguf.layout import Raw, Value
from lrconvert.targets.gguf.query_scale import original_context, query_scale_keys

QUANTISATION_VERSION = 2  # of ggml's block formats (GGML_QNT_VERSION)
OURS = "lrconvert."
# Architectures that know one set for every length; others get two equal ones.
STATIC_TENSOR = frozenset({"llama", "granite", "minicpm"})
# llama.cpp strips space after the special tokens of a model of such a name, whatever its vocabulary.
PHI3_NAME = re.compile(r"phi-?3", re.IGNORECASE)


def rope_keys(architecture: str, spec: RopeSpec, shape: ModelShape, *, static: bool) -> dict[str, Value]:
    """The keys of a spec that llama.cpp can express: two tiers at most, no start tokens, one attention factor."""
    if spec.window > MAX_INTEGER:
        raise UnsupportedError(
            f"a window of {spec.window} tokens is too long for llama.cpp, which counts to {MAX_INTEGER}"
        )
    attention = spec.tiers[-1].attention_factor
    keys: dict[str, Value] = {"context_length": spec.window}
    if static and architecture in STATIC_TENSOR:
        keys["rope.scaling.type"] = "none"
    else:
        keys["rope.scaling.type"] = "longrope"
        keys["rope.scaling.original_context_length"] = original_context(spec, shape)
    if "rope.scaling.original_context_length" in keys or attention != 1.0:
        keys["rope.scaling.attn_factor"] = float(attention)
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def rope_tensors(architecture: str, spec: RopeSpec, *, static: bool) -> dict[str, np.ndarray]:
    """The factors, float32, shape [rotary_dim / 2], verbatim: they divide the frequencies."""
    tiers = {STATIC: spec.tiers[-1]} if static and architecture in STATIC_TENSOR else {LONG: spec.tiers[-1]}
    if STATIC not in tiers:
        tiers[SHORT] = spec.tiers[0]
    return {name: _float32(name, tier.factors) for name, tier in tiers.items()}


def _float32(name: str, factors: Sequence[float]) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        values = np.asarray(factors, np.float32)
    if not (np.isfinite(values) & (values > 0)).all():
        raise UnsupportedError(
            f"{name}: the recipe has factors beyond the range of float32, which llama.cpp computes in"
        )
    return values


def shape_keys(architecture: str, shape: ModelShape) -> dict[str, Value]:
    """The numbers of the model."""
    keys: dict[str, Value] = {
        "block_count": shape.layers,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
        "rope.dimension_count": shape.rotary_dim,
        "rope.freq_base": shape.theta,
        "vocab_size": shape.vocab,
    }
    return (
        {f"{architecture}.{key}": value for key, value in keys.items()}
        | multiplier_keys(architecture, shape)
        | query_scale_keys(architecture, shape)
        | expert_keys(architecture, shape)
        | layer_keys(architecture, shape)
    )


def lift_windows(keys: dict[str, Value], architecture: str, window: int) -> None:
    """Every layer attends to every token of a window. Layers that slide stay a kind of their own where they are one."""
    keys.pop(f"{architecture}.attention.sliding_window", None)
    if architecture in GGUF_SLIDING:
        keys[f"{architecture}.attention.sliding_window"] = window


def expert_keys(architecture: str, shape: ModelShape) -> dict[str, int]:
    """How many experts there are, how many of them a token uses, and how wide they are; none for dense models."""
    if shape.experts is None:
        return {}
    keys = {
        "expert_count": shape.experts.count,
        "expert_used_count": shape.experts.used,
        "expert_feed_forward_length": shape.experts.ffn,
        **({"expert_shared_feed_forward_length": shape.experts.shared} if shape.experts.shared else {}),
    }
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def multiplier_keys(architecture: str, shape: ModelShape) -> dict[str, float]:
    """The multipliers as this architecture's files state them, those that are 1 too.

    Raises `UnsupportedError` for one that its C++ does not compute.
    """
    stated = GGUF_MULTIPLIERS.get(architecture, {})
    found = {name: getattr(shape.multipliers, name) for name in NAMES}
    own = {**GGUF_FIXED.get(architecture, {}), **GGUF_FIXED_AT.get((architecture, shape.layers), {})}
    computed = dict.fromkeys(NAMES, 1.0) | {name: power_of(times, shape.numbers) for name, times in own.items()}
    odd = [name for name in NAMES if name not in stated and not math.isclose(found[name], computed[name], rel_tol=1e-9)]
    if lost := [f"{name} {found[name]:g}" for name in odd]:
        raise UnsupportedError(f"llama.cpp's {architecture} does not multiply as the model does: {', '.join(lost)}")
    return {f"{architecture}.{row.key}": row.value(found[name], shape.numbers) for name, row in stated.items()}


def general_keys(model: Model, card: SourceCard, *, strips: bool) -> dict[str, Value]:
    """What people and model lists read. `strips`: special tokens of the vocabulary take in the space behind them,
    which llama.cpp knows from the model's name alone, and which breaks other vocabularies."""
    name = local_name(model.reference)
    if strips and not PHI3_NAME.search(name):
        name += " (phi-3)"
    elif not strips:
        name = PHI3_NAME.sub("phi_3", name)
    keys: dict[str, Value] = {"general.type": "model", "general.name": name, "general.size_label": size_label(model)}
    named = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    keys |= {f"general.{ours}": card.metadata[theirs] for theirs, ours in named.items() if _text(card, theirs)}
    languages = card.metadata.get("language")
    if languages:
        keys["general.languages"] = [languages] if isinstance(languages, str) else languages
    bases = card.metadata.get("base_model")
    bases = [bases] if isinstance(bases, str) else bases or []
    if bases:
        keys["general.base_model.count"] = len(bases)
    for index, base in enumerate(bases):
        keys[f"general.base_model.{index}.name"] = local_name(base)
        keys[f"general.base_model.{index}.repo_url"] = f"https://huggingface.co/{base}"
    return keys


def _text(card: SourceCard, key: str) -> bool:
    return isinstance(card.metadata.get(key), str)


def size_label(model: Model) -> str:
    """How many parameters, as model names say it: 135M, 7B."""
    count = sum(int(np.prod(info.shape, dtype=np.int64)) for info in model.checkpoint.tensors.values())
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + unit if count < 10 * size else f"{count / size:.0f}{unit}"
    return str(count)


def provenance_keys(recipe: Recipe, family: str, losses: Sequence[str]) -> dict[str, Value]:
    """Ours: which recipe this file computes and what of it was dropped."""
    text = json.dumps(asdict(recipe), ensure_ascii=False, allow_nan=False)
    keys: dict[str, Value] = {"version": __version__, "family": family, "recipe": text}
    if losses:
        keys["losses"] = list(losses)
    return {OURS + key: value for key, value in keys.items()}


def carried_keys(source: GgufHeader, architecture: str) -> dict[str, Value]:
    """All metadata of another GGUF unchanged except its rope scaling, its split and what we write anew;
    where the architecture changes, under its name."""
    old, new = source.architecture + ".", architecture + "."
    gone = tuple(f"{old}{key}" for key in ("rope.scaling.", "rope.scale_linear", "context_length"))
    kept: dict[str, Value] = {}
    for key in source.metadata:
        if key.startswith((*gone, "split.", OURS)) or key in ("general.architecture", "general.alignment"):
            continue
        if key.startswith(new) and not key.startswith(old):
            continue  # meant nothing there, and would here
        kept[new + key.removeprefix(old) if key.startswith(old) else key] = Raw(source.raw(key))
    return kept


def arranged(keys: Mapping[str, Value]) -> dict[str, Value]:
    """The order of the file: general first, then the model, the tokenizer, ours."""
    rank = ("general.architecture", "general.", "tokenizer.", OURS)

    def place(key: str) -> int:
        return {0: 0, 1: 1, 2: 3, 3: 4}.get(next((i for i, p in enumerate(rank) if key.startswith(p)), -1), 2)

    return {key: keys[key] for key in sorted(keys, key=place)}


def json_value(value: Any) -> Any:
    """A value for people: `--dry-run`."""
    return "…" if isinstance(value, Raw) or (isinstance(value, list) and len(value) > 8) else value
