# SPDX-License-Identifier: Apache-2.0
"""The quantisation schemes of llama.cpp as data, and the type of every tensor under one.

A scheme (Q4_K_M, …) is a base type and a few rules that give some tensors another one. The rules say what
`llama_model_quantize` does (llama.cpp, src/llama-quant.cpp, v0.5.0) for the architectures written here, `llama`
and `phi3`; `tools/quantise_reference.py` records what it really chooses, and the tests compare tensor by tensor.

Two things that the names do not tell. The fused `attn_qkv` of phi3 is treated as `attn_v` (llama.cpp has rules of
its own for it, which come after and are never reached). And a model without `output.weight` computes its logits
with `token_embd.weight`, which then gets the type of an output.

A layer's experts in one tensor get the type of an MLP. Attention is a small part of a model with eight experts, and
gets more bits there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from lrconvert.errors import UsageError
from lrconvert.precision import short_name

Type = GGMLQuantizationType

FLOATS = frozenset({Type.F32, Type.F16, Type.BF16})
EIGHT = 8  # experts: Mixtral's count, which llama.cpp has rules for


@dataclass(frozen=True)
class MixFacts:
    """What the rules depend on, besides the tensor."""

    architecture: str  # general.architecture of the file: llama or phi3
    layers: int
    heads: int
    kv_heads: int
    tied: bool  # the file has no output.weight
    imatrix: bool = False  # an importance matrix is used
    experts: int = 0  # in a layer

    @property
    def grouped(self) -> bool:
        """At least four heads share keys and values, so that `attn_v` is small and deserves more bits."""
        return self.heads // self.kv_heads >= 4

    @property
    def like_70b(self) -> bool:
        """llama.cpp takes a `llama` of 80 layers whose heads share keys and values for a 70B model."""
        return self.architecture == "llama" and self.layers == 80 and self.heads != self.kv_heads


# --- rules -----------------------------------------------------------------------------------------------

Condition = Callable[[int, MixFacts], bool]  # of the layer, from 0, and the facts


def _always(layer: int, facts: MixFacts) -> bool:
    return True


def _first(count: int) -> Condition:
    return lambda layer, facts: layer < count


def _first_part(divisor: int) -> Condition:
    """The first 1/divisor of the layers, rounded down."""
    return lambda layer, facts: layer < facts.layers // divisor


def _middle(layer: int, facts: MixFacts) -> bool:
    """Neither in the first nor in the last eighth."""
    return facts.layers // 8 <= layer < 7 * facts.layers // 8


def _more_bits(layer: int, facts: MixFacts) -> bool:
    """The first and the last eighth, and every third layer between: the layers whose errors cost most."""
    return not _middle(layer, facts) or (layer - facts.layers // 8) % 3 == 2


def _grouped(layer: int, facts: MixFacts) -> bool:
    return facts.grouped


def _eight(layer: int, facts: MixFacts) -> bool:
    return facts.experts == EIGHT


def _grouped_or_experts(layer: int, facts: MixFacts) -> bool:
    return facts.grouped or facts.experts >= EIGHT // 2


def _either(one: Condition, other: Condition) -> Condition:
    return lambda layer, facts: one(layer, facts) or other(layer, facts)


def _both(one: Condition, other: Condition) -> Condition:
    return lambda layer, facts: one(layer, facts) and other(layer, facts)


def _with_matrix(condition: Condition) -> Condition:
    return lambda layer, facts: facts.imatrix and condition(layer, facts)


def _without_matrix(condition: Condition) -> Condition:
    return lambda layer, facts: not facts.imatrix and condition(layer, facts)


@dataclass(frozen=True)
class Rule:
    """Tensors of a role get this type where the condition holds."""

    role: str  # what stands between `blk.N.` and `.weight`, `token_embd`; attn_v is attn_qkv as well
    kind: GGMLQuantizationType
    when: Condition = _always


@dataclass(frozen=True)
class Scheme:
    """A way to quantise a model. The first rule that fits decides; without one it is the base type."""

    name: str
    file_type: LlamaFileType  # general.file_type
    base: GGMLQuantizationType
    rules: tuple[Rule, ...] = ()
    output: GGMLQuantizationType = Type.Q6_K  # of output.weight, or of token_embd.weight where that is the output
    lifts_70b: bool = True  # attn_v of a 70B model goes up to Q5_K

    @property
    def quantised(self) -> bool:
        return self.base not in FLOATS


_OUTPUT_OF_EIGHT = Rule("attn_output", Type.Q5_K, _eight)


def _low_bits(name: str, file_type: LlamaFileType, base: Type, better: Type, attn_output: Type | None) -> Scheme:
    """A scheme of about two bits or fewer: where it hurts most, tensors get the type `better`."""
    embedding = Type.IQ3_S if better == Type.IQ3_S else Type.Q2_K
    rules = [
        Rule("token_embd", embedding),
        Rule("attn_v", Type.Q4_K, _grouped_or_experts),
        Rule("attn_k", Type.Q4_K, _eight),
        _OUTPUT_OF_EIGHT,
        Rule("attn_v", better),
        Rule("ffn_down", better, _first_part(8)),
    ]
    if attn_output is not None:
        rules.append(Rule("attn_output", attn_output))
    return Scheme(name, file_type, base, tuple(rules), output=Type.Q5_K, lifts_70b=False)


_FILE = LlamaFileType
_IQ4_RULES = (
    _OUTPUT_OF_EIGHT,
    Rule("attn_v", Type.Q5_K, _grouped),
    Rule("ffn_down", Type.Q5_K, _without_matrix(_first_part(8))),
)
_MORE_BITS_RULES = (Rule("attn_v", Type.Q6_K, _more_bits), Rule("ffn_down", Type.Q6_K, _more_bits))

_ALL = (
    Scheme("f32", _FILE.ALL_F32, Type.F32),
    Scheme("f16", _FILE.MOSTLY_F16, Type.F16),
    Scheme("bf16", _FILE.MOSTLY_BF16, Type.BF16),
    Scheme("q8_0", _FILE.MOSTLY_Q8_0, Type.Q8_0, output=Type.Q8_0),
    # An importance matrix can make Q4_0 and Q5_0 go wrong in the first layers.
    Scheme("q4_0", _FILE.MOSTLY_Q4_0, Type.Q4_0, (Rule("ffn_down", Type.Q4_1, _with_matrix(_first_part(8))),)),
    Scheme("q4_1", _FILE.MOSTLY_Q4_1, Type.Q4_1),
    Scheme("q5_0", _FILE.MOSTLY_Q5_0, Type.Q5_0, (Rule("ffn_down", Type.Q5_1, _with_matrix(_first_part(8))),)),
    Scheme("q5_1", _FILE.MOSTLY_Q5_1, Type.Q5_1),
    Scheme(
        "q2_k",
        _FILE.MOSTLY_Q2_K,
        Type.Q2_K,
        (
            _OUTPUT_OF_EIGHT,
            Rule("attn_v", Type.Q4_K, _grouped),
            Rule("attn_v", Type.Q3_K),
            Rule("ffn_down", Type.Q3_K),
            Rule("attn_output", Type.Q3_K),
        ),
    ),
    Scheme(
        "q2_k_s",
        _FILE.MOSTLY_Q2_K_S,
        Type.Q2_K,
        (Rule("attn_v", Type.Q4_K, _grouped), Rule("ffn_down", Type.Q4_K, _first_part(8))),
    ),
    Scheme("q3_k_s", _FILE.MOSTLY_Q3_K_S, Type.Q3_K, (_OUTPUT_OF_EIGHT,)),
    Scheme(
        "q3_k_m",
        _FILE.MOSTLY_Q3_K_M,
        Type.Q3_K,
        (
            _OUTPUT_OF_EIGHT,
            Rule("attn_v", Type.Q5_K, _first(2)),
            Rule("attn_v", Type.Q4_K),
            Rule("ffn_down", Type.Q5_K, _first_part(16)),
            Rule("ffn_down", Type.Q4_K),
            Rule("attn_output", Type.Q4_K),
        ),
    ),
    Scheme(
        "q3_k_l",
        _FILE.MOSTLY_Q3_K_L,
        Type.Q3_K,
        (
            Rule("attn_output", Type.Q3_K, _eight),
            Rule("attn_v", Type.Q5_K),
            Rule("ffn_down", Type.Q5_K),
            Rule("attn_output", Type.Q5_K),
        ),
    ),
    Scheme(
        "q4_k_s",
        _FILE.MOSTLY_Q4_K_S,
        Type.Q4_K,
        (_OUTPUT_OF_EIGHT, Rule("attn_v", Type.Q5_K, _first(4)), Rule("ffn_down", Type.Q5_K, _first_part(8))),
    ),
    Scheme("q4_k_m", _FILE.MOSTLY_Q4_K_M, Type.Q4_K, (_OUTPUT_OF_EIGHT, *_MORE_BITS_RULES)),
    Scheme("q5_k_s", _FILE.MOSTLY_Q5_K_S, Type.Q5_K),
    Scheme("q5_k_m", _FILE.MOSTLY_Q5_K_M, Type.Q5_K, _MORE_BITS_RULES),
    Scheme("q6_k", _FILE.MOSTLY_Q6_K, Type.Q6_K),
    Scheme("iq4_nl", _FILE.MOSTLY_IQ4_NL, Type.IQ4_NL, _IQ4_RULES),
    Scheme("iq4_xs", _FILE.MOSTLY_IQ4_XS, Type.IQ4_XS, _IQ4_RULES),
    Scheme(
        "iq3_xxs",
        _FILE.MOSTLY_IQ3_XXS,
        Type.IQ3_XXS,
        (
            Rule("token_embd", Type.IQ3_S),
            _OUTPUT_OF_EIGHT,
            Rule("attn_v", Type.Q4_K, _grouped),
            Rule("attn_q", Type.IQ2_S),
            Rule("attn_k", Type.IQ2_S),
            Rule("attn_output", Type.IQ3_S),
            # Without a matrix only where no other tensor needs one, because rows are no multiple of 256.
            Rule("ffn_down", Type.Q4_K, _without_matrix(_first_part(8))),
            Rule("ffn_down", Type.Q3_K, _without_matrix(_always)),
        ),
        output=Type.Q5_K,
    ),
    Scheme(
        "iq3_xs",
        _FILE.MOSTLY_IQ3_XS,
        Type.IQ3_S,
        (
            _OUTPUT_OF_EIGHT,
            Rule("attn_v", Type.Q4_K, _grouped),
            Rule("attn_q", Type.IQ3_XXS),
            Rule("attn_k", Type.IQ3_XXS),
            Rule("ffn_gate", Type.IQ3_XXS, _middle),
            Rule("ffn_up", Type.IQ3_XXS, _middle),
        ),
    ),
    Scheme("iq3_s", _FILE.MOSTLY_IQ3_S, Type.IQ3_S, (_OUTPUT_OF_EIGHT, Rule("attn_v", Type.Q4_K, _grouped))),
    Scheme(
        "iq3_m",
        _FILE.MOSTLY_IQ3_M,
        Type.IQ3_S,
        (
            _OUTPUT_OF_EIGHT,
            Rule("attn_v", Type.Q4_K),
            Rule("ffn_down", Type.Q4_K, _either(_first_part(8), _both(_eight, _more_bits))),
            Rule("attn_output", Type.Q4_K),
        ),
    ),
    _low_bits("iq2_xxs", _FILE.MOSTLY_IQ2_XXS, Type.IQ2_XXS, Type.Q2_K, None),
    _low_bits("iq2_xs", _FILE.MOSTLY_IQ2_XS, Type.IQ2_XS, Type.Q2_K, None),
    _low_bits("iq2_s", _FILE.MOSTLY_IQ2_S, Type.IQ2_XS, Type.IQ3_S, Type.IQ3_S),
    _low_bits("iq2_m", _FILE.MOSTLY_IQ2_M, Type.IQ2_S, Type.IQ3_S, Type.IQ3_S),
    _low_bits("iq1_s", _FILE.MOSTLY_IQ1_S, Type.IQ1_S, Type.Q2_K, Type.IQ2_XXS),
    _low_bits("iq1_m", _FILE.MOSTLY_IQ1_M, Type.IQ1_M, Type.Q2_K, Type.IQ2_XXS),
)
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_BY_NAME = {scheme.name: scheme for scheme in _ALL}

SCHEMES: Mapping[str, Scheme] = MappingProxyType(_BY_NAME | {alias: _BY_NAME[name] for alias, name in _ALIASES.items()})


def get_scheme(name: str) -> Scheme:
    """The scheme of a name, in any case. Raises `UsageError` that lists them."""
    scheme = SCHEMES.get(short_name(name.lower()))
    if scheme is None:
        raise UsageError(f"no scheme is named {name!r}; there are {', '.join(SCHEMES)}")
    return scheme


# --- the type of a tensor ------------------------------------------------------------------------------------

# Types whose blocks have 256 values, with the one that takes their place where rows are no multiple of that.
# Its blocks have 32, as those of the types that are not here; rows that are no multiple of 32 are stored as F16.
_FALLBACK = {
    Type.IQ1_S: Type.IQ4_NL,
    Type.IQ1_M: Type.IQ4_NL,
    Type.IQ2_XXS: Type.IQ4_NL,
    Type.IQ2_XS: Type.IQ4_NL,
    Type.IQ2_S: Type.IQ4_NL,
    Type.IQ3_XXS: Type.IQ4_NL,
    Type.IQ3_S: Type.IQ4_NL,
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<role>.+)\.weight")
_OUTPUT, _EMBEDDING, _ROUTER = "output", "token_embd", "ffn_gate_inp"
_NEEDS_MATRIX = frozenset({Type.IQ3_XXS, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ1_M, Type.IQ1_S})


def tensor_type(scheme: Scheme, name: str, shape: tuple[int, ...], facts: MixFacts) -> GGMLQuantizationType:
    """The type that a tensor gets: `name` as GGUF spells it, `shape` in the order of NumPy (rows, columns)."""
    match = _NAME.fullmatch(name)
    if match is None or not _is_matrix(shape) or match["role"].endswith(("_norm", _ROUTER)):
        return Type.F32
    if not scheme.quantised:
        return scheme.base
    role = match["role"].replace("attn_qkv", "attn_v").removesuffix("_exps").removesuffix("_shexp")
    if role == _OUTPUT or (role == _EMBEDDING and facts.tied):
        wanted = scheme.output if _fits(scheme.base, shape) else Type.Q8_0
    else:
        wanted = _by_rules(scheme, role, int(match["layer"] or 0), facts)
    return _fitting(wanted, shape)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Two dimensions as ggml counts them: a single row is a vector."""
    return len(shape) >= 2 and any(size > 1 for size in shape[:-1])


