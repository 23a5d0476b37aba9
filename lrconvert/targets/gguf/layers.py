# SPDX-License-Identifier: Apache-2.0
"""Layers that differ from each other, as llama.cpp's C++ has them: which ones they are is fixed there by architecture.

So a model is compared with what its architecture would compute before anything is written.
"""

from __future__ import annotations

from lrconvert.checkpoint import Model
from lrconvert.errors import UnsupportedError
from lrconvert.families import ModelShape
from lrconvert.families.base import GGUF_SLIDING, GGUF_SLIDING_THETA, GGUF_UNROTATED


def layer_keys(architecture: str, shape: ModelShape) -> dict[str, float]:
    """What a file states of layers that slide, where they are a kind of their own."""
    keys: dict[str, float] = {}
    if architecture in GGUF_SLIDING and shape.sliding:
        keys["attention.sliding_window"] = max(shape.sliding)
    if architecture in GGUF_SLIDING_THETA and shape.plain_theta is not None:
        keys["rope.freq_base_swa"] = shape.plain_theta
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def check_layers(model: Model, architecture: str) -> None:
    """`UnsupportedError` for layers of other kinds than the architecture's C++ makes of them."""
    shape = model.shape
    turns = [shape.turn(layer) for layer in range(shape.layers)]
    unrotated = [turn == 0.0 for turn in turns]
    plain = [turn not in (None, 0.0) for turn in turns]
    every = GGUF_UNROTATED.get(architecture)
    if unrotated != [bool(every) and (layer + 1) % every == 0 for layer in range(shape.layers)]:
        raise UnsupportedError(
            f"{model.reference}: layers without rotation: {_numbers(unrotated)}; llama.cpp's {architecture} "
            + (f"has every {every}th so" if every else "rotates all"),
            remedy="Use `lrconvert hf` or `lrconvert onnx`",
        )
    every = GGUF_SLIDING.get(architecture) if any(plain) else None
    if plain != [bool(every) and (layer + 1) % every != 0 for layer in range(shape.layers)]:
        raise UnsupportedError(
            f"{model.reference}: layers that rotate by themselves: {_numbers(plain)}; llama.cpp's {architecture} "
            + (f"has all but every {every}th so" if every else "rotates all alike"),
            remedy="Use `lrconvert hf` or `lrconvert onnx`",
        )
    if plain.count(True) and shape.plain_theta != shape.theta and architecture not in GGUF_SLIDING_THETA:
        raise UnsupportedError(
            f"{model.reference}: layers that slide rotate by θ {shape.plain_theta:g}, the others by {shape.theta:g}; "
            f"llama.cpp's {architecture} has one θ for both",
            remedy="Use `lrconvert hf` or `lrconvert onnx`",
        )


def _numbers(layers: list[bool]) -> str:
    found = [str(layer) for layer, is_so in enumerate(layers) if is_so]
    return ", ".join(found) if found else "none"
