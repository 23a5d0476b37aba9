# SPDX-License-Identifier: Apache-2.0
"""What the JSON files of an ONNX folder have to say: config.json for optimum and transformers.js, genai_config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lrconvert.artifact.checks import Row
from lrconvert.artifact.statements import ABSENT, Difference, Facts, Statement, Such, differences, rows_from
from lrconvert.checkpoint import read_json
from lrconvert.checkpoint.base import FLOAT_DTYPES
from lrconvert.checkpoint.onnx_folder import TIED_HEAD, OnnxCheckpoint
from lrconvert.errors import InputError
from lrconvert.rope import RopeSpec
from lrconvert.targets.hf.config import json_in
from lrconvert.targets.hf.statements import CONFIG_SAYS, GENERATION, folder_rows
from lrconvert.targets.onnx.consumers import (
    CACHE_BYTES,
    GENAI,
    GENAI_REWINDS,
    MAX_SHARED_BYTES,
    MODEL_FILE,
    generation_tokens,
)

SOURCE_OF_TOKENS = "the source, in generation_config.json or config.json,"


def config_says(stored: OnnxCheckpoint) -> tuple[Statement, ...]:
    """As for a Hugging Face folder, without code, and with what transformers.js reads."""
    own: dict[str, Any] = {"dtype": "fp32", "use_external_data_format": len(stored.weight_files()) - 1}
    if stored.computing == "F16":
        own["kv_cache_dtype"] = "float16"
    replaced = {
        "auto_map": Statement("auto_map", lambda facts: ABSENT, "the graph, which needs no code,"),
        "transformers.js_config": Statement("transformers.js_config", lambda facts: own, "the graph"),
    }
    head = stored.tensors.get(TIED_HEAD)
    if head is not None and head.dtype in FLOAT_DTYPES:  # a tied model has a copy only where that is quantised
        untied = Such("false: the graph has a head of its own", lambda found: found is not True)
        replaced["tie_word_embeddings"] = Statement("tie_word_embeddings", lambda facts: untied, "the graph")
    kept = [row for row in CONFIG_SAYS if row.key not in replaced]
    return (*kept, *replaced.values())


def _shape(name: str) -> Callable[[Facts], Any]:
    return lambda facts: getattr(facts.model.shape, name)


def _window(facts: Facts) -> int:
    return facts.spec.window


def _type(facts: Facts) -> Such:
    kinds = {"llama", *(GENAI_REWINDS[edge] for edge in boundaries(facts.spec) if edge in GENAI_REWINDS)}
    return Such(" or ".join(sorted(kinds)), lambda found: isinstance(found, str) and found in kinds)


def boundaries(spec: RopeSpec) -> tuple[int, ...]:
    """The boundary of a recipe that has one alone: onnxruntime-genai knows no more."""
    return tuple(spec.boundaries) if len(spec.boundaries) == 1 else ()


def _token(name: str) -> Callable[[Facts], Any]:
    def wanted(facts: Facts) -> Any:
        source = facts.model.checkpoint
        files = source.side_files()
        texts = {name: content for name, content in files.items() if isinstance(content, bytes)}
        kept = {name: content for name, content in files.items() if not isinstance(content, bytes)}
        return generation_tokens(source.config, json_in(texts, kept, GENERATION))[name]

    return wanted


def _shared(facts: Facts) -> Such:
    """A buffer of the whole window is made at the start where it is small enough, and the attention can."""
    shape, stored = facts.model.shape, facts.stored
    width = CACHE_BYTES["F32" if stored.computing not in FLOAT_DTYPES else stored.computing]
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * width * facts.spec.window
    right = stored.attention == "gqa" and cache <= MAX_SHARED_BYTES
    return Such(str(right).lower(), lambda found: found is right)


_NAMES = {
    "inputs.input_ids": "input_ids",
    "inputs.attention_mask": "attention_mask",
    "inputs.position_ids": "position_ids",
    "inputs.past_key_names": "past_key_values.%d.key",
    "inputs.past_value_names": "past_key_values.%d.value",
    "outputs.logits": "logits",
    "outputs.present_key_names": "present.%d.key",
    "outputs.present_value_names": "present.%d.value",
}
GENAI_SAYS: tuple[Statement, ...] = (
    Statement("model.type", _type, "the graph"),
    Statement("model.vocab_size", _shape("vocab"), "the model"),
    Statement("model.context_length", _window),
    *(
        Statement(f"model.{name}", _token(name), SOURCE_OF_TOKENS)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    ),
    Statement("model.decoder.filename", lambda facts: MODEL_FILE, "the folder"),
    Statement("model.decoder.session_options.log_id", lambda facts: "onnxruntime-genai", "the folder"),
    Statement("model.decoder.session_options.provider_options", lambda facts: [], "the folder"),
    Statement("model.decoder.head_size", _shape("head_dim"), "the model"),
    Statement("model.decoder.hidden_size", _shape("hidden"), "the model"),
    Statement("model.decoder.num_attention_heads", _shape("heads"), "the model"),
    Statement("model.decoder.num_key_value_heads", _shape("kv_heads"), "the model"),
    Statement("model.decoder.num_hidden_layers", _shape("layers"), "the model"),
    *(Statement(f"model.decoder.{key}", lambda facts, name=name: name, "the graph") for key, name in _NAMES.items()),
    Statement("search.max_length", _window),
    Statement("search.past_present_share_buffer", _shared, "the cache"),
    Statement("search.do_sample", lambda facts: False, "the folder"),
    Statement("search.num_beams", lambda facts: 1, "the folder"),
)


def json_rows(facts: Facts, stored: OnnxCheckpoint) -> list[Row]:
    """Every JSON file of the folder, and the files beside them."""
    rows = folder_rows(facts, stored.weight_files(), config=config_says(stored))
    try:
        found = list(differences(GENAI, read_json(facts.artifact / GENAI), {}, GENAI_SAYS, facts))
    except InputError as error:
        found = [Difference(GENAI, error.message, known=not facts.ours)]
    return [*rows, *rows_from("config", f"what {GENAI} says", found)]
