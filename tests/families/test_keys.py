# SPDX-License-Identifier: Apache-2.0
"""Config keys that change what a model computes: understood, or refused by name."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from support.pico import FAMILIES, pico_config, write_pico

from lrconvert.errors import UnsupportedError
from lrconvert.families import get_family, read_shape
from lrconvert.families.keys import CHANGES, INERT, READ, ROPE_CHANGES, ROPE_READ, TELLING

FOLDERS = {"gemma3_text": "gemma3"}  # models that have a part in a larger one's folder
# Of that folder: keys of the larger model.
LARGER = {
    "boi_token_index", "eoi_token_index", "image_token_id", "image_token_index", "mm_tokens_per_image",
    "projection_hidden_size", "get_text_config", "text_config", "vision_config", "num_labels",
}  # fmt: skip
# What its class reads, and lrconvert refuses unless it is neutral.
REFUSED = {
    "qwen2_moe": {"mlp_only_layers", "decoder_sparse_step"},
    "qwen3_moe": {"mlp_only_layers", "decoder_sparse_step"},
    "gemma3_text": {"attn_logit_softcapping", "use_bidirectional_attention"},
}


def source_of(model_type: str, kind: str) -> str:
    """The text of a module of transformers."""
    transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    name = FOLDERS.get(model_type, model_type)
    return (Path(transformers.__file__).parent / "models" / name / f"{kind}_{name}.py").read_text(encoding="utf-8")


def fields_of(text: str) -> set[str]:
    """What a config's classes declare, as fields or as arguments of their constructors."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            found |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            found |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    return found - {"self", "model_type", "kwargs", "default_theta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_reads_is_known(family: str) -> None:
    """Every field of the family's config class, and every key that its modeling code takes."""
    used = set(re.findall(r"\bconfig\.([a-z_]\w*)", source_of(family, "modeling")))
    known = READ | INERT | get_family(family).own_keys | {"base_config_key", "keys_to_ignore_at_inference"}
    known |= REFUSED.get(family, set()) | (LARGER if family in FOLDERS else set())
    assert (fields_of(source_of(family, "configuration")) | used) - known == set()


def test_every_telling_key_of_other_decoders_is_known() -> None:
    """Of all other causal decoders of transformers: what sounds as if it changed logits is refused, or read."""
    pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    telling = set()
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            fields = fields_of(source_of(model_type, "configuration"))
        except (OSError, ValueError):  # a part of another model's folder
            continue
        telling |= {field for field in fields if TELLING.search(field)}
    assert len(telling) > 60
    for key in telling - READ - INERT:
        with pytest.raises(UnsupportedError, match=re.escape(key)):
            read_shape(pico_config("llama", **{key: 0.37}), get_family("llama"))


@pytest.mark.parametrize(
    "changes",
    [
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.01,
        },
        {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1},
        {"use_logn_attn": True},
        {"no_rope_layers": [1, 1, 1, 0]},
        {"logit_scale": 0.0625},
        {"some_new_multiplier": 3.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attn_factor": 1.2}},
        {"rope_scaling": {"type": "linear", "factor": 4.0, "alpha": 1000}},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_key_that_is_not_understood_is_refused_by_name(family: str, changes: dict[str, Any]) -> None:
    config = pico_config(family, **changes)
    if "rope_parameters" in changes:
        del config["rope_theta"]
    with pytest.raises(UnsupportedError) as caught:
        read_shape(config, get_family(family))
    section = changes.get("rope_scaling", changes.get("rope_parameters"))
    for key in changes if section is None else set(section) - ROPE_READ:
        assert key in str(caught.value)


def test_the_command_line_says_it_in_one_line(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Exit code 4, for every command that opens a model."""
    folder = write_pico(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "residual_multiplier": 0.22, "logits_scaling": 16}))
    for arguments in (
        ["inspect", folder],
        ["hf", folder, "-o", tmp_path / "o"],
        ["gguf", folder, "-o", tmp_path / "o.gguf"],
    ):
        result = cli(*arguments)
        assert result.code == 4 and "residual_multiplier 0.22, logits_scaling 16: keys that change" in result.err


def test_values_that_change_nothing_are_no_matter() -> None:
    """Null, the neutral value, and keys of training and bookkeeping."""
    neutral = {key: values[0] for key, values in CHANGES.items() if values}
    neutral |= dict.fromkeys(CHANGES.keys() - neutral.keys())
    unknown = {
        "unsloth_fixed": True,
        "use_mrope": False,
        "_name_or_path": "a/b",
        "full_attn_mod": 1,
        "torchscript": False,
    }
    scaling = {"type": "yarn", "factor": 4.0, **{key: values[0] for key, values in ROPE_CHANGES.items()}}
    config = {**pico_config("qwen2"), **neutral, **unknown, "rope_scaling": scaling}
    assert read_shape(config, get_family("qwen2")) == read_shape(pico_config("qwen2"), get_family("qwen2"))
