# SPDX-License-Identifier: Apache-2.0
"""What other programs do with a longrope config: one table of facts, each with its source.

`assess` checks a recipe against every row. Re-measure when versions move; docs/engines.md is generated from here:

    python -m lrconvert.engines.table > docs/engines.md
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
from lrconvert.engines.engine import Engine, Need, Rule, Verdict, verdict
from lrconvert.rope import RopeSpec

# --- how programs choose ---------------------------------------------------------------------------------

BY_ROW = Rule("every row by its own length; keys are recomputed where a row changes tier")
BY_FORWARD = Rule(
    "every forward pass, by the longest sequence of its batch",
    ("generation across {boundary} keeps keys of the short set", "a batch shares one set"),
)
BY_BATCH = Rule(
    "every forward pass, by any position above {boundary} in the batch",
    (
        "generation across {boundary} keeps keys of the short set",
        "requests that run together share one set",
        "the switch comes one token late",
    ),
)
ONCE = Rule(
    "once, at start: long where its context is longer than {boundary}",
    ("started for more than {boundary} tokens, it uses the long set for shorter sequences too",),
)
ONCE_ASKED = replace(
    ONCE, limits=("it serves {boundary} tokens unless it is started with --max-model-len {window}", *ONCE.limits)
)
ONCE_PADDED = replace(ONCE, limits=(*ONCE.limits, "contexts count in steps of 256"))
ALWAYS_LONG = Rule("the long set, always", ("sequences of up to {boundary} tokens use the long set",))
BY_POSITION = Rule(
    "every position by itself",
    breaks="positions below {boundary} use the short set and the rest the long one, in one sequence",
)
FROZEN_SHORT = Rule("in tracing: the short set", breaks="the short set is baked in for every length")
DROPPED = Rule("never: the scaling is silently dropped", breaks="plain RoPE, unscaled", always=True)
IN_GRAPH = Rule(
    "in the graph, by the length of the attention mask",
    (
        "generation across {boundary} is recomputed only where that is 4096, batch 1",
        "left padding counts as length",
    ),
)
REFUSED = Rule("not at all", refuses="NotImplementedError: longrope is not supported for this family")


# --- the table -------------------------------------------------------------------------------------------


def _config_reader(name: str, attention: Literal["one", "formula"] = "formula") -> Capability:
    """A program that reads the native keys: two sets, no start tokens."""
    return Capability(name, 2, False, attention, False, False)


def _families(*names: str) -> frozenset[str]:
    return frozenset(names)


# Any of these spellings, where a program takes both of transformers' sections.
_INNER = tuple(f"{section}.original_max_position_embeddings" for section in ("rope_scaling", "rope_parameters"))
_TOP = "original_max_position_embeddings"
_SECTION, _OLD_SECTION = Need(("rope_scaling", "rope_parameters"), "differs"), Need(("rope_scaling",), "differs")
_TYPE = Need(("rope_scaling.type",), "refuses")
_PICO = "KL against a float64 reference on pico models"
_GGML, _CONVERTER = "as of llama-cpp-python 0.3.36", "llama.cpp, its own converter"
_BAKED_GGUF = "llama.cpp, a file with the factors"

ENGINES: tuple[Engine, ...] = (
    Engine(
        replace(NATIVE_HF, name="transformers, native"),
        "4.57.6 and 5.23.0",
        "measured",
        "modeling_rope_utils.py, configuration_*.py; issue 33129; `lrconvert verify`",
        BY_FORWARD,
        _families("llama", "mistral", "qwen2", "qwen3"),
        (Need((_TOP,), "differs"), _OLD_SECTION),  # 4.57 knows nothing else
    ),
    Engine(
        replace(NATIVE_HF_FORMULA, name="transformers, native"),
        "4.57.6 and 5.23.0",
        "measured",
        "configuration_phi3.py, modeling_phi3.py; `lrconvert verify`",
        BY_FORWARD,
        _families("phi3"),
        (Need((_TOP,), "differs"), _OLD_SECTION, _TYPE),
    ),
    Engine(
        replace(CUSTOM_HF, name="transformers, trust_remote_code"),
        "4.57.6 and 5.23.0",
        "measured",
        "modeling_longrope.py; `lrconvert verify`",
        BY_ROW,
        needs=(Need(("auto_map",), "differs"), Need(("longrope",), "differs")),
    ),
    Engine(
        VLLM,
        "0.32.0",
        "measured",
        f"rotary_embedding/phi3_long_rope_scaled_rope.py, config/model.py; PR 27431, issues 27414, 6135; {_PICO}",
        ONCE_ASKED,
        needs=(Need((*_INNER, _TOP), "refuses"), _SECTION),
    ),
    Engine(
        _config_reader("SGLang"),
        "0.5.23",
        "read",
        "layers/rotary_embedding",
        BY_BATCH,
        _families("mistral", "qwen2", "qwen3"),
        (Need(_INNER, "differs"), _SECTION),
    ),
    Engine(
        _config_reader("SGLang"),
        "0.5.23",
        "read",
        "layers/rotary_embedding; models/llama.py @0023954, which takes the original window from the top level too",
        BY_BATCH,
        _families("llama", "phi3"),
        (Need((*_INNER, _TOP), "differs"), _SECTION),
    ),
    Engine(
        _config_reader("TGI"),
        "0666316",
        "read",
        "layers/rotary.py",
        BY_POSITION,
        needs=(Need((_TOP,), "differs"), _OLD_SECTION),
    ),
    Engine(
        MLX,
        "0.32.2",
        "measured",
        f"models/rope_utils.py, models/llama.py; PR 660; {_PICO}",
        ALWAYS_LONG,
        _families("llama", "mistral", "qwen2", "qwen3"),
        (Need(_INNER[:1], "refuses"), _OLD_SECTION),
    ),
    Engine(
        MLX,
        "0.32.2",
        "measured",
        f"models/phi3.py; {_PICO}",
        ALWAYS_LONG,
        _families("phi3"),
        (Need((_TOP,), "differs"), _OLD_SECTION, _TYPE),
    ),
    Engine(
        _config_reader("ExLlamaV3"),
        "0445820",
        "read",
        "util/rope.py",
        ONCE,
        needs=(Need((*_INNER, _TOP), "differs"), _OLD_SECTION),
    ),
    Engine(
        _config_reader(_CONVERTER),
        _GGML,
        "measured",
        "convert_hf_to_gguf.py, llama.cpp; for Qwen the C++ reads no factors either",
        DROPPED,
        _families("llama", "mistral", "qwen2", "qwen3"),
    ),
    Engine(
        _config_reader(_CONVERTER),
        _GGML,
        "measured",
        "convert_hf_to_gguf.py; llama.cpp issues 8995, 24820, PR 24875",
        ONCE_PADDED,
        _families("phi3"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.5.0 and 0.6.0-dev",
        "measured",
        "`lrconvert verify`; llama.cpp PR 24875; Qwen2 written as the llama architecture",
        ONCE_PADDED,
        _families("llama", "mistral", "qwen2", "phi3"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev; step35 since PR 19283",
        "measured",
        "`lrconvert verify`; llama-context.cpp; the C++ of qwen3 and of step35 (older versions with it were not run)",
        Rule(
            "its own YaRN, at every length; with `--architecture step35` as above",
            refuses="qwen3 there ignores factors, and knows one YaRN for every length; `lrconvert gguf --architecture "
            "step35` writes any two sets",
            formula=True,
        ),
        _families("qwen3"),
    ),
    Engine(
        _config_reader("ONNX, genai builder"),
        "0.18.0",
        "measured",
        "builders/llama.py (make_rope_init handles llama3 alone)",
        DROPPED,
        _families("llama"),
    ),
    Engine(
        _config_reader("ONNX, genai builder"),
        "0.18.0",
        "measured",
        "its NotImplementedError",
        REFUSED,
        _families("mistral"),
    ),
    Engine(
        _config_reader("ONNX, genai builder"),
        "0.18.0",
        "measured",
        "builders/base.py, builders/phi.py; onnxruntime-genai PR 1161",
        IN_GRAPH,
        _families("phi3"),
    ),
    Engine(
        _config_reader("ONNX, optimum", "one"),
        "0.1.0",
        "measured",
        "optimum-onnx with transformers 4.57.6; optimum-intel issues 913, 1504",
        FROZEN_SHORT,
        _families("llama", "mistral"),
    ),
    Engine(
        _config_reader("ONNX, optimum"),
        "0.1.0",
        "measured",
        "optimum-onnx with transformers 4.57.6",
        FROZEN_SHORT,
        _families("phi3"),
    ),
    Engine(_config_reader("ONNX, mobius"), "0.1.0", "measured", "the graph that it builds", BY_FORWARD),
)


# --- a recipe against the table --------------------------------------------------------------------------


def assess(spec: RopeSpec, family: str, config: Mapping[str, Any] | None = None) -> list[Verdict]:
    """A verdict on every engine. With a `config` its keys are checked too; without one, those that `lrconvert hf`
    writes are assumed."""
    return [verdict(rows, spec, family, config) for rows in _by_name().values()]


def _by_name() -> dict[str, list[Engine]]:
    found: dict[str, list[Engine]] = {}
    for engine in ENGINES:
        found.setdefault(engine.name, []).append(engine)
    return found


# --- the page --------------------------------------------------------------------------------------------

PAGE = """\
# Engines: which programs run a longrope config correctly

