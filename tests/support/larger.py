# SPDX-License-Identifier: Apache-2.0
"""Pico models of the larger kinds that hold a language model: as transformers saves them, and in published layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from support.pico import BASE, pico_config, pico_tensors

LAYERS = BASE["num_hidden_layers"]


def published(folder: Path, kind: str, *, shards: int = 1, **changes: Any) -> Path:
    """Phi-3-vision or Phi-4-multimodal, as published names are; what isn't of the language model is noise."""
    config = pico_config("phi3", **changes)
    tensors = pico_tensors(config)
    noise = np.random.default_rng(1).standard_normal
    more: dict[str, Any] = {"img_processor": {"name": "clip_vision_model"}, "embd_layer": {"embedding_cls": "image"}}
    if kind == "phi3_v":
        front = "model.vision_embed_tokens."
        others = {front + name: noise((4, 4)) for name in ("img_processor.vision_model.w", "glb_GN", "sub_GN")}
    else:
        more |= {"audio_processor": {"name": "cascades"}, "vision_lora": {"r": 2, "lora_alpha": 4, "layer": "…"}}
        more |= {"speech_lora": {"r": 3, "lora_alpha": 6, "layer": "…"}}
        front = "model.embed_tokens_extend."
        others = {front + name: noise((4, 4)) for name in ("image_embed.glb_GN", "audio_embed.encoder.w")}
        for name in [name for name in tensors if "_proj" in name]:
            rows, columns = tensors[name].shape
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.base_layer.weight"] = tensors.pop(name)
            for adapter, rank in (("vision", 2), ("speech", 3)):
                others[f"{stem}.lora_A.{adapter}.weight"] = noise((rank, columns))
                others[f"{stem}.lora_B.{adapter}.weight"] = noise((rows, rank))
    config |= {
        "model_type": kind,
        "architectures": ["Larger"],
        "auto_map": {"AutoModelForCausalLM": "x.Larger"},
        **more,
    }
    return _saved(folder, config, tensors | {name: one.astype(np.float32) for name, one in others.items()}, shards)


def _saved(folder: Path, config: dict[str, Any], tensors: dict[str, Any], shards: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    # the last shard holds nothing of the language model
    text = [name for name in tensors if "embed_tokens_" not in name]
    groups = [text[part :: shards - 1] for part in range(shards - 1)]
    groups.append([name for name in tensors if "embed_tokens_" in name])
    weight_map = {}
    for part, names in enumerate(groups, 1):
        file = f"model-{part:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(one.nbytes for one in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
TEXT = {key: BASE[key] for key in BASE if key not in ("head_dim", "torch_dtype", "rope_theta", "hidden_act")}


def _phi4_multimodal(**changes: Any) -> Any:
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    audio = {"num_blocks": 1, "ext_pw_out_channel": 16, "depthwise_seperable_out_channel": 16, "nemo_conv_channels": 16}
    vision = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "crop_size": 28}
    config = Phi4MultimodalConfig(
        **{**TEXT, "original_max_position_embeddings": TEXT["max_position_embeddings"], **changes},
        vision_config={**SMALL, **vision},
        audio_config={**SMALL, **audio},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    )
    return Phi4MultimodalForCausalLM(config)


def _mistral3(family: str = "mistral", **changes: Any) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tied = changes.pop("tie_word_embeddings", False)
    text = {**TEXT, "model_type": family, "head_dim": 16, "sliding_window": None, "tie_word_embeddings": tied}
    vision = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "head_dim": 8}
    config = Mistral3Config(
        text_config={**text, **changes},
        vision_config={"model_type": "pixtral", **SMALL, **vision},
        image_token_index=10,
        tie_word_embeddings=tied,
    )
    return Mistral3ForConditionalGeneration(config)


def _ministral3(**changes: Any) -> Any:
    """Whose queries grow within a few tokens."""
    settings = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.5}
    settings["original_max_position_embeddings"] = 13
    return _mistral3("ministral3", rope_parameters=settings, **changes)


CLASSES: dict[str, Callable[..., Any]] = {
    "phi4_multimodal": _phi4_multimodal,
    "mistral3": _mistral3,
    "mistral3 of ministral3": _ministral3,
}


def saved(folder: Path, kind: str, **changes: Any) -> Path:
    """What `save_pretrained` writes of transformers' own class, with wide q and k."""
    import torch

    torch.manual_seed(3)
    network = CLASSES[kind](**changes)
    with torch.no_grad():
        for name, values in network.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
                values.mul_(12.0)
    network.save_pretrained(folder)
    return folder
