# SPDX-License-Identifier: Apache-2.0
"""The metadata of a GGUF, compared with the recipe and the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lrconvert.artifact.checks import Row, rows_of
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.statements import Facts, rows_from, unasked
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.checkpoint.gguf_config import LONG, SHORT, STATIC
from lrconvert.families import ModelShape
from lrconvert.families.base import GGUF_STEP35
from lrconvert.rope import RopeSpec
from lrconvert.targets.gguf.layers import layer_keys
from lrconvert.targets.gguf.metadata import expert_keys, multiplier_keys
from lrconvert.targets.gguf.query_scale import original_context, query_scale_keys
from lrconvert.targets.gguf.statements import metadata_differences, modelfile_differences, modelfile_of
from lrconvert.targets.gguf.step35 import architecture_keys
from lrconvert.targets.gguf.yarn import by_formula, formula_keys

FLOAT32 = 1e-6  # metadata and factors are float32: one rounding


def checks(artifact: Path, stored: GgufCheckpoint, model: Model, spec: RopeSpec, record: BakeRecord) -> list[Row]:
    """A row for everything in the file that contradicts `spec`; one `pass` where nothing does."""
    formula = by_formula(model.family, stored.architecture)
    rope = _formula(stored, spec) if formula else _rope(stored, spec, model.shape, record.static)
    numbers = _numbers(stored, model, spec.window if record.lifted else None)
    problems = [*stored.rope_problems, *numbers, *rope, *_vectors(stored)]
    good = "rope and shape are the recipe's and the model's"
    rows = rows_of("metadata", good, [(problem.partition(":")[0][:60], problem) for problem in problems])
    facts = Facts(artifact, model, spec, record)
    told = {problem.split(" ", 1)[0] for problem in problems}
    differing = [found for found in metadata_differences(facts, stored) if found.where not in told]
    rows += rows_from("metadata", "every key is the source's or the recipe's", differing)
    if modelfile_of(artifact).is_file():
        rows += rows_from("metadata", "the Modelfile", modelfile_differences(facts))
    return rows + unasked(facts, "the vocabulary, the chat template, other metadata, weights")


def _vectors(stored: GgufCheckpoint) -> Iterator[str]:
    """Norms, biases and factors: llama.cpp ends with an assertion where one is not float32."""
    for header in stored.headers:
        for tensor in header.tensors.values():
            if len(tensor.shape) == 1 and tensor.type.name != "F32":
                yield f"{tensor.name}: is {tensor.type.name}; llama.cpp computes with vectors in F32 alone"


def _numbers(stored: GgufCheckpoint, model: Model, lifted: int | None) -> Iterator[str]:
    """`lifted`: what windows are lifted to, in tokens; None: they are the model's."""
    prefix, shape = f"{stored.architecture}.", model.shape
    wanted = {
        "rope.freq_base": shape.theta,
        "rope.dimension_count": shape.rotary_dim,
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "block_count": shape.layers,
    }
    if stored.architecture == GGUF_STEP35:
        given = architecture_keys(shape)
        wanted |= {key: given[prefix + key] for key in ("rope.dimension_count", "block_count")}
    others: dict[str, float] = layer_keys(stored.architecture, shape)
    if lifted is not None:
        others = {key: lifted if key.endswith("sliding_window") else value for key, value in others.items()}
    others |= multiplier_keys(stored.architecture, shape) | expert_keys(stored.architecture, shape)
    others |= query_scale_keys(stored.architecture, shape)
    wanted |= {key.removeprefix(prefix): value for key, value in others.items()}
    # What llama.cpp takes where a file says nothing.
    defaults = {
        "rope.freq_base": 10000.0,
        "rope.dimension_count": shape.head_dim,
        "attention.head_count_kv": shape.heads,
        "expert_feed_forward_length": shape.ffn,
    }
    for key, value in wanted.items():
        found = stored.metadata.get(prefix + key, defaults.get(key))
        if not isinstance(found, int | float) or not math.isclose(found, value, rel_tol=FLOAT32):
            yield f"{prefix}{key} is {found!r:.60}; the model needs {value:g}"


def _formula(stored: GgufCheckpoint, spec: RopeSpec) -> Iterator[str]:
    """Where no factors are, the keys that say which formula makes them."""
    for key, value in formula_keys(stored.architecture, spec).items():
        found = stored.metadata.get(key, 1.0 if key.endswith("attn_factor") else None)
        numbers = isinstance(found, int | float) and isinstance(value, int | float)
        if not (math.isclose(found, value, rel_tol=FLOAT32) if numbers else found == value):
            yield f"{key} is {found!r:.60}; the recipe needs {value!r:.60}"


def _rope(stored: GgufCheckpoint, spec: RopeSpec, shape: ModelShape, static: bool) -> Iterator[str]:
    prefix, first, last = f"{stored.architecture}.", spec.tiers[0], spec.tiers[-1]
    wanted = {"context_length": float(spec.window), "rope.scaling.attn_factor": last.attention_factor}
    if shape.query_scale is not None or (not static and len(spec.tiers) > 1):
        wanted["rope.scaling.original_context_length"] = float(original_context(spec, shape))
    for key, value in wanted.items():
        found = stored.metadata.get(prefix + key, 1.0 if key.endswith("attn_factor") else None)
        if not isinstance(found, int | float) or not math.isclose(found, value, rel_tol=FLOAT32):
            yield f"{prefix}{key} is {found!r:.60}; the recipe needs {value:g}"
    alone = static and STATIC in stored.stored  # phi3 has no such tensor: two equal sets do the same
    for name, tier in ({STATIC: last} if alone else {SHORT: first, LONG: last}).items():
        values = stored.factors(name)
        if values is None:
            yield f"{name} is missing"
            continue
        if values.shape != (len(tier.factors),) or not np.allclose(values, tier.factors, rtol=FLOAT32, atol=0):
            yield f"{name} holds factors that differ from the recipe's"
