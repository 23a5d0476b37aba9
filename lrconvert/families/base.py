# SPDX-License-Identifier: Apache-2.0
"""What a model family is: a table of tensors and the facts a config leaves out. Data, not behaviour.

A family is one file, `families/<model_type>.py`, that defines `FAMILY`. Readers, writers, the reference
and the checks all work from its rows: `role` is the name the project uses, `hf` and `gguf` are the
spellings of the formats, `shape` is in the symbols of `ModelShape.symbols`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lrconvert.families.experts import Experts, StatedExperts
from lrconvert.families.layers import StatedLayers
from lrconvert.families.multipliers import Multipliers, Stated
from lrconvert.families.query_scale import QueryScale

LAYER, EXPERT = "{layer}", "{expert}"
# Architectures of GGUF files whose q and k rows are permuted: llama.cpp rotates pairs (2i, 2i+1) there.
GGUF_INTERLEAVED = frozenset({"llama", "granite", "minicpm", "smollm3", "mistral3"})
# Layers that an architecture's C++ takes for other kinds: every n-th doesn't rotate; all but every n-th slide, where a
# file states a window, and rotate plainly.
GGUF_UNROTATED: Mapping[str, int] = {"smollm3": 4}
GGUF_SLIDING: Mapping[str, int] = {"olmo2": 4, "gemma3": 6}
GGUF_SLIDING_THETA = frozenset({"gemma3"})  # of them, those whose files state θ of these layers; else it is that of all
GGUF_STEP35 = "step35"  # targets/gguf/step35.py says how a family is written as it
# Whose C++ multiplies q and k of layers that slide with the attention factor too, but for YaRN's own.
GGUF_SLIDING_SCALED = frozenset({"gemma3"})
# What an architecture's loader insists on: as many channels of q as hidden ones; a head of its own; no biases.
GGUF_SQUARE = frozenset({"phi3", "olmo2"})
GGUF_UNTIED = frozenset({"olmo2"})
GGUF_UNBIASED = frozenset({"olmo2", "gemma3"})
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
# Architectures that leave gates as the softmax makes them; the others divide those of a token by their sum.
GGUF_UNNORMALISED = frozenset({"qwen2moe"})
# What an architecture's C++ multiplies with whatever a file says; of Gemma 3 27B, which it knows by its layers, more.
GGUF_FIXED: Mapping[str, Mapping[str, Mapping[str, float]]] = {"gemma3": {"embedding": {"hidden": 0.5}}}
GGUF_FIXED_AT: Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]] = {
    ("gemma3", 62): {"attention": {"head_dim": 0.5, "heads": 0.5, "hidden": -0.5}}
}
# Those that a file has to state: granite isn't loaded without its own, and minicpm has defaults that aren't 1.
GGUF_STATED = {"granite": frozenset({"logits"}), "minicpm": frozenset(_SCALES)}
# What states how a scale of queries grows, where an architecture's C++ has one: from `original_context_length` on,
# which is also where the short set ends.
GGUF_QUERY_SCALE: Mapping[str, str] = {"mistral3": "attention.temperature_scale"}
# Whose YaRN divides its attention factor by another one's, of a logarithm times `yarn_log_multiplier`.
GGUF_YARN_DIVIDED = frozenset({"mistral3"})


# What a gate passes through, and how configs call it.
Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the family (of every layer, where the names hold `{layer}`, and of every expert of it, where the
    Hugging Face name holds `{expert}`: a GGUF has one tensor for all experts of a layer, one expert after the other).

    `when` names a flag of `ModelShape` that must be set for the tensor to exist; None: always.
    `optional`: may be stored although nobody needs it (a tied lm_head).
    """

    role: str
    hf: str
    gguf: str
    shape: tuple[str, ...]
    when: str | None = None
    optional: bool = False


