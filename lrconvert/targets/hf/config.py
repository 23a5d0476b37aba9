# SPDX-License-Identifier: Apache-2.0
"""The artifact's JSON files, as edits of the source's: what is not about the rotation stays as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from lrconvert.artifact.plan import Edit
from lrconvert.checkpoint import Model, read_json
from lrconvert.checkpoint.folder_code import AUTO_MAP
from lrconvert.checkpoint.rope_config import LONGROPE_KEY
from lrconvert.errors import InputError
from lrconvert.rope import RopeSpec
from lrconvert.targets.hf.spelling import native_keys, own_key, plain_keys

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def edited_config(
    model: Model, spec: RopeSpec, native: RopeSpec, dtype: str | None, *, lifted: bool = False
) -> tuple[dict[str, Any], list[Edit]]:
    """The artifact's config.json and what changed. `dtype`: what the weights are to be, None: as they were. `lifted`:
    without the model's sliding windows."""
    source, family = model.checkpoint.config, model.family
    config = copy.deepcopy(source)
    if model.shape.rotary_dim != model.shape.head_dim:
        # transformers 5 keeps this inside rope_parameters, 4.57 reads only the top level.
        config["partial_rotary_factor"] = model.shape.rotary_dim / model.shape.head_dim
    if family.hf_states_head_size:
        config["head_dim"] = model.shape.head_dim
    config.pop("rope_parameters", None)
    config.update(native_keys(native, family, model.shape) | plain_keys(native, family, model.shape))
    if lifted:
        config["sliding_window"] = spec.window
    if model.shape.tied != (source.get("tie_word_embeddings") is True):
        config["tie_word_embeddings"] = model.shape.tied
    config["architectures"] = [family.hf_class]
    config["auto_map"] = dict(AUTO_MAP)
    if dtype is not None:
        spelled = [key for key in ("dtype", "torch_dtype") if key in source] or ["torch_dtype"]
        config.update(dict.fromkeys(spelled, TORCH_NAMES[dtype]))
    config[LONGROPE_KEY] = own_key(spec, model.shape)
    return config, _edits("config.json", {**source, **model.checkpoint.outdated}, config)


def json_bytes(value: dict[str, Any], name: str) -> bytes:
    """A JSON file of the artifact. `InputError` for what came out of the source and JSON can't express."""
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError as error:  # NaN, infinity, half a surrogate pair: Python reads them, JSON has no such thing
        raise InputError(f"{name}: holds what JSON can't express ({error})") from error


def side_files(model: Model, spec: RopeSpec) -> tuple[dict[str, bytes], dict[str, Path], list[Edit]]:
    """The source's other files: those that are made here, those that come along as they are, and what is edited."""
    texts: dict[str, bytes] = {}
    kept: dict[str, Path] = {}
    for name, content in model.checkpoint.side_files().items():
        if isinstance(content, bytes):
            texts[name] = content
        else:
            kept[name] = content
    name = "tokenizer_config.json"
    if name not in texts and name not in kept:
        return texts, kept, []
    edited, edits = edited_tokenizer_config(json_in(texts, kept, name), spec)
    kept.pop(name, None)
    texts[name] = json_bytes(edited, name)
    return texts, kept, edits


def json_in(texts: dict[str, bytes], kept: dict[str, Path], name: str) -> dict[str, Any]:
    """A JSON file among them; empty where there is none."""
    return json.loads(texts[name]) if name in texts else read_json(kept[name]) if name in kept else {}


def edited_tokenizer_config(source: dict[str, Any], spec: RopeSpec) -> tuple[dict[str, Any], list[Edit]]:
    """tokenizer_config.json with the new window."""
    config = {**source, "model_max_length": spec.window}
    return config, _edits("tokenizer_config.json", source, config)


def _edits(file: str, old: dict[str, Any], new: dict[str, Any]) -> list[Edit]:
    keys = [*old, *(key for key in new if key not in old)]
    return [Edit(file, key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
