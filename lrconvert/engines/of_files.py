# SPDX-License-Identifier: Apache-2.0
"""Programs that write or run a GGUF or an ONNX graph: rows of the table of facts."""

from __future__ import annotations

from dataclasses import replace

from lrconvert.engines.capability import LLAMA_CPP
from lrconvert.engines.engine import (
    Engine,
    Rule,
)
from lrconvert.engines.facts import MEASURED, TESTED, config_reader, families
from lrconvert.engines.needs import NEW_NEEDS, NEW_PHI3_NEEDS
from lrconvert.engines.rules import (
    BY_FORWARD,
    BY_FORWARD_EXPORTED,
    DROPPED,
    FROZEN_SHORT,
    IN_GRAPH,
    ONCE_PADDED,
    REFUSED,
)

_BASELINE = "2026-11-29"  # benchmarks/onnx_baseline.py, in environments of their own
_GGML, _CONVERTER = "as of llama-cpp-python 0.3.36", "llama.cpp, its own converter"
_BAKED_GGUF = "llama.cpp, a file with the factors"

ROWS: tuple[Engine, ...] = (
    Engine(
        config_reader(_CONVERTER),
        _GGML,
        MEASURED,
        "convert_hf_to_gguf.py, llama.cpp; for Qwen the C++ reads no factors either",
        DROPPED,
        families("llama", "mistral", "qwen2", "qwen3"),
    ),
    Engine(
        config_reader(_CONVERTER),
        _GGML,
        MEASURED,
        "convert_hf_to_gguf.py; llama.cpp issues 8995, 24820, PR 24875",
        ONCE_PADDED,
        families("phi3"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.5.0 and 0.6.0-dev",
        TESTED,
        "`lrconvert verify`; llama.cpp PR 24875; Qwen2 written as the llama architecture",
        ONCE_PADDED,
        families("llama", "mistral", "qwen2", "phi3"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev",
        TESTED,
        "`lrconvert verify`; src/models/granite.cpp (0.5.0 was not run)",
        ONCE_PADDED,
        families("granite", "minicpm"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev",
        TESTED,
        "`lrconvert verify`; src/models/mistral3.cpp: queries grow from the window that chooses (0.5.0 was not run)",
        ONCE_PADDED,
        families("ministral3"),
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
        families("qwen3"),
    ),
    Engine(
        replace(LLAMA_CPP, name=_BAKED_GGUF),
        "0.6.0-dev",
        TESTED,
        "`lrconvert verify`; Mixtral written as the llama architecture (0.5.0 was not run)",
        ONCE_PADDED,
        families("mixtral"),
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
        families("qwen2_moe", "qwen3_moe"),
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
        families("smollm3", "olmo2", "olmo3", "gemma3_text", "glm4"),
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
        families("phimoe"),
    ),
    Engine(
        config_reader("ONNX, genai builder"),
        "0.18.0",
        MEASURED,
        "builders/llama.py (make_rope_init handles llama3 alone)",
        DROPPED,
        families("llama"),
    ),
    Engine(
        config_reader("ONNX, genai builder"),
        "0.18.0",
        MEASURED,
        "its NotImplementedError",
        REFUSED,
        families("mistral"),
    ),
    Engine(
        config_reader("ONNX, genai builder"),
        "0.18.0",
        MEASURED,
        "builders/base.py, builders/phi.py; onnxruntime-genai PR 1161",
        IN_GRAPH,
        families("phi3"),
    ),
    Engine(
        config_reader("ONNX, optimum", "one"),
        "0.1.0",
        MEASURED,
        "optimum-onnx with transformers 4.57.6; optimum-intel issues 913, 1504",
        FROZEN_SHORT,
        families("llama", "mistral"),
    ),
    Engine(
        config_reader("ONNX, optimum"),
        "0.1.0",
        MEASURED,
        "optimum-onnx with transformers 4.57.6",
        FROZEN_SHORT,
        families("phi3"),
    ),
    Engine(
        config_reader("ONNX, transformers' exporter", "one"),
        "5.23.0",
        f"measured {_BASELINE}",
        "OnnxExporter, benchmarks/results/onnx-baseline.md; the model in memory is then off by a KL of 0.8 above L0",
        BY_FORWARD_EXPORTED,
        families("llama", "mistral"),
        NEW_NEEDS,
    ),
    Engine(
        config_reader("ONNX, transformers' exporter", "one"),
        "5.23.0",
        f"measured {_BASELINE}",
        "as above",
        BY_FORWARD_EXPORTED,
        families("phi3"),
        NEW_PHI3_NEEDS,
    ),
    Engine(
        config_reader("ONNX, mobius"),
        "0.1.0",
        f"measured {_BASELINE}",
        "the graph that it builds, benchmarks/results/onnx-baseline.md; its commit 78437cd does the same",
        BY_FORWARD,
        families("llama", "mistral", "phi3"),
    ),
)