def _fits(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> bool:
    return shape[-1] % GGML_QUANT_SIZES[kind][0] == 0


def _by_rules(scheme: Scheme, role: str, layer: int, facts: MixFacts) -> GGMLQuantizationType:
    if facts.experts == EIGHT and role in ("attn_v", "attn_k") and scheme.lifts_70b:
        return Type.Q8_0  # attention is a small part of a model with eight experts: 128 MB of Mixtral 8x7B
    fitting = (rule.kind for rule in scheme.rules if rule.role == role and rule.when(layer, facts))
    kind = next(fitting, scheme.base)
    # Eight heads share attn_v in the 70B model: more bits for it cost next to nothing.
    lifted = role == "attn_v" and facts.like_70b and scheme.lifts_70b and kind in (Type.Q3_K, Type.Q4_K)
    return Type.Q5_K if lifted else kind


def _fitting(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """The type, or the one in its place for rows of this length."""
    if not _fits(kind, shape):
        kind = _FALLBACK.get(kind, Type.F16)
    return kind if _fits(kind, shape) else Type.F16


def needs_matrix(scheme: Scheme, name: str, kind: GGMLQuantizationType) -> bool:
    """Whether llama.cpp refuses to quantise this tensor without an importance matrix: the result would be noise."""
    if name in (f"{_OUTPUT}.weight", f"{_EMBEDDING}.weight"):
        return False
    return kind in _NEEDS_MATRIX or (kind == Type.Q2_K and scheme.name == "q2_k_s")
