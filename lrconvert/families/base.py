# SPDX-License-Identifier: Apache-2.0
"""What a model family is: a table of tensors and the facts a config leaves out. Data, not behaviour.

A family is one file, `families/<model_type>.py`, that defines `FAMILY`. Readers, writers, the reference
and the checks all work from its rows: `role` is the name the project uses, `hf` and `gguf` are the
spellings of the formats, `shape` is in the symbols of `ModelShape.symbols`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families.keys import check_keys
from lrconvert.families.multipliers import Multipliers, Stated

LAYER = "{layer}"
# Architectures of GGUF files whose q and k rows are permuted: llama.cpp rotates pairs (2i, 2i+1) there.
GGUF_INTERLEAVED = frozenset({"llama", "granite", "minicpm"})
GGUF_STEP35 = "step35"  # targets/gguf/step35.py says how a family is written as it
# How the files of an architecture state multipliers; its C++ computes no others.
_SCALES = {
    "embedding": Stated("embedding_scale"),
    "residual": Stated("residual_scale"),
    "logits": Stated("logit_scale", power=-1),
}
GGUF_MULTIPLIERS: Mapping[str, Mapping[str, Stated]] = {
    "granite": {**_SCALES, "attention": Stated("attention.scale", times={"head_dim": 0.5})},
    "minicpm": _SCALES,
}
# Those that a file has to state: granite isn't loaded without its own, and minicpm has defaults that aren't 1.
GGUF_STATED = {"granite": frozenset({"logits"}), "minicpm": frozenset(_SCALES)}
# Counts beyond these are damage or malice, not a model; they also bound the time and memory of the checks.
MAX_LAYERS = 4096
MAX_COUNT = {"num_hidden_layers": MAX_LAYERS, "default": 2**31 - 1}
LAYER_KINDS = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the family (of every layer, where the names hold `{layer}`).

    `when` names a flag of `ModelShape` that must be set for the tensor to exist; None: always.
    `optional`: may be stored although nobody needs it (a tied lm_head).
    """

    role: str
    hf: str
    gguf: str
    shape: tuple[str, ...]
    when: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """A model architecture that can be read, and how the targets call it."""

    name: str  # the model_type of Hugging Face configs
    hf_class: str  # the native class in transformers
    gguf_architecture: str  # of the files that others write
    rows: tuple[TensorRow, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what configs of this family may omit
    ignored: tuple[str, ...] = ()  # stored by some programs, never used
    # The GGUF architecture whose C++ honours longrope factors for this family's weights; None: there is none.
    gguf_longrope: str | None = None
    gguf_other: str | None = None  # one that does with more than its weights, so that a user has to ask for it
    # What names of scalings mean in this family's configs, where that is not what they mean in others.
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    # Which layers attend to the last `sliding_window` tokens only: all of them, those that `use_sliding_window` and
    # `max_window_layers` or `layer_types` name, or none, whatever the config says.
    sliding: Literal["all", "named"] | None = None
    # How configs state the multipliers that this family has; those that are not here are 1.
    multipliers: Mapping[str, Stated] = field(default_factory=dict)
    # The family whose class runs the weights once the multipliers are in them, where there is no class of its own.
    hf_written: str | None = None
    inert: frozenset[str] = frozenset()  # config keys of this family alone that change no logit
    # Config keys, and what a user has to know where one is set.
    remarks: Mapping[str, str] = field(default_factory=dict)
    hf_states_head_size: bool = False  # transformers 4.57 fails on longrope without a head_dim
    hf_three_key_scaling: bool = False  # transformers 4.57 takes only {type, short_factor, long_factor}


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a config that decide shapes and rotation, checked."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    theta: float
    window: int  # max_position_embeddings
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    # How many tokens each layer attends to, itself included; 0 for all. Empty where no layer has a limit.
    sliding: tuple[int, ...] = ()
    multipliers: Multipliers = field(default_factory=Multipliers)

    def slides_within(self, window: int) -> bool:
        """Whether a layer attends to less than a sequence of `window` tokens."""
        return any(0 < width < window for width in self.sliding)

    @property
    def untied(self) -> bool:
        return not self.tied

    @property
    def numbers(self) -> dict[str, int]:
        """What `Stated.times` may name."""
        return {"layers": self.layers, "hidden": self.hidden, "head_dim": self.head_dim}

    @property
    def symbols(self) -> dict[str, int]:
        """The symbols that `TensorRow.shape` may use."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "hidden": self.hidden,
            "head_dim": self.head_dim,
            "q": query,
            "kv": key,
            "qkv": query + 2 * key,
            "ffn": self.ffn,
            "2ffn": 2 * self.ffn,
            "vocab": self.vocab,
        }


@dataclass(frozen=True)
class ExpectedTensor:
    """A row filled in for one layer of one model."""

    role: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    required: bool


def expected_tensors(family: Family, shape: ModelShape) -> Iterator[ExpectedTensor]:
    """Every tensor that a checkpoint of this shape holds, in file order: layer by layer."""
    symbols = shape.symbols
    for row in family.rows:
        wanted = row.when is None or bool(getattr(shape, row.when))
        if not wanted and not row.optional:
            continue
        dims = tuple(symbols[symbol] for symbol in row.shape)
        layers = range(shape.layers) if LAYER in row.hf else (None,)
        for layer in layers:
            name = row.hf.replace(LAYER, str(layer))
            yield ExpectedTensor(row.role, layer, name, dims, required=wanted)


# --- rows that most decoders share -----------------------------------------------------------------------

_HF, _GGUF = "model.layers.{layer}.", "blk.{layer}."

EMBEDDING = TensorRow("embedding", "model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden"))
FINAL_NORM = TensorRow("final_norm", "model.norm.weight", "output_norm.weight", ("hidden",))
LM_HEAD = TensorRow("lm_head", "lm_head.weight", "output.weight", ("vocab", "hidden"), when="untied", optional=True)


def layer_row(role: str, hf: str, gguf: str, *shape: str, when: str | None = None) -> TensorRow:
    """A row of every layer; `hf` and `gguf` without their layer prefixes."""
    return TensorRow(role, _HF + hf, _GGUF + gguf, shape, when)


NORMS = (
    layer_row("attention_norm", "input_layernorm.weight", "attn_norm.weight", "hidden"),
    layer_row("ffn_norm", "post_attention_layernorm.weight", "ffn_norm.weight", "hidden"),
)
ATTENTION = (
    layer_row("q", "self_attn.q_proj.weight", "attn_q.weight", "q", "hidden"),
    layer_row("k", "self_attn.k_proj.weight", "attn_k.weight", "kv", "hidden"),
    layer_row("v", "self_attn.v_proj.weight", "attn_v.weight", "kv", "hidden"),
    layer_row("o", "self_attn.o_proj.weight", "attn_output.weight", "hidden", "q"),
)
QKV_BIASES = (
    layer_row("q_bias", "self_attn.q_proj.bias", "attn_q.bias", "q", when="attention_bias"),
    layer_row("k_bias", "self_attn.k_proj.bias", "attn_k.bias", "kv", when="attention_bias"),
    layer_row("v_bias", "self_attn.v_proj.bias", "attn_v.bias", "kv", when="attention_bias"),
)
O_BIAS = (layer_row("o_bias", "self_attn.o_proj.bias", "attn_output.bias", "hidden", when="attention_bias"),)
QK_NORMS = (
    layer_row("q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight", "head_dim"),
    layer_row("k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight", "head_dim"),
)
MLP = (
    layer_row("gate", "mlp.gate_proj.weight", "ffn_gate.weight", "ffn", "hidden"),
    layer_row("up", "mlp.up_proj.weight", "ffn_up.weight", "ffn", "hidden"),
    layer_row("down", "mlp.down_proj.weight", "ffn_down.weight", "hidden", "ffn"),
)
MLP_BIASES = (
    layer_row("gate_bias", "mlp.gate_proj.bias", "ffn_gate.bias", "ffn", when="mlp_bias"),
    layer_row("up_bias", "mlp.up_proj.bias", "ffn_up.bias", "ffn", when="mlp_bias"),
    layer_row("down_bias", "mlp.down_proj.bias", "ffn_down.bias", "hidden", when="mlp_bias"),
)
# Rotary tables that old versions of transformers stored with the weights; nobody reads them.
STORED_TABLES = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


# --- reading a config ------------------------------------------------------------------------------------


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
    if family.sliding is None or reader.values.get("sliding_window") in (None, False):
        return ()
    width, layers = reader.integer("sliding_window"), min(reader.integer("num_hidden_layers"), MAX_LAYERS)
    if family.sliding == "all":
        return (width,) * layers
    if not reader.flag("use_sliding_window"):
        return ()
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


def _short(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_shape(config: Mapping[str, Any], family: Family) -> ModelShape:
    """The checked numbers of a Hugging Face config. Raises `InputError` listing every bad key, and `UnsupportedError`
    naming those that change what the model computes and aren't understood."""
    reader = _Reader(config, family)
    section = rope_section(config)
    own = family.inert | {multiplier.key for multiplier in family.multipliers.values()}
    check_keys(config, section, family.name if family.rows else "", own)
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
    )
    shape = replace(shape, multipliers=_multipliers(reader, family, shape))
    if reader.problems:
        raise InputError.collect("config.json", reader.problems)
    return shape
