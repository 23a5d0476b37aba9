# SPDX-License-Identifier: Apache-2.0
"""What other programs do with a longrope config: one table of facts, each with its source.

`assess` checks a recipe against every row. Re-measure when versions move, and make the page again (`engines.page`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from lrconvert.engines.capability import (
    CUSTOM_HF,
    LLAMA_CPP,
    MLX,
    NATIVE_HF,
    NATIVE_HF_FORMULA,
    VLLM,
    Capability,
)
from lrconvert.engines.engine import (
    Engine,
    Rule,
    Verdict,
    attention_factor,
    exactly,
    has,
    named,
    verdict,
    where,
    within,
)
from lrconvert.engines.rules import (
    ALWAYS_LONG,
    BY_BATCH,
    BY_FORWARD,
    BY_FORWARD_ANEW,
    BY_FORWARD_EXPORTED,
    BY_POSITION,
    BY_ROW,
    DROPPED,
    FROZEN_SHORT,
    IN_GRAPH,
    NEVER_LONG,
    ONCE,
    ONCE_ASKED,
    ONCE_PADDED,
    REFUSED,
)
from lrconvert.families import ModelShape
from lrconvert.rope import RopeSpec

# --- the table -------------------------------------------------------------------------------------------


def _config_reader(name: str, attention: Literal["one", "formula"] = "formula") -> Capability:
    """A program that reads the native keys: two sets, no start tokens."""
    return Capability(name, 2, False, attention, False, False)


def _own_factors(name: str) -> Capability:
    """Code with an attention factor for each set, in keys of its own."""
    return Capability(name, 2, False, "per tier", False, False)


def _families(*names: str) -> frozenset[str]:
    return frozenset(names)


# Those that were looked at when a program's row was made; whether it runs later ones so, nobody has asked.
_FIRST = _families("llama", "mistral", "qwen2", "qwen3", "phi3")
# Any of these spellings, where a program takes both of transformers' sections.
_INNER = tuple(f"{section}.original_max_position_embeddings" for section in ("rope_scaling", "rope_parameters"))
_TOP = "original_max_position_embeddings"
_SECTION, _OLD_SECTION = has("rope_scaling", "rope_parameters"), has("rope_scaling")
_TYPE = has("rope_scaling.type", otherwise="refuses")
_OLD, _NEW = "transformers 4.57, native", "transformers 5, native"
# What 4.57 needs of every family but Phi-3: without the window it takes `factor`, and fails where that is missing too.
_OLD_NEEDS = (
    _OLD_SECTION,
    has(_TOP),
    within("rope_scaling", has(_TOP, "rope_scaling.factor", otherwise="refuses")),
    named("longrope"),
)
_NEW_NEEDS = (_SECTION, has(_TOP, *_INNER), named("longrope"))
_GROWTH = has("rope_scaling.llama_4_scaling_beta", "rope_parameters.llama_4_scaling_beta", otherwise="refuses")
_HEAD_SIZE = within("rope_scaling", has("head_dim", otherwise="refuses"))
_NEW_HEAD_SIZE = has("head_dim", otherwise="refuses")
_NEW_TYPE = within("rope_scaling", has("rope_scaling.rope_type", otherwise="refuses"))
_KINDS_NEEDS = (
    *(
        has(*(f"{section}.{key}" for section in ("rope_scaling", "rope_parameters.full_attention")))
        for key in ("rope_type", _TOP)
    ),
    within("rope_scaling", within("rope_parameters", has("rope_parameters.full_attention", otherwise="refuses"))),
)
_MSCALES = ("short_mscale", "long_mscale", _TOP)  # all inside the section
_PHI3_TYPES = named("longrope", "su", "yarn")
_NEW_PHI3_NEEDS = (
    _SECTION,
    has(_TOP),
    _PHI3_TYPES,
    where("su", has(*_INNER, otherwise="refuses")),
    attention_factor("rope_scaling.attention_factor", "rope_parameters.attention_factor"),
)
# How a fact is known. What no test can ask where they run was seen once.
TESTED, MEASURED, READ = "tested", "measured 2026-11-25", "read 2026-11-25"
_BASELINE = "2026-11-29"  # benchmarks/onnx_baseline.py, in environments of their own
_PICO = "KL against a float64 reference on pico models"
_GGML, _CONVERTER = "as of llama-cpp-python 0.3.36", "llama.cpp, its own converter"
_BAKED_GGUF = "llama.cpp, a file with the factors"

ENGINES: tuple[Engine, ...] = (
    Engine(
        replace(NATIVE_HF, name=_OLD),
        "4.57.6",
        TESTED,
        "modeling_rope_utils.py; issue 33129; `lrconvert verify`",
        BY_FORWARD,
        _families("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3", "glm4"),
        _OLD_NEEDS,
    ),
    Engine(
        replace(NATIVE_HF, name=_OLD),
        "4.57.6",
        TESTED,
        "configuration_mistral.py, configuration_mixtral.py, which leave head_dim empty; the rest as above",
        BY_FORWARD,
        _families("mistral", "mixtral"),
        (*_OLD_NEEDS, _HEAD_SIZE),
    ),
    Engine(
        replace(NATIVE_HF, name=_OLD),
        "4.57.6",
        TESTED,
        "configuration_granite.py, configuration_olmo3.py, which don't know the older key `type`; the rest as above",
        BY_FORWARD,
        _families("granite", "olmo3", "gemma3_text"),
        (*_OLD_NEEDS, _NEW_TYPE),
    ),
    Engine(
        replace(NATIVE_HF, name=_OLD),
        "4.57.6",
        TESTED,
        "configuration_olmo2.py",
        Rule("not at all", refuses="its config class loads `linear` and `dynamic` alone", section="rope_scaling"),
        _families("olmo2"),
        (_OLD_SECTION,),
    ),
    Engine(
        replace(NATIVE_HF, name=_OLD),
        "4.57.6",
        TESTED,
        "models/, where there is no such model",
        Rule("not at all", refuses="it knows no model of this type"),
        _families("ministral3"),
    ),
    Engine(
        replace(NATIVE_HF_FORMULA, name=_OLD),
        "4.57.6",
        TESTED,
        "configuration_phi3.py, modeling_phi3.py; `lrconvert verify`",
        BY_FORWARD_ANEW,
        _families("phi3"),
        (_OLD_SECTION, has(_TOP), exactly("rope_scaling", "type", "short_factor", "long_factor"), _PHI3_TYPES),
    ),
    Engine(
        _own_factors(_OLD),
        "4.57.6",
        TESTED,
        "modeling_phimoe.py; its attention factors are `short_mscale` and `long_mscale`",
        BY_FORWARD_ANEW,
        _families("phimoe"),
        (_OLD_SECTION, *(within("rope_scaling", has(f"rope_scaling.{key}", otherwise="refuses")) for key in _MSCALES)),
    ),
    Engine(
        replace(NATIVE_HF, name=_NEW),
        "5.23.0",
        TESTED,
        "modeling_rope_utils.py; `lrconvert verify`",
        BY_FORWARD,
        _families(
            "llama", "mistral", "qwen2", "qwen3", "granite", "qwen2_moe", "qwen3_moe", "smollm3", "olmo2", "glm4"
        ),
        _NEW_NEEDS,
    ),
    Engine(
        replace(NATIVE_HF, name=_NEW),
        "5.23.0",
        TESTED,
        "configuration_olmo3.py, configuration_gemma3.py: rope_scaling is for full layers, and `type` not known",
        BY_FORWARD,
        _families("olmo3", "gemma3_text"),
        _KINDS_NEEDS,
    ),
    Engine(
        replace(NATIVE_HF, name=_NEW),
        "5.23.0",
        TESTED,
        "modeling_ministral3.py: queries grow from the window after which the set changes",
        BY_FORWARD,
        _families("ministral3"),
        (*_NEW_NEEDS, _GROWTH),
    ),
    Engine(
        replace(NATIVE_HF, name=_NEW),
        "5.23.0",
        TESTED,
        "configuration_mixtral.py, which leaves head_dim empty; the rest as above",
        BY_FORWARD,
        _families("mixtral"),
        (*_NEW_NEEDS, _NEW_HEAD_SIZE),
    ),
    Engine(
        replace(NATIVE_HF, name=_NEW),
        "5.23.0",
        TESTED,
        "configuration_phi3.py, modeling_phi3.py; `lrconvert verify`",
        BY_FORWARD_ANEW,
        _families("phi3"),
        _NEW_PHI3_NEEDS,
    ),
    Engine(
        _own_factors(_NEW),
        "5.23.0",
        TESTED,
        "modeling_phimoe.py, which makes its frequencies without a length",
        NEVER_LONG,
        _families("phimoe"),
        tuple(
            has(*(f"{section}.{key}" for section in ("rope_scaling", "rope_parameters")), otherwise="refuses")
            for key in _MSCALES
        ),
    ),
    Engine(
        replace(CUSTOM_HF, name="transformers, trust_remote_code"),
        "4.57.6 and 5.23.0",
        TESTED,
        "modeling_longrope.py; `lrconvert verify`; phimoe and olmo2 in 5.23.0 alone",
        BY_ROW,
        needs=(has("auto_map"), has("longrope")),
    ),
    Engine(
        VLLM,
        "0.32.0",
        MEASURED,
        f"rotary_embedding/phi3_long_rope_scaled_rope.py, config/model.py; PR 27431, issues 27414, 6135; {_PICO}",
        ONCE_ASKED,
        _FIRST,
        (has(*_INNER, _TOP, otherwise="refuses"), _SECTION),
    ),
    Engine(
        _config_reader("SGLang"),
        "0.5.23",
        READ,
        "layers/rotary_embedding",
        BY_BATCH,
        _families("mistral", "qwen2", "qwen3"),
        (has(*_INNER), _SECTION),
    ),
    Engine(
        _config_reader("SGLang"),
        "0.5.23",
        READ,
        "layers/rotary_embedding; models/llama.py @0023954, which takes the original window from the top level too",
        BY_BATCH,
        _families("llama", "phi3"),
        (has(*_INNER, _TOP), _SECTION),
    ),
    Engine(
        _config_reader("TGI"),
        "0666316",
        READ,
        "layers/rotary.py",
        BY_POSITION,
        _FIRST,
        (has(_TOP), _OLD_SECTION),
    ),
    Engine(
        MLX,
        "0.32.2",
        MEASURED,
        f"models/rope_utils.py, models/llama.py; PR 660; {_PICO}",
        ALWAYS_LONG,
        _families("llama", "mistral", "qwen2", "qwen3"),
        (has(_INNER[0], otherwise="refuses"), _OLD_SECTION),
    ),
    Engine(
        MLX,
        "0.32.2",
        MEASURED,
        f"models/phi3.py; {_PICO}",
        ALWAYS_LONG,
        _families("phi3"),
        (has(_TOP), _OLD_SECTION, _TYPE),
    ),
    Engine(
        _config_reader("ExLlamaV3"),
        "0445820",
        READ,
        "util/rope.py",
        ONCE,
        _FIRST,
        (has(*_INNER, _TOP), _OLD_SECTION),
    ),
    Engine(
        _config_reader(_CONVERTER),
        _GGML,
        MEASURED,
        "convert_hf_to_gguf.py, llama.cpp; for Qwen the C++ reads no factors either",
        DROPPED,
        _families("llama", "mistral", "qwen2", "qwen3"),
    ),
    Engine(
        _config_reader(_CONVERTER),
        _GGML,
        MEASURED,
        "convert_hf_to_gguf.py; llama.cpp issues 8995, 24820, PR 24875",
        ONCE_PADDED,
        _families("phi3"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.5.0 and 0.6.0-dev",
        TESTED,
        "`lrconvert verify`; llama.cpp PR 24875; Qwen2 written as the llama architecture",
        ONCE_PADDED,
        _families("llama", "mistral", "qwen2", "phi3"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev",
        TESTED,
        "`lrconvert verify`; src/models/granite.cpp (0.5.0 was not run)",
        ONCE_PADDED,
        _families("granite", "minicpm"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev",
        TESTED,
        "`lrconvert verify`; src/models/mistral3.cpp: queries grow from the window that chooses (0.5.0 was not run)",
        ONCE_PADDED,
        _families("ministral3"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.4.0-dev to 0.6.0-dev; step35 since PR 19283",
        TESTED,
        "`lrconvert verify`; llama-context.cpp; the C++ of qwen3 and step35; the oldest that ran is in xllamacpp "
        "2026.9.10809",
        Rule(
            "its own YaRN, at every length; with `--architecture step35` as above",
            refuses="qwen3 there ignores factors, and knows one YaRN for every length; `lrconvert gguf --architecture "
            "step35` writes any two sets",
            formula=True,
        ),
        _families("qwen3"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev",
        TESTED,
        "`lrconvert verify`; Mixtral written as the llama architecture (0.5.0 was not run)",
        ONCE_PADDED,
        _families("mixtral"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev",
        TESTED,
        "`lrconvert verify` (0.5.0 was not run)",
        Rule(
            "its own YaRN, at every length",
            refuses="qwen2moe and qwen3moe there ignore factors, and know one YaRN for every length",
            formula=True,
        ),
        _families("qwen2_moe", "qwen3_moe"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev",
        TESTED,
        "`lrconvert verify`; src/models/smollm3.cpp, olmo2.cpp (0.5.0 was not run)",
        Rule(
            "its own YaRN, at every length",
            refuses="the C++ of the family ignores factors, and knows one YaRN for every length",
            formula=True,
        ),
        _families("smollm3", "olmo2", "olmo3", "gemma3_text", "glm4"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev",
        TESTED,
        "src/models/phi3.cpp; KL 0.4 to 0.6 at any length on a pico model",
        Rule(
            "not at all",
            refuses="phimoe there has other norms (it divides by the mean square) and other gates (they sum to one): "
            "another model at every length, which `lrconvert gguf` does not write",
        ),
        _families("phimoe"),
    ),
    Engine(
        _config_reader("ONNX, genai builder"),
        "0.18.0",
        MEASURED,
        "builders/llama.py (make_rope_init handles llama3 alone)",
        DROPPED,
        _families("llama"),
    ),
    Engine(
        _config_reader("ONNX, genai builder"),
        "0.18.0",
        MEASURED,
        "its NotImplementedError",
        REFUSED,
        _families("mistral"),
    ),
    Engine(
        _config_reader("ONNX, genai builder"),
        "0.18.0",
        MEASURED,
        "builders/base.py, builders/phi.py; onnxruntime-genai PR 1161",
        IN_GRAPH,
        _families("phi3"),
    ),
    Engine(
        _config_reader("ONNX, optimum", "one"),
        "0.1.0",
        MEASURED,
        "optimum-onnx with transformers 4.57.6; optimum-intel issues 913, 1504",
        FROZEN_SHORT,
        _families("llama", "mistral"),
    ),
    Engine(
        _config_reader("ONNX, optimum"),
        "0.1.0",
        MEASURED,
        "optimum-onnx with transformers 4.57.6",
        FROZEN_SHORT,
        _families("phi3"),
    ),
    Engine(
        _config_reader("ONNX, transformers' exporter", "one"),
        "5.23.0",
        f"measured {_BASELINE}",
        "OnnxExporter, benchmarks/results/onnx-baseline.md; the model in memory is then off by a KL of 0.8 above L0",
        BY_FORWARD_EXPORTED,
        _families("llama", "mistral"),
        _NEW_NEEDS,
    ),
    Engine(
        _config_reader("ONNX, transformers' exporter", "one"),
        "5.23.0",
        f"measured {_BASELINE}",
        "as above",
        BY_FORWARD_EXPORTED,
        _families("phi3"),
        _NEW_PHI3_NEEDS,
    ),
    Engine(
        _config_reader("ONNX, mobius"),
        "0.1.0",
        f"measured {_BASELINE}",
        "the graph that it builds, benchmarks/results/onnx-baseline.md; its commit 78437cd does the same",
        BY_FORWARD,
        _families("llama", "mistral", "phi3"),
    ),
)


# --- a recipe against the table --------------------------------------------------------------------------


def assess(
    spec: RopeSpec, family: str, config: Mapping[str, Any] | None = None, shape: ModelShape | None = None
) -> list[Verdict]:
    """A verdict on every engine. With a `config` its keys are checked too; without one, those that `lrconvert hf`
    writes are assumed. `shape`: of the model, where it is known."""
    return [verdict(rows, spec, family, config, shape) for rows in _by_name().values()]


def _by_name() -> dict[str, list[Engine]]:
    found: dict[str, list[Engine]] = {}
    for engine in ENGINES:
        found.setdefault(engine.name, []).append(engine)
    return found
