# SPDX-License-Identifier: Apache-2.0
"""Files as trainers leave them: another head in a tied model, one tensor for two, wrappers' names, extras."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recipe_for
from safetensors.numpy import load_file, save_file
from support.pico import pico_tensors, write_pico
from support.verifying import verify

import lrconvert
from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import InputError
from lrconvert.parity.reference_runner import ReferenceRunner

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FORMATS = (("hf", "out", "transformers"), ("gguf", "out.gguf", "xllamacpp"), ("onnx", "onnx", "onnxruntime"))
Tensors = dict[str, np.ndarray]


def stored(
    folder: Path, change: Callable[[Tensors], Any], family: str = "llama", shards: int = 1, **config: Any
) -> Path:
    """A pico model whose file was changed."""
    write_pico(folder, family, shards=shards, **config)
    if shards == 1:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    parts: dict[str, Tensors] = {}
    for file in sorted(set(index["weight_map"].values())):
        parts[file] = load_file(folder / file)
    everything = {name: array for tensors in parts.values() for name, array in tensors.items()}
    before = set(everything)
    change(everything)
    last, weight_map = sorted(parts)[-1], {}
    for file, tensors in parts.items():
        kept = {name: everything[name] for name in tensors if name in everything}
        added = {name: array for name, array in everything.items() if name not in before} if file == last else {}
        save_file(kept | added, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept | added, file)
    index["weight_map"] = weight_map
    index["metadata"]["total_size"] = sum(array.nbytes for array in everything.values())
    index_path.write_text(json.dumps(index))
    return folder


def logits(model: Model) -> np.ndarray:
    runner = ReferenceRunner(model, device="cpu")
    return runner.answer(model.resolve(recipe_for(model)), np.arange(3, 40), 37, np.arange(37))


def another_head(tensors: Tensors) -> None:
    tensors[HEAD] = np.random.default_rng(9).standard_normal(tensors[EMBEDDING].shape).astype(np.float32) / 8


def equal_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].copy()


def head_alone(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


# --- tied embeddings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "shards"), [("llama", 1), ("qwen2", 2), ("phi3", 1), ("mistral", 1)])
def test_a_head_that_differs_from_a_tied_embedding_counts(family: str, shards: int, tmp_path: Path) -> None:
    """The model computes what an untied one with both tensors computes, and says so; artifacts carry the head."""
    config: dict[str, Any] = {"tie_word_embeddings": True, "sliding_window": None}
    folder = stored(tmp_path / "m", another_head, family, shards, **config)
    model = open_model(folder)
    assert not model.shape.tied and any("the file counts" in note for note in model.notes)
    untied = write_pico(tmp_path / "u", family, tie_word_embeddings=False, sliding_window=None)
    tensors = pico_tensors(json.loads((folder / "config.json").read_text()))
    another_head(tensors)
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(logits(model), logits(open_model(untied)))
    artifact = lrconvert.hf(folder, recipe_for(model), tmp_path / "out").path
    assert json.loads((artifact / "config.json").read_text())["tie_word_embeddings"] is False
    if family != "phi3":  # whose partial rotation llama.cpp has elsewhere
        lrconvert.gguf(folder, recipe_for(model, even=True), tmp_path / "out.gguf")
        np.testing.assert_array_equal(open_model(tmp_path / "out.gguf").tensor("lm_head"), tensors[HEAD])


@pytest.mark.parametrize(("target", "name", "program"), FORMATS)
def test_another_head_is_verified_in_every_format(target: str, name: str, program: str, tmp_path: Path) -> None:
    """And an artifact that lost it fails."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    pytest.importorskip(program)
    folder = stored(tmp_path / "m", another_head, tie_word_embeddings=True, max_position_embeddings=256)
    recipe = recipe_for(open_model(folder), even=True)
    assert verify(getattr(lrconvert, target)(folder, recipe, tmp_path / name).path).passed
    lost = stored(tmp_path / "lost", lambda tensors: None, tie_word_embeddings=True, max_position_embeddings=256)
    wrong = getattr(lrconvert, target)(lost, recipe, tmp_path / f"wrong-{name}").path
    assert not verify(wrong, against=str(folder), recipe=recipe).passed


