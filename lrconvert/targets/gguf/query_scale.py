# SPDX-License-Identifier: Apache-2.0
"""A scale of queries that grows with the position, as llama.cpp's C++ has it: its window is the key that also says
where the short set ends, `rope.scaling.original_context_length`."""

from __future__ import annotations

from lrconvert.checkpoint import Model
from lrconvert.engines.capability import LLAMA_CPP, of_model
from lrconvert.errors import UnsupportedError
from lrconvert.families import ModelShape
from lrconvert.families.base import GGUF_QUERY_SCALE
from lrconvert.rope import RopeSpec


def query_scale_keys(architecture: str, shape: ModelShape) -> dict[str, float]:
    """How it grows; none for models without. Raises `UnsupportedError` for an architecture whose C++ has none."""
    key = GGUF_QUERY_SCALE.get(architecture)
    if shape.query_scale is None:
        return {}
    if key is None:
        raise UnsupportedError(f"llama.cpp's {architecture} has no scale of queries that grows with the position")
    return {f"{architecture}.{key}": shape.query_scale.growth}


def original_context(spec: RopeSpec, shape: ModelShape) -> int:
    """What `rope.scaling.original_context_length` has to say, in tokens."""
    if shape.query_scale is not None:
        return shape.query_scale.window
    return spec.tiers[0].max_length if len(spec.tiers) > 1 else spec.window


def check_query_scale(model: Model, spec: RopeSpec) -> None:
    """`UnsupportedError` for two sets that change elsewhere than queries begin to grow."""
    if moved := of_model(LLAMA_CPP, model.shape).fit(spec)[1]:
        raise UnsupportedError(
            f"{model.reference}: {'; '.join(moved)}",
            remedy="One set for every length works: --static-long; or use `lrconvert hf` or `lrconvert onnx`",
        )
