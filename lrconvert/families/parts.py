# SPDX-License-Identifier: Apache-2.0
"""Larger models that hold a language model: where its settings and its tensors stand, and what is left out.

    language_config({"model_type": "mistral3", "text_config": {…}, "vision_config": {…}})     # a mistral's

The names are those of published checkpoints and of what transformers writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lrconvert.errors import InputError

FLAG = "--text-only"


@dataclass(frozen=True)
class LanguagePart:
    """The language model inside of a larger one."""

    family: str | None = None  # of its weights; None: the model_type of its section
    section: str | None = None  # of the config, where its settings stand; None: the top level
    keys: tuple[str, ...] = ()  # of the top level, where the settings of the other parts stand
    # Beginnings of tensor names, with ours; a name without any of them is ours already.
    prefixes: Mapping[str, str] = field(default_factory=dict)
    # What is left out: patterns of `fnmatch`, and what such tensors belong to.
    left_out: Mapping[str, str] = field(default_factory=dict)
    infix: str = ""  # in names of weights that stand beside an adapter's


_PHI3V = ("embd_layer", "img_processor")
_IMAGES, _SOUND = "images", "images and sound"
PARTS: Mapping[str, LanguagePart] = {
    "phi3_v": LanguagePart("phi3", keys=_PHI3V, left_out={"model.vision_embed_tokens.*": _IMAGES}),
    # Its own code switches the adapters off for text (`unset_lora_adapter`, modeling_phi4mm.py).
    "phi4mm": LanguagePart(
        "phi3",
        keys=(*_PHI3V, "audio_processor", "vision_lora", "speech_lora"),
        infix=".base_layer",
        left_out={
            "model.embed_tokens_extend.*": _SOUND,
            "*.lora_[AB].vision.weight": "the adapter for images",
            "*.lora_[AB].speech.weight": "the adapter for sound",
        },
    ),
    "phi4_multimodal": LanguagePart(
        "phi3", keys=("vision_config", "audio_config"), left_out={"model.embed_tokens_extend.*": _SOUND}
    ),
    "mistral3": LanguagePart(
        section="text_config",
        prefixes={
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "model.language_model.": "model.",
        },
        left_out={
            f"{front}{name}.*": _IMAGES
            for front in ("", "model.")
            for name in ("vision_tower", "multi_modal_projector")
        },
    ),
}
# Keys of the top level that hold of the section as well.
_SHARED = ("torch_dtype", "dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def is_larger(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a model with other parts than its language model."""
    return isinstance(config.get("model_type"), str) and config["model_type"] in PARTS


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model inside of a larger one; of any other model a copy.

    Raises `InputError` where its section is missing.
    """
    if not is_larger(config):
        return dict(config)
    name = config["model_type"]
    part = PARTS[name]
    if part.section is None:
        return {key: value for key, value in config.items() if key not in part.keys} | {"model_type": part.family}
    section = config.get(part.section)
    if not isinstance(section, Mapping):
        raise InputError(
            f"config.json: {part.section} is {section!r:.40}; the settings of {name}'s language model are needed"
        )
    family = part.family or section.get("model_type")
    shared = {key: config[key] for key in _SHARED if config.get(key) is not None}
    return {**section, **shared, "model_type": family}