# Decoders that people look for here and the description can't say, by `model_type`: what each does.
NOT_READ: Mapping[str, str] = {
    "minicpm3": "has latent attention: keys and values are made of one narrow state, and what rotates of a head is no "
    "part of it",
}


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
    # Which layers attend to the last `sliding_window` tokens only: all of them; all where `use_sliding_window` is set;
    # those that it and `max_window_layers` or `layer_types` name; those that `layer_types` names, else all but every
    # n-th; those that it names, else those that don't rotate, where `use_sliding_window` is set; or none, whatever the
    # config says. "unclear": none, and `use_sliding_window` is refused, about which versions of transformers disagree.
    sliding: Literal["all", "switched", "named", "all but", "unrotated", "unclear"] | None = None
    layers: StatedLayers | None = None  # how configs state layers that differ; None: they are alike but for windows
    # How configs state the multipliers that this family has; those that are not here are 1.
    multipliers: Mapping[str, Stated] = field(default_factory=dict)
    fixed: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict
    )  # those that no key states, as `Stated.times`
    query_scale: str | None = None  # the rotary setting that states how a scale of queries grows with the position
    experts: StatedExperts | None = None  # how configs state experts; None: one MLP for all tokens
    norm: Literal["rms", "layer"] = "rms"  # what norms divide by: the root of the mean square, or the deviation
    norm_offset: float = 0.0  # what norms add to their weights
    activation: Activation = "silu"  # of the gate
    activation_key: str = "hidden_act"
    neighbours: bool = False  # channels 2i and 2i + 1 turn together; else i and i + half of those that rotate
    logits_cap: str | None = None  # the config key of logits' soft cap
    # Why no GGUF is written, where llama.cpp has an architecture of this name that computes something else.
    gguf_differs: str | None = None
    # The family whose class runs the weights once the multipliers are in them, where there is no class of its own.
    hf_written: str | None = None
    inert: frozenset[str] = frozenset()  # config keys of this family alone that change no logit
    # Config keys, and what a user has to know where one is set.
    remarks: Mapping[str, str] = field(default_factory=dict)
    hf_oldest: str | None = None  # the oldest transformers that loads longrope of this family, where 4.57 doesn't
    hf_states_head_size: bool = False  # transformers 4.57 fails on longrope without a head_dim
    # How transformers reads longrope: as most classes do; only {type, short_factor, long_factor} in 4.57; or with an
    # attention factor for each set, under keys that must be there (and in 5.x without ever using the long set).
    hf_scaling: Literal["full", "three keys", "mscales"] = "full"

    @property
    def own_keys(self) -> frozenset[str]:
        """Config keys that are understood in this family, beyond those of all families."""
        found = self.inert | {stated.key for stated in self.multipliers.values()}
        found |= frozenset() if self.experts is None else self.experts.keys
        found |= frozenset() if self.layers is None else self.layers.keys
        found |= {key for key in (self.logits_cap, self.activation_key) if key is not None}
        return found | {"lm_head_bias"} if HEAD_BIAS in self.rows else found

    @property
    def whole_qk_norms(self) -> bool:
        """Whether q and k pass through norms over all heads at once; else over each head, or none."""
        return any(row.role == "q_norm" and row.shape == ("q",) for row in self.rows)


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
    # Of each layer: None where the recipe rotates it; else θ of its own plain rotation, 0 for none. Empty: all None.
    own_theta: tuple[float | None, ...] = ()
    multipliers: Multipliers = field(default_factory=Multipliers)
    query_scale: QueryScale | None = None
    experts: Experts | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    activation: Activation = "silu"
    neighbours: bool = False
    logits_cap: float = 0.0  # logits stay within it on both sides; 0: they have no cap
    head_bias: bool = False

    def slides_within(self, window: int) -> bool:
        """Whether a layer attends to less than a sequence of `window` tokens."""
        return any(0 < width < window for width in self.sliding)

    @property
    def plain_theta(self) -> float | None:
        """θ of the layers that slide, where they rotate by themselves: seeing further, they would be another model."""
        return next(filter(None, self.own_theta), None)

    def turn(self, layer: int) -> float | None:
        """None where the recipe rotates a layer; else θ of its own plain rotation, 0 for none."""
        return self.own_theta[layer] if self.own_theta else None

    @property
    def untied(self) -> bool:
        return not self.tied

    @property
    def numbers(self) -> dict[str, int]:
        """What `Stated.times` may name."""
        return {"layers": self.layers, "hidden": self.hidden, "head_dim": self.head_dim, "heads": self.heads}

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
            **({} if self.experts is None else self.experts.symbols),
        }


# Role and layer; of an expert's tensor its number too.
Key = tuple[str, int | None] | tuple[str, int | None, int]


