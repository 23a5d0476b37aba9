# SPDX-License-Identifier: Apache-2.0
"""Adapters that change a model's vocabulary: grown embeddings, rows that were trained alone. As PEFT writes and merges
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recipe_for
from safetensors.numpy import load_file, save_file
from support.pico import write_pico

import lrconvert
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.adapter import CONFIG, EMBEDDING, LM_HEAD, WEIGHTS, merged, open_adapter
from lrconvert.errors import InputError

GROWN = 109  # pico models have 101 tokens
Tensors = dict[str, np.ndarray]


def made(base: Path, path: Path, rows: int = 0, **lora: Any) -> tuple[Tensors, np.ndarray]:
    """An adapter that PEFT writes, on a base that has grown to `rows`; what PEFT merges, and the logits it computes."""
    torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")
    peft = pytest.importorskip("peft", reason="needs peft")
    transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **lora}
    trained = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        trained.eval().save_pretrained(path)
        logits = trained(input_ids=torch.arange(3, 40)[None]).logits[0].numpy()
    whole = trained.merge_and_unload()
    return {name: tensor.detach().numpy().copy() for name, tensor in whole.state_dict().items()}, logits


def held(model: Model) -> Tensors:
    found = {name: model.checkpoint.read(name) for name in model.checkpoint.tensors}
    return found if not model.shape.tied else {LM_HEAD: found[EMBEDDING], **found}


CASES: dict[str, tuple[str, bool, int, dict[str, Any]]] = {
    "grown, both ends trained": ("qwen2", True, GROWN, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "grown, untied": ("llama", False, GROWN, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "grown, the embedding trained": ("llama", True, GROWN, {"modules_to_save": ["embed_tokens"]}),
    "grown, neither trained": ("llama", True, GROWN, {}),
    "grown, neither trained, untied": ("mistral", False, GROWN, {}),
    "rows": ("qwen2", True, 0, {"trainable_token_indices": {"embed_tokens": [5, 6, 100]}}),
    "rows as a list": ("llama", True, 0, {"trainable_token_indices": [0, 7]}),
    "rows, untied": ("llama", False, 0, {"trainable_token_indices": {"embed_tokens": [5, 6]}}),
    "rows of both ends": ("llama", False, 0, {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [5, 9]}}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_the_merge_is_pefts(name: str, tmp_path: Path) -> None:
    """Every tensor, and the logits of the folder that is baked."""
    family, tied, rows, lora = CASES[name]
    base = write_pico(tmp_path / "base", family, tie_word_embeddings=tied)
    wanted, logits = made(base, tmp_path / "adapter", rows, **lora)
    model = merged(open_model(base), open_adapter(tmp_path / "adapter"))
    found = held(model)
    assert set(found) == set(wanted) and model.shape.vocab == (rows or 101)
    for tensor, values in wanted.items():
        np.testing.assert_allclose(found[tensor], values, atol=2e-6 * np.abs(values).max(), err_msg=tensor)
    artifact = lrconvert.hf(
        base, recipe_for(open_model(base)), tmp_path / "out", adapter=str(tmp_path / "adapter")
    ).path
    made_config = json.loads((artifact / "config.json").read_text())
    assert made_config["vocab_size"] == (rows or 101) and made_config["tie_word_embeddings"] is model.shape.tied
    assert logits.shape == (37, rows or 101)


@pytest.mark.filterwarnings("ignore")
def test_rows_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    base = write_pico(tmp_path / "base")
    made(base, tmp_path / "adapter", trainable_token_indices={"embed_tokens": [5, 6]})
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    for rows, needle in (([5, 101], "has 101 rows"), ([5], r"\[1, 64\] is needed"), ([5, "x"], "lists of row numbers")):
        config["trainable_token_indices"] = {"embed_tokens": rows}
        (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
        with pytest.raises(InputError, match=needle):
            merged(open_model(base), open_adapter(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore")
def test_one_end_alone_cannot_grow(tmp_path: Path) -> None:
    """An untied model needs a row of the head for every token, and a vocabulary does not shrink."""
    base = write_pico(tmp_path / "base")
    made(base, tmp_path / "adapter", GROWN, modules_to_save=["embed_tokens", "lm_head"])
    file = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(file)
    save_file({name: array for name, array in tensors.items() if "lm_head" not in name}, file)
    with pytest.raises(InputError, match=r"\[101, 64\] is needed for model.embed_tokens.weight"):
        merged(open_model(base), open_adapter(tmp_path / "adapter"))
    save_file(
        {name: array[:90] if "embed" in name or "lm_head" in name else array for name, array in tensors.items()}, file
    )
    with pytest.raises(InputError, match=r"\[101, 64\] is needed"):
        merged(open_model(base), open_adapter(tmp_path / "adapter"))


def test_a_merged_checkpoint_with_two_heads_takes_an_adapter(tmp_path: Path) -> None:
    """Tied by its config, with another head in the file: the adapter's embedding leaves that alone."""
    base = write_pico(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    head = np.ones_like(tensors[EMBEDDING])
    save_file({**tensors, LM_HEAD: head}, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "modules_to_save": ["embed_tokens"]}))
    fresh = np.full_like(head, 0.5)
    save_file({"base_model.model." + EMBEDDING: fresh}, tmp_path / "a" / WEIGHTS)
    model = merged(open_model(base), open_adapter(tmp_path / "a"))
    assert not model.shape.tied
    np.testing.assert_array_equal(model.checkpoint.read(LM_HEAD), head)
    np.testing.assert_array_equal(model.checkpoint.read(EMBEDDING), fresh)
