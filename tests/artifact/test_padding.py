# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that is larger than the embedding: named where it matters, and padded if that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, recipe_for
from safetensors.numpy import save_file
from support.pico import write_pico
from support.verifying import options_by_target, verify
from support.vocabularies import STYLES

import lrconvert
from lrconvert.artifact.manifest import MANIFEST, Manifest
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.adapter import CONFIG, EMBEDDING, LM_HEAD, WEIGHTS
from lrconvert.checkpoint.padding import padded, tokens_of
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.parity import Options
from lrconvert.parity.padding import padding_rows
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.recipe import write_recipe

MISSING = 3
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf": ("out", {}),
    "hf in f16": ("out", {"dtype": "f16"}),
    "gguf": ("out.gguf", {}),
    "gguf in q8_0": ("out.gguf", {"type": "q8_0"}),
    "onnx": ("out", {}),
    "onnx in int4": ("out", {"dtype": "int4"}),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in whose embedding the last tokens of its tokenizer have no row, in two shards."""
    tokenizer = STYLES["smollm"].tokenizer()
    tokens = tokenizer.get_vocab_size()
    folder = write_pico(
        tmp_path_factory.mktemp("small"), vocab_size=tokens - MISSING, tie_word_embeddings=request.param, shards=2
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def options_for() -> Iterator[Callable[[str], Options]]:
    """One interpreter for all artifacts of a target."""
    with options_by_target() as get:
        yield get


@pytest.mark.parametrize("target", TARGETS)
def test_a_padded_model_verifies_in_every_format(
    small: Path, target: str, tmp_path: Path, options_for: Callable[[str], Options]
) -> None:
    """With a record of what was added, rows that are the mean of the others, and a note on the card."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    model = open_model(small)
    name, options = TARGETS[target]
    if "gguf" in target:
        pytest.importorskip("xllamacpp")
    bake = getattr(lrconvert, target.split()[0])
    artifact = bake(small, recipe_for(model, even=True), tmp_path / name, pad=True, **options)
    manifest = Manifest.read(artifact.path)
    assert manifest.bake.padded == MISSING
    assert any(f"{MISSING} were added, each the mean" in note for note in manifest.notes)
    report = verify(artifact.path, options=options_for(target.split()[0]))
    assert report.passed, report.summary
    looked_at = [row.case for row in report.rows if row.code == "padding" and row.verdict == "pass"]
    assert len(looked_at) >= (1 if model.shape.tied else 2), looked_at
    if artifact.path.is_dir():
        assert "each the mean of the others" in (artifact.path / "README.md").read_text()
        assert json.loads((artifact.path / "config.json").read_text())["vocab_size"] == model.shape.vocab + MISSING


def test_no_manifest_says_that_more_rows_were_added_than_can_be(small: Path, tmp_path: Path) -> None:
    """A number of rows that no memory holds is refused where the manifest is read."""
    artifact = lrconvert.hf(small, recipe_for(open_model(small), even=True), tmp_path / "out", pad=True)
    path = artifact.path / MANIFEST
    path.write_text(path.read_text().replace(f'"padded": {MISSING}', f'"padded": {10**18}'))
    with pytest.raises(InputError, match="padded"):
        Manifest.read(artifact.path)


def test_logits_of_old_tokens_stay_and_new_ones_never_win(small: Path) -> None:
    """By the reference, which knows nothing of padding: a new token's logit is the mean of the others. A row of zeros
    would win wherever all others are negative."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    model = open_model(small)
    spec = model.resolve(recipe_for(model))
    tokens, keep = np.arange(60) % model.shape.vocab, np.arange(60)
    before = ReferenceRunner(model).answer(spec, tokens, 60, keep)
    after = ReferenceRunner(padded(model, MISSING)).answer(spec, tokens, 60, keep)
    old, new = after[:, :-MISSING], after[:, -MISSING:]
    np.testing.assert_allclose(old, before, atol=1e-12)  # float64; a product of another width rounds otherwise
    np.testing.assert_allclose(new, np.repeat(before.mean(axis=1, keepdims=True), MISSING, axis=1), atol=1e-5)
    chance = np.exp(after - after.max(axis=1, keepdims=True))
    chance /= chance.sum(axis=1, keepdims=True)
    assert chance[:, -MISSING:].sum(axis=1).max() <= MISSING / (model.shape.vocab + MISSING)


def test_rows_that_are_not_the_mean_are_found(small: Path) -> None:
    """Zeros, another tensor's mean, and a single row that is off."""
    model = padded(open_model(small), MISSING)
    name = model.roles["embedding", None].name
    right = model.checkpoint.read(name)

    def judged(values: np.ndarray) -> list[str]:
        stored: Any = Held(model, name, values)
        return [row.verdict for row in padding_rows(stored, model, MISSING) if name in row.case]

    assert judged(right) == ["pass"]
    one = right.copy()
    one[-2] *= 1.1
    for wrong in (np.concatenate([right[:-MISSING], 0 * right[-MISSING:]]), np.roll(right, 1, axis=0), one):
        assert judged(wrong) == ["fail"]