def test_equal_copies_stay_tied(tmp_path: Path) -> None:
    """Half the bytes, and nothing to say."""
    model = open_model(stored(tmp_path / "m", equal_head, tie_word_embeddings=True))
    assert model.shape.tied and not model.notes
    lrconvert.gguf(tmp_path / "m", recipe_for(model, even=True), tmp_path / "m.gguf")
    assert HEAD not in open_model(tmp_path / "m.gguf").checkpoint.tensors


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_head_alone_is_the_embedding(family: str, shards: int, tmp_path: Path) -> None:
    """Of two names that are one tensor, a file may have this one. The artifact has the usual."""
    folder = stored(tmp_path / "m", head_alone, family, shards, tie_word_embeddings=True)
    usual = write_pico(tmp_path / "u", family, tie_word_embeddings=True)
    model = open_model(folder)
    np.testing.assert_array_equal(logits(model), logits(open_model(usual)))
    artifact = lrconvert.hf(folder, recipe_for(model), tmp_path / "out").path
    files = [load_file(path) for path in artifact.glob("*.safetensors")]
    names = {name for tensors in files for name in tensors}
    assert EMBEDDING in names and HEAD not in names
    if shards > 1:
        index = json.loads((artifact / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == names
        assert index["metadata"]["total_size"] == sum(array.nbytes for tensors in files for array in tensors.values())


def test_an_untied_model_needs_both(tmp_path: Path) -> None:
    folder = stored(tmp_path / "m", lambda tensors: tensors.pop(EMBEDDING))
    with pytest.raises(InputError, match=f"missing tensors: {EMBEDDING}"):
        open_model(folder)


# --- names and extras ------------------------------------------------------------------------------------


def renamed(rule: Callable[[str], str]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rule(name)] = tensors.pop(name)

    return change


RULES: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of the backbone": lambda name: name.replace("model.", "model._orig_mod."),
    "data parallelism": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "a value-head model": lambda name: f"pretrained_model.{name}",
    "the backbone alone": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("rule", RULES)
def test_names_of_wrappers_are_read_with_a_note(rule: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "m", renamed(RULES[rule]), "qwen2", tie_word_embeddings=True)
    model = open_model(folder)
    assert any("read under other names" in note for note in model.notes)
    usual = open_model(write_pico(tmp_path / "u", "qwen2", tie_word_embeddings=True))
    np.testing.assert_array_equal(logits(model), logits(usual))
    artifact = lrconvert.hf(folder, recipe_for(model), tmp_path / "out").path
    assert set(load_file(artifact / "model.safetensors")) == set(usual.checkpoint.tensors)


EXTRA = {
    "a value head": {"v_head.summary.weight": (1, 64), "v_head.summary.bias": (1,)},
    "another value head": {"value_head.weight": (1, 64)},
    "rotary tables": {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (8,) for layer in range(2)},
}


@pytest.mark.parametrize("what", EXTRA)
@pytest.mark.parametrize("family", ["phi3", "qwen2", "llama"])
def test_extras_are_named_and_not_read(what: str, family: str, tmp_path: Path) -> None:
    extra = {name: np.ones(shape, np.float32) for name, shape in EXTRA[what].items()}
    model = open_model(stored(tmp_path / "m", lambda tensors: tensors.update(extra), family))
    assert any(note.startswith(f"not part of {family}, never read: ") for note in model.notes)
    lrconvert.hf(tmp_path / "m", recipe_for(model), tmp_path / "out")


def test_what_is_no_extra_is_still_refused(tmp_path: Path) -> None:
    """A tensor that a decoder might use, and two that would be one."""
    folder = stored(tmp_path / "m", lambda tensors: tensors.update({"model.layers.0.self_attn.sinks": np.ones(4)}))
    with pytest.raises(InputError, match=r"does not have: model.layers.0.self_attn.sinks"):
        open_model(folder)
    name = "model.norm.weight"
    twice = stored(tmp_path / "t", lambda tensors: tensors.update({f"module.{name}": tensors[name]}))
    with pytest.raises(InputError, match=rf"{name} and module.{name} are the same tensor"):
        open_model(twice)