@dataclass(frozen=True)
class ExpectedTensor:
    """A row filled in for one layer of one model, and for one expert of it."""

    role: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    required: bool
    expert: int | None = None

    @property
    def key(self) -> Key:
        """Which tensor of the model it is."""
        return (self.role, self.layer) if self.expert is None else (self.role, self.layer, self.expert)


def expected_tensors(family: Family, shape: ModelShape) -> Iterator[ExpectedTensor]:
    """Every tensor that a checkpoint of this shape holds, row by row of the table."""
    symbols = shape.symbols
    count = 0 if shape.experts is None else shape.experts.count
    for row in family.rows:
        wanted = row.when is None or bool(getattr(shape, row.when))
        if not wanted and not row.optional:
            continue
        dims = tuple(symbols[symbol] for symbol in row.shape)
        layers = range(shape.layers) if LAYER in row.hf else (None,)
        for layer in layers:
            name = row.hf.replace(LAYER, str(layer))
            for expert in range(count) if EXPERT in row.hf else (None,):
                own = name.replace(EXPERT, str(expert))
                yield ExpectedTensor(row.role, layer, own, dims, required=wanted, expert=expert)


def is_norm(role: str) -> bool:
    """Whether a role is a norm's weight, to which `norm_offset` is added."""
    return role.endswith("norm")


# --- rows that most decoders share -----------------------------------------------------------------------

_HF, _GGUF = "model.layers.{layer}.", "blk.{layer}."

EMBEDDING = TensorRow("embedding", "model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden"))
FINAL_NORM = TensorRow("final_norm", "model.norm.weight", "output_norm.weight", ("hidden",))
HEAD_BIAS = TensorRow("lm_head_bias", "lm_head.bias", "output.bias", ("vocab",), when="head_bias")
LM_HEAD = TensorRow("lm_head", "lm_head.weight", "output.weight", ("vocab", "hidden"), when="untied", optional=True)


def layer_row(role: str, hf: str, gguf: str, *shape: str, when: str | None = None) -> TensorRow:
    """A row of every layer; `hf` and `gguf` without their layer prefixes."""
    return TensorRow(role, _HF + hf, _GGUF + gguf, shape, when)


NORMS = (
    layer_row("attention_norm", "input_layernorm.weight", "attn_norm.weight", "hidden"),
    layer_row("ffn_norm", "post_attention_layernorm.weight", "ffn_norm.weight", "hidden"),
)
POST_NORMS = (
    layer_row("attention_post_norm", "post_attention_layernorm.weight", "post_attention_norm.weight", "hidden"),
    layer_row("ffn_post_norm", "post_feedforward_layernorm.weight", "post_ffw_norm.weight", "hidden"),
)
NORM_BIASES = (
    layer_row("attention_norm_bias", "input_layernorm.bias", "attn_norm.bias", "hidden"),
    layer_row("ffn_norm_bias", "post_attention_layernorm.bias", "ffn_norm.bias", "hidden"),
    TensorRow("final_norm_bias", "model.norm.bias", "output_norm.bias", ("hidden",)),
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
WHOLE_QK_NORMS = (
    layer_row("q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight", "q"),
    layer_row("k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight", "kv"),
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


def expert_rows(block: str, gate: str, up: str, down: str) -> tuple[TensorRow, ...]:
    """A router and its experts, under the names that the family has for the block and an expert's three products."""
    own = f"{block}.experts.{EXPERT}."
    return (
        layer_row("router", f"{block}.gate.weight", "ffn_gate_inp.weight", "experts", "hidden"),
        layer_row("expert_gate", f"{own}{gate}.weight", "ffn_gate_exps.weight", "expert_ffn", "hidden"),
        layer_row("expert_up", f"{own}{up}.weight", "ffn_up_exps.weight", "expert_ffn", "hidden"),
        layer_row("expert_down", f"{own}{down}.weight", "ffn_down_exps.weight", "hidden", "expert_ffn"),
    )


# One more, which every token uses, with a gate of its own.
SHARED_EXPERT = (
    layer_row("shared_router", "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", "one", "hidden"),
    layer_row("shared_gate", "mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight", "shared_ffn", "hidden"),
    layer_row("shared_up", "mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight", "shared_ffn", "hidden"),
    layer_row("shared_down", "mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight", "hidden", "shared_ffn"),
)


# Rotary tables that old versions of transformers stored with the weights; nobody reads them.
STORED_TABLES = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
