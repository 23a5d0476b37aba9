# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face config that a GGUF file's metadata and tensors amount to.

Defaults are llama.cpp's, since that is what runs these files. Scalars that people write as short decimals
(θ, the norm's epsilon) come back as the shortest decimal of their float32; factors stay verbatim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lrconvert.checkpoint.gguf_header import GgufArray, GgufHeader, GgufTensor
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import Family
from lrconvert.families.base import (
    GGUF_FIXED_AT,
    GGUF_INTERLEAVED,
    GGUF_MULTIPLIERS,
    GGUF_QUERY_SCALE,
    GGUF_SLIDING,
    GGUF_STATED,
    GGUF_STEP35,
    GGUF_UNNORMALISED,
    GGUF_YARN_DIVIDED,
)
from lrconvert.families.layers import FULL, SLIDING
from lrconvert.families.multipliers import power_of
from lrconvert.rope import longrope_attention_factor

SHORT, LONG, STATIC = "rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"
ROPE_TENSORS = (SHORT, LONG, STATIC)
MAX_INTEGER = 2**31 - 1
_TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16"}
_NEEDED = {int: f"an integer from 1 to {MAX_INTEGER}", float: "a positive number", str: "a string"}

ReadTensor = Callable[[GgufTensor], np.ndarray[Any, Any]]


def _good(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        return False
    return 0 < value < math.inf and (kind is float or value <= MAX_INTEGER)


class _Keys:
    """Reads checked values; remembers every missing key and every other problem."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.header = header
        self.prefix = architecture + "."
        self.missing: list[str] = []
        self.problems: list[str] = []

    def get(self, key: str, kind: type, *, required: bool = False, zero: bool = False) -> Any:
        """The value of `<architecture>.<key>`; None where it is missing or bad. `zero`: 0 counts as missing."""
        full = self.prefix + key
        value: Any = self.header.metadata.get(full)
        if isinstance(value, GgufArray) and kind is int:
            value = self._same_in_all_layers(full)
        if value is None or (zero and value == 0):
            if required:
                self.missing.append(full)
            return None
        if not _good(value, kind):
            self.problems.append(f"{full} is {value!r:.60}; {_NEEDED[kind]} is needed")
            return None
        return value

    def _same_in_all_layers(self, full: str) -> Any:
        values = self.header.array(full) or [None]
        if any(value != values[0] for value in values):
            raise UnsupportedError(
                f"{self.header.path}: {full} differs from layer to layer; lrconvert reads models whose layers are alike"
            )
        return values[0]

    def check(self) -> None:
        """Raise `InputError` with everything that was found."""
        listed = [f"missing metadata: {', '.join(self.missing)}"] if self.missing else []
        if listed or self.problems:
            raise InputError.collect(self.header.path, [*listed, *self.problems])


def build_config(
    header: GgufHeader, architecture: str, family: Family, tensors: Mapping[str, GgufTensor], read: ReadTensor
) -> tuple[dict[str, Any], list[str]]:
    """The config, and what is wrong with the file's rope scaling (with any such problem, the config has none).

    Raises `InputError` listing all else that is missing, wrong or contradictory.
    """
    keys = _Keys(header, architecture)
    experts = keys.get("expert_count", int, zero=True) or 0
    if experts and family.experts is None:
        raise UnsupportedError(f"{header.path}: a mixture of experts; lrconvert reads {family.name} without")
    used = keys.get("expert_used_count", int, required=family.experts is not None)
    if family.experts is not None and not experts:
        keys.missing.append(keys.prefix + "expert_count")
    layers = keys.get("block_count", int, required=True)
    window = keys.get("context_length", int, required=True)
    hidden = keys.get("embedding_length", int, required=True)
    ffn = keys.get("feed_forward_length", int, required=True)
    heads = keys.get("attention.head_count", int, required=True)
    epsilon = keys.get("attention.layer_norm_rms_epsilon", float, required=True)
    theta = keys.get("rope.freq_base", float) or 10000.0
    embedding = tensors.get("token_embd.weight")
    vocab = keys.get("vocab_size", int) or (embedding.shape[0] if embedding else None)
    if vocab is None:
        keys.missing.append(keys.prefix + "vocab_size")
    head_dim: Any = keys.get("attention.key_length", int) or (hidden // heads if hidden and heads else None)
    if head_dim == 0:
        keys.problems.append(f"attention.head_count is {heads}; embedding_length {hidden} has no channel for each")
    value_dim = keys.get("attention.value_length", int)
    if value_dim and head_dim and value_dim != head_dim:
        keys.problems.append(f"attention.key_length is {head_dim}, value_length {value_dim}; they must be equal")
    rotary_dim: Any = keys.get("rope.dimension_count", int) or head_dim
    if architecture in GGUF_INTERLEAVED and rotary_dim != head_dim:
        keys.problems.append(f"rope.dimension_count is {rotary_dim}; {family.name} rotates all {head_dim} channels")
    kv_heads = keys.get("attention.head_count_kv", int) or heads
    sliding_window = keys.get("attention.sliding_window", int, zero=True)
    every = GGUF_SLIDING.get(architecture)
    pattern = header.metadata.get(f"{architecture}.attention.sliding_window_pattern", every)
    if every is not None and pattern != every:
        raise UnsupportedError(
            f"{header.path}: {architecture}.attention.sliding_window_pattern is {pattern!r:.60}; files in which all "
            f"but every {every}th layer slide are read"
        )
    needed = GGUF_STATED.get(architecture, frozenset())
    scales = {
        name: keys.get(stated.key, float, required=name in needed, zero=name not in needed)
        for name, stated in GGUF_MULTIPLIERS.get(architecture, {}).items()
    }
    keys.check()
    if architecture == GGUF_STEP35:  # half of the width, and the layer of zeros at the end
        if header.metadata.get("lrconvert.family") != family.name:
            raise UnsupportedError(f"{header.path}: a step35 of another program; only {family.name} as it is read")
        rotary_dim, layers, sliding_window = rotary_dim // 2, layers - 1, 0
    config: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": family.name,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rms_norm_eps": _short_decimal(epsilon),
        "rope_theta": _short_decimal(theta),
        "max_position_embeddings": window,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": _torch_dtype(tensors),
    }
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = _fraction(rotary_dim, head_dim)
    if sliding_window:
        config["sliding_window"] = sliding_window
    config |= _plain_rotation(family, keys.get("rope.freq_base_swa", float), config["rope_theta"])
    for name in ("bos", "eos", "pad"):
        key = f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id"
        if isinstance(token := header.metadata.get(key), int):
            config[f"{name}_token_id"] = token
    if family.experts is not None:
        width = keys.get("expert_feed_forward_length", int) or ffn
        config |= {family.experts.ffn: width, family.experts.count: experts, family.experts.used: used}
        if family.experts.normalised is not None:
            config[family.experts.normalised] = architecture not in GGUF_UNNORMALISED
        if family.experts.shared is not None:
            config[family.experts.shared] = keys.get("expert_shared_feed_forward_length", int) or ffn
    config |= _biases(family, tensors)
    numbers = {"layers": layers, "hidden": hidden, "head_dim": head_dim, "heads": heads}
    config |= _multipliers(architecture, family, scales, numbers)
    keys.check()
    rope = _Keys(header, architecture)
    scaling = _rope(rope, family, tensors, read, rotary_dim, window)
    config = config if rope.problems else config | scaling
    return config | _query_scale(keys, family, config), rope.problems


def _plain_rotation(family: Family, stated: float | None, theta: float) -> dict[str, Any]:
    """θ of layers that slide, where they rotate by themselves, as the family's configs say it. `theta`: of all others.
    Without a key llama.cpp takes that, or what the family's configs leave out."""
    key = None if family.layers is None else family.layers.own_theta
    if key is None:
        return {}
    if key != "rope_theta":
        return {key: family.defaults[key] if stated is None else _short_decimal(stated)}
    kinds = {FULL: theta, SLIDING: theta if stated is None else _short_decimal(stated)}
    return {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": own} for kind, own in kinds.items()}}


def _query_scale(keys: _Keys, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings with a scale of queries that grows, and the window that it grows from: in llama.cpp one key
    with that of the rotation, as in the family's configs."""
    stated = GGUF_QUERY_SCALE.get(keys.prefix.removesuffix("."))
    if family.query_scale is None:
        return {}
    growth = None if stated is None else keys.get(stated, float, zero=True)
    window = keys.get("rope.scaling.original_context_length", int, zero=True) or config["max_position_embeddings"]
    keys.check()
    section = config.get("rope_scaling", {"rope_type": "default", "rope_theta": config["rope_theta"]})
    scale = {
        family.query_scale: 0.0 if growth is None else _short_decimal(growth),
        "original_max_position_embeddings": window,
    }
    outside = {key: window for key in ("original_max_position_embeddings",) if key in config}
    return {"rope_scaling": {**section, **scale}, **outside}


def _short_decimal(value: float) -> float:
    with np.errstate(over="ignore", under="ignore"):  # a float64 in the file, beyond float32
        return float(str(np.float32(value)))


def _fraction(part: int, whole: int) -> float:
    """part / whole, such that int(whole * fraction) is part again (as transformers and `read_shape` compute)."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, math.inf)


def _torch_dtype(tensors: Mapping[str, GgufTensor]) -> str:
    """The dtype of most of the weights; bfloat16 where they are quantised."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.type.name] = counts.get(tensor.type.name, 0) + math.prod(tensor.shape)
    return _TORCH_DTYPES.get(max(counts, key=lambda name: counts[name]), "bfloat16")


# Flags of a shape and the config keys that set them.
_BIAS_KEYS = {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias", "head_bias": "lm_head_bias"}


def _biases(family: Family, tensors: Mapping[str, GgufTensor]) -> dict[str, bool]:
    """The bias flags that this family's configs state: set where any of their tensors exists."""
    flags: dict[str, bool] = {}
    for row in family.rows:
        key = _BIAS_KEYS.get(row.when or "")
        if key is not None:
            there = row.gguf.replace("{layer}", "0") in tensors
            flags[key] = flags.get(key, False) or there
    return flags


def _multipliers(
    architecture: str, family: Family, scales: Mapping[str, float | None], numbers: Mapping[str, int]
) -> dict[str, float]:
    """The family's own keys, from what the file's architecture states; zero and nothing are 1 in llama.cpp, but where
    its C++ multiplies by itself."""
    found, own = {}, GGUF_FIXED_AT.get((architecture, numbers["layers"]), {})
    for name, stated in family.multipliers.items():
        value, row = scales.get(name), GGUF_MULTIPLIERS.get(architecture, {}).get(name)
        unstated = power_of(own.get(name, {}), numbers)
        multiplier = unstated if value is None or row is None else row.multiplier(value, numbers)
        found[stated.key] = _short_decimal(stated.value(multiplier, numbers))
    return found


# --- rope ------------------------------------------------------------------------------------------------


def _rope(
    keys: _Keys,
    family: Family,
    tensors: Mapping[str, GgufTensor],
    read: ReadTensor,
    rotary_dim: int,
    window: int,
) -> dict[str, Any]:
    """The rope scaling in Hugging Face's spelling; empty where there is none. Problems go to `keys`."""
    kind = keys.get("rope.scaling.type", str)
    ratio = keys.get("rope.scaling.factor", float, zero=True) or keys.get("rope.scale_linear", float, zero=True) or 1.0
    original = keys.get("rope.scaling.original_context_length", int, zero=True)
    attention = keys.get("rope.scaling.attn_factor", float)
    there = [name for name in ROPE_TENSORS if name in tensors]
    factors = {name: _factors(keys, tensors[name], read, rotary_dim) for name in there}
    if kind != "none" and ratio * (original or window) > MAX_INTEGER:
        keys.problems.append(f"rope.scaling.factor {ratio:g} reaches beyond {MAX_INTEGER} tokens")
        return {}
    if there and 1 in (window, original):
        keys.problems.append("factors for a length of 1 token (context_length, rope.scaling.original_context_length)")
        return {}
    if there and ratio != 1.0:
        keys.problems.append(f"rope.scaling.factor {ratio:g} would apply on top of the factors of {', '.join(there)}")
    if there and kind not in (None, "none", "linear" if there == [STATIC] else "longrope"):
        keys.problems.append(f"rope.scaling.type is {kind!r}, but the file carries {', '.join(there)}")
    if kind == "longrope" or SHORT in there or LONG in there:
        # llama.cpp takes plain rope, or the short set for ever, where one of these is missing: no error, a wrong model.
        needed = {SHORT: SHORT in there, LONG: LONG in there}
        needed |= {keys.prefix + "rope.scaling.original_context_length": original}
        needed |= {keys.prefix + "rope.scaling.attn_factor": attention}
        if keys.prefix != "phi3.":  # which looks for the two tensors whatever the type says
            needed |= {f"{keys.prefix}rope.scaling.type": kind}
        if incomplete := [name for name, value in needed.items() if not value]:
            keys.problems.append(f"incomplete longrope: {', '.join(incomplete)} missing")
        if STATIC in there:
            keys.problems.append(f"{STATIC} contradicts longrope's two factor sets")
        # Where queries grow, the key says from where on, and sets that are equal don't change there.
        alike = keys.prefix.removesuffix(".") in GGUF_QUERY_SCALE and factors.get(SHORT) == factors.get(LONG)
        if original and window < original and not alike:
            keys.problems.append(
                f"context_length {window} is less than rope.scaling.original_context_length {original}"
            )
        if keys.problems or incomplete:
            return {}
        return _longrope(family, factors[SHORT], factors[LONG], original, window, attention)
    if STATIC in there:
        # One set for every length (Llama 3.1's files): two equal sets, so that the switch between them is none.
        # The window before an extension isn't in the file and doesn't matter to two equal sets.
        if all(factor == 1.0 for factor in factors[STATIC]) and attention in (None, 1.0):
            return {}
        return _longrope(family, factors[STATIC], factors[STATIC], window, window, attention or 1.0)
    if kind == "yarn":
        return _yarn(keys, ratio, original or window, attention or 1.0)
    if kind not in (None, "none", "linear"):
        keys.problems.append(f"rope.scaling.type is {kind!r:.60}; none, linear, yarn and longrope are known")
    elif attention not in (None, 1.0):
        keys.problems.append(f"rope.scaling.attn_factor {attention:g} without factors or yarn")
    if kind == "none" or ratio == 1.0:
        return {}
    return {"rope_scaling": {"rope_type": "linear", "factor": ratio}}


def _factors(keys: _Keys, tensor: GgufTensor, read: ReadTensor, rotary_dim: int) -> list[float]:
    if tensor.type.name != "F32":
        keys.problems.append(f"{tensor.name} is {tensor.type.name}; llama.cpp takes F32 factors only")
    elif tensor.shape != (rotary_dim // 2,):
        keys.problems.append(
            f"{tensor.name} has shape {list(tensor.shape)}; the model rotates {rotary_dim} channels, so "
            f"{rotary_dim // 2} values are needed"
        )
    else:
        values = read(tensor).astype(np.float64)
        if np.isfinite(values).all() and (values > 0).all():
            return values.tolist()
        keys.problems.append(f"{tensor.name} has values that are not positive numbers")
    return []


def _longrope(
    family: Family, short: list[float], long: list[float], original: int, window: int, attention: float
) -> dict[str, Any]:
    ratio = window / original
    scaling: dict[str, Any] = {"short_factor": short, "long_factor": long}
    formula = longrope_attention_factor(ratio, original)
    if family.hf_scaling == "three keys" and math.isclose(attention, formula, rel_tol=1e-6):
        scaling = {"type": "longrope", **scaling}  # the only form that transformers 4.57 takes
    else:
        scaling = {"rope_type": "longrope", **scaling, "factor": ratio, "attention_factor": attention}
        scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _yarn(keys: _Keys, ratio: float, original: int, attention: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": ratio,
        "original_max_position_embeddings": original,
    }
    for ours in ("beta_fast", "beta_slow"):
        if value := keys.get(f"rope.scaling.yarn_{ours}", float):
            scaling[ours] = value
    own = 0.1 * math.log(ratio) + 1.0
    divided = keys.prefix.removesuffix(".") in GGUF_YARN_DIVIDED
    divisor = keys.get("rope.scaling.yarn_log_multiplier", float, zero=True) if divided else None
    if divisor is not None:
        scaling |= {"mscale": 1.0, "mscale_all_dim": _short_decimal(divisor)}
        own /= 0.1 * divisor * math.log(ratio) + 1.0
    if attention != 1.0:  # llama.cpp multiplies it by YaRN's own, transformers replaces that
        scaling["attention_factor"] = attention * own
    for name, plain in (("ext_factor", 1.0), ("attn_factor", 1.0), ("log_multiplier", 0.0)):
        value = keys.header.metadata.get(f"{keys.prefix}rope.scaling.yarn_{name}", plain)
        if value != plain and not (divided and name == "log_multiplier"):
            keys.problems.append(f"rope.scaling.yarn_{name} is {value!r:.60}; no Hugging Face config can express that")
    return {"rope_scaling": scaling}