class Held:
    """A checkpoint whose tensor `name` has these values."""

    def __init__(self, model: Model, name: str, values: np.ndarray) -> None:
        self.tensors, self._model = model.checkpoint.tensors, model
        self._name, self._values = name, values

    def read(self, name: str) -> np.ndarray:
        return self._values if name == self._name else self._model.checkpoint.read(name)


def test_what_is_missing_has_a_name_and_a_remedy(
    small: Path, cli: Callable[..., Result], pico: Callable[..., Model], tmp_path: Path
) -> None:
    """Where it can be left alone it is a note; llama.cpp wants a row for each token, and the error says what to do."""
    for command, output in (("hf", "a"), ("onnx", "b")):
        baked = cli(command, small, "-o", tmp_path / output, "--dry-run", "--recipe", _recipe(small, tmp_path))
        assert baked.code == 0 and "--pad-embedding adds what is missing" in baked.err, baked.err
    refused = cli("gguf", small, "-o", tmp_path / "a.gguf", "--recipe", _recipe(small, tmp_path))
    assert refused.code == 3 and "--pad-embedding" in refused.err
    padded_too = cli("gguf", small, "-o", tmp_path / "a.gguf", "--recipe", _recipe(small, tmp_path), "--pad-embedding")
    assert padded_too.code == 0 and f"{MISSING} were added" in padded_too.err
    model = pico("llama")
    plain = cli("hf", model.reference, "-o", tmp_path / "c", "--recipe", _recipe(small, tmp_path), "--pad-embedding")
    assert "nothing was padded" in plain.err and Manifest.read(tmp_path / "c").bake.padded == 0
    again = cli("gguf", tmp_path / "a.gguf", "-o", tmp_path / "b.gguf", "--pad-embedding")
    assert again.code == 0 and "nothing was padded" in again.err
    with pytest.raises(UnsupportedError, match="a GGUF has a row for every token"):
        padded(open_model(str(tmp_path / "a.gguf")), 1)


def _recipe(folder: Path, tmp_path: Path) -> Path:
    return write_recipe(recipe_for(open_model(folder), even=True), tmp_path / "recipe", force=True)


def test_what_an_adapter_brings_is_not_added_again(small: Path, tmp_path: Path) -> None:
    """Padding comes after the merge: an adapter that has one row more leaves two to add."""
    model = open_model(small)
    shape = (model.shape.vocab + 1, model.shape.hidden)
    rows = {f"base_model.model.{name}": np.full(shape, 0.1, np.float32) for name in (EMBEDDING, LM_HEAD)}
    (tmp_path / "adapter").mkdir()
    save_file(rows, tmp_path / "adapter" / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "modules_to_save": ["embed_tokens", "lm_head"]}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps({**settings, "target_modules": []}))
    adapter, recipe = str(tmp_path / "adapter"), recipe_for(model, even=True)
    made = lrconvert.hf(small, recipe, tmp_path / "out", adapter=adapter, pad=True)
    assert made.manifest.bake.padded == MISSING - 1
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    report = verify(made.path)
    assert report.passed, report.summary


def test_every_file_of_a_tokenizer_counts() -> None:
    """The largest id of any, and nothing where there is none; damage is said."""
    vocabulary = json.dumps({"model": {"vocab": {"a": 0, "b": 4}}, "added_tokens": [{"id": 6}]}).encode()
    files: dict[str, Path | bytes] = {"tokenizer.json": vocabulary}
    assert tokens_of({}) == 0
    assert tokens_of(files) == 7
    assert tokens_of({**files, "added_tokens.json": b'{"<pad>": 8}'}) == 9
    decoder = b'{"added_tokens_decoder": {"10": {"content": "<x>"}}}'
    assert tokens_of({**files, "tokenizer_config.json": decoder}) == 11
    unigram = json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}).encode()
    assert tokens_of({"tokenizer.json": unigram}) == 2
    assert tokens_of({"tokenizer.model": b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01b"}) == 2
    odd = {"model": {"vocab": 7}, "added_tokens": 8}
    assert tokens_of({"tokenizer.json": json.dumps(odd).encode()}) == 0
    assert tokens_of({"tokenizer_config.json": json.dumps({"added_tokens_decoder": {"9" * 5000: 1}}).encode()}) == 0
    for name in ("tokenizer.json", "added_tokens.json", "tokenizer.model"):
        with pytest.raises(InputError, match=name):
            tokens_of({name: b"\x0a\xff{"})