Generated by `python -m lrconvert.engines.table > docs/engines.md`; a test checks it. Facts were measured or read in the
version named; `lrconvert hf` and `lrconvert inspect` check every recipe against this table.

Most engines compute the *portable subset* correctly: two tiers, no start tokens, an attention factor equal to the
formula's, sqrt(1 + ln(window / L0) / ln L0). `lrconvert hf --portable` folds another attention factor into q and k
for it. Engines that choose once use the long set for short sequences too: `lrconvert verify --runtime mlx` and
`--runtime vllm` measure what that costs.

| engine | families | chooses | attention factor | needs in config.json | known from |
| --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    """docs/engines.md."""
    attention = {
        "per tier": "of each tier",
        "one": "the config's",
        "formula": "the formula's, regardless of the config",
    }
    lines = []
    for engine in ENGINES:
        rule = engine.rule
        gets = rule.refuses or rule.breaks
        chooses = rule.chooses + "".join(f"; {text}" for text in (*rule.limits, *([gets] if gets else [])))
        cells = (
            f"{engine.name} {engine.version}",
            "all" if engine.families is None else ", ".join(sorted(engine.families)),
            chooses.format(boundary="L0", window="WINDOW"),
            "" if rule.always or rule.refuses else attention[engine.capability.attention],
            ", ".join(" or ".join(f"`{key}`" for key in need.keys) for need in engine.needs),
            f"{engine.known}: {engine.source}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return PAGE + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
