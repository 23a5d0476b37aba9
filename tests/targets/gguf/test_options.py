# SPDX-License-Identifier: Apache-2.0
"""What each option of `lrconvert gguf` changes in the file, what it takes, and that nothing else leaves a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Result, recipe_for
from safetensors.numpy import load_file, save_file
from support.gguf_files import LONG, SHORT, STATIC, WIDE, WINDOW, as_f32, bake, command, fields, model_of, tensors
from support.pico import write_pico
from support.verifying import verify
from support.vocabularies import QWEN2, byte_level, split

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.manifest import Manifest
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.fold import folded
from lrconvert.checkpoint.source import sha256_of
from lrconvert.cli._output import size
from lrconvert.errors import EnvironmentFailure, UnsupportedError
from lrconvert.parity import Options
from lrconvert.recipe import Recipe, write_recipe
from lrconvert.runtimes.llama_cpp import open_session
from lrconvert.runtimes.llama_library import find_library
from lrconvert.targets import gguf as target
from lrconvert.targets.gguf import weights

Pico = Callable[..., Model]
Cli = Callable[..., Result]
FAMILIES = ("llama", "mistral", "phi3", "qwen2", "granite")


def test_a_window_stops_at_the_tier_that_holds_it(pico: Pico, tmp_path: Path) -> None:
    """Of three tiers the first two; the last of them ends at the window. At the original window one set is left, and
    llama.cpp gets it twice."""
    model = model_of(pico, "llama")
    recipe = recipe_for(model, tiers=3, even=True)
    path = bake(model, recipe, tmp_path / "m.gguf", window=2 * WINDOW - 7)
    found = fields(path)
    assert found["llama.context_length"][1] == 2 * WINDOW - 7
    assert found["llama.rope.scaling.original_context_length"][1] == WINDOW
    np.testing.assert_array_equal(tensors(path)[LONG][1], as_f32(recipe.tiers[1].factors))
    path = bake(model, recipe, tmp_path / "o.gguf", window=WINDOW)
    found = fields(path)
    assert found["llama.context_length"][1] == found["llama.rope.scaling.original_context_length"][1] == WINDOW
    for name in (SHORT, LONG):
        np.testing.assert_array_equal(tensors(path)[name][1], as_f32(recipe.tiers[0].factors))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_static_file_has_one_set(pico: Pico, tmp_path: Path, family: str, cli: Cli) -> None:
    """llama: `rope_freqs` and scaling type none. phi3, which has no such tensor: two equal sets."""
    model = model_of(pico, family)
    recipe = recipe_for(model, even=True)
    path = bake(model, recipe, tmp_path / "m.gguf", static=True)
    found, keys = tensors(path), fields(path)
    sets = {name: found[name][1] for name in (SHORT, LONG, STATIC) if name in found}
    assert set(sets) == ({STATIC} if family == "llama" else {SHORT, LONG})
    for values in sets.values():
        np.testing.assert_array_equal(values, as_f32(recipe.tiers[-1].factors))
    assert keys[f"{family}.rope.scaling.type"][1] == ("none" if family == "llama" else "longrope")
    assert (f"{family}.rope.scaling.original_context_length" in keys) == (family == "phi3")
    assert keys[f"{family}.context_length"][1] == 2 * WINDOW
    assert "one factor set for all lengths" in cli("inspect", path).out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_attention_factor_is_in_q_and_k_and_in_nothing_else(pico: Pico, tmp_path: Path, family: str) -> None:
    """The rotated channels are scaled in float64 and rounded once; attn_factor is 1."""
    model = model_of(pico, family)
    recipe = recipe_for(model, even=True)
    path = bake(model, recipe, tmp_path / "m.gguf", fold=True)
    again, scaled = open_model(path), folded(model, recipe.tiers[-1].attention_factor, rounded=False)
    moved = {t.role for t in model.roles.values()
             if not np.array_equal(again.checkpoint.read(t.name), model.checkpoint.read(t.name))}  # fmt: skip
    biases = {"q_bias", "k_bias"} if family == "qwen2" else set()
    assert moved == ({"qkv"} if family == "phi3" else {"q", "k"} | biases)
    for tensor in model.roles.values():
        wanted = scaled.checkpoint.read(tensor.name).astype(np.float32)
        np.testing.assert_array_equal(again.checkpoint.read(tensor.name), wanted)
    architecture = family if family in ("phi3", "granite") else "llama"
    assert fields(path)[f"{architecture}.rope.scaling.attn_factor"] == ("FLOAT32", 1.0)
    assert Manifest.read(path).bake.attention_scale == recipe.tiers[-1].attention_factor


def test_parts_are_those_of_gguf_split(pico: Pico, tmp_path: Path, cli: Cli) -> None:
    """Names, keys and their types, metadata in the first part alone, no part above the limit, every tensor once;
    llama.cpp loads them through the first and answers as it does for the whole file."""
    model = model_of(pico, "llama", **WIDE)
    recipe = recipe_for(model, even=True)
    path = write_recipe(recipe, tmp_path / "recipe")
    assert cli(*command(model.checkpoint.path, path, tmp_path / "s.gguf", "--split-max-size", "1M")).code == 0
    whole = bake(model, recipe, tmp_path / "m.gguf")
    parts = sorted(tmp_path.glob("s-*.gguf"))
    count = len(parts)
    assert count > 2 and [part.name for part in parts] == [f"s-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]
    names: list[str] = []
    for number, part in enumerate(parts):
        names += (here := tensors(part))
        assert sum(values.nbytes for _, values in here.values()) <= 10**6
        keys = {key: value for key, value in fields(part).items() if key.startswith("split.") or number}
        assert keys == {
            "split.no": ("UINT16", number),
            "split.count": ("UINT16", count),
            "split.tensors.count": ("INT32", len(tensors(whole))),
        }
    assert names == list(tensors(whole))
    first = {key: value for key, value in fields(parts[0]).items() if not key.startswith("split.")}
    assert first == fields(whole)
    tokens = np.arange(40) % 101
    answers = []
    for file in (parts[0], whole):
        with open_session(file, threads=1) as session:
            answers.append(session.logits([tokens.tolist()], keep=[-1])[0])
    np.testing.assert_array_equal(*answers)
    assert set(Manifest.read(tmp_path / "s.gguf").files) == {part.name for part in parts}


def lora(path: Path) -> Path:
    """An adapter of two projections."""
    rng = np.random.default_rng(3)
    values = {}
    for module, rows in (("self_attn.q_proj", 64), ("mlp.down_proj", 64)):
        for part, shape in (("A", (4, 64 if "q_proj" in module else 96)), ("B", (rows, 4))):
            name = f"base_model.model.model.layers.1.{module}.lora_{part}.weight"
            values[name] = rng.standard_normal(shape).astype(np.float32)
    path.mkdir()
    save_file(values, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_as_hf_merges_it(tmp_path: Path, dtype: str, cli: Cli, options: Options) -> None:
    """The same weights as in the folder that `lrconvert hf` makes with it, and verify judges on them."""
    import ml_dtypes

    folder = write_pico(tmp_path / "m", max_position_embeddings=WINDOW, torch_dtype=dtype)
    if dtype == "bfloat16":
        values = {
            name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(folder / "model.safetensors").items()
        }
        save_file(values, folder / "model.safetensors")
    model, adapter = open_model(folder), lora(tmp_path / "adapter")
    recipe = write_recipe(recipe_for(model, even=True), tmp_path / "recipe")
    more = ("--recipe", recipe, "--adapter", adapter)
    assert cli("gguf", folder, *more, "-o", tmp_path / "m.gguf").code == 0
    assert cli("hf", folder, *more, "-o", tmp_path / "h").code == 0
    baked, merged = open_model(tmp_path / "m.gguf"), open_model(tmp_path / "h")
    for tensor in model.roles.values():
        ours, theirs = (m.checkpoint.read(tensor.name).astype(np.float32) for m in (baked, merged))
        np.testing.assert_array_equal(ours, theirs, err_msg=tensor.name)
    touched = "model.layers.1.mlp.down_proj.weight"
    assert not np.array_equal(baked.checkpoint.read(touched), model.checkpoint.read(touched))
    if dtype == "bfloat16":
        assert verify(tmp_path / "m.gguf", options=options).passed


def test_a_modelfile_names_the_file_and_the_window(tmp_path: Path, cli: Cli, plain: tuple[Path, Path]) -> None:
    """Without it Ollama serves a few thousand tokens; the manifest lists it as a file of the artifact."""
    output = tmp_path / "m.gguf"
    assert cli(*command(*plain, output, "--modelfile")).code == 0
    text = (tmp_path / "m.Modelfile").read_text().splitlines()
    assert text[-2:] == ["FROM ./m.gguf", f"PARAMETER num_ctx {2 * WINDOW}"]
    assert all(line.startswith("#") for line in text[:-2]) and f"num_ctx {WINDOW} or less" in "".join(text)
    assert set(Manifest.read(output).files) == {"m.gguf", "m.Modelfile"}


def test_a_modelfile_of_parts_is_refused(pico: Pico, tmp_path: Path) -> None:
    """Ollama can't create a model from them: said before anything is written, with both ways out."""
    model = model_of(pico, "llama")
    with pytest.raises(UnsupportedError, match=r"can't load a split GGUF.*--split-max-size"):
        bake(model, recipe_for(model, even=True), tmp_path / "m.gguf", modelfile=True, split=100_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [(), ("--type", "q4_0", "--modelfile"), ("--static-long",)])
def test_a_dry_run_writes_nothing_and_its_sizes_are_true(
    tmp_path: Path, cli: Cli, plain: tuple[Path, Path], more: tuple[str, ...]
) -> None:
    """What it prints for people are the sizes that the files then have."""
    before = sorted(path.name for path in tmp_path.iterdir())
    shown = cli(*command(*plain, tmp_path / "m.gguf", *more, "--dry-run"))
    assert shown.code == 0 and "nothing was written" in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert cli(*command(*plain, tmp_path / "m.gguf", *more)).code == 0
    for path in (*tmp_path.glob("m.gguf"), *tmp_path.glob("m.Modelfile")):
        assert f"  {path.name}: {size(path.stat().st_size)}, " in shown.out


@pytest.mark.parametrize("split", [None, 100_000])
def test_planned_sizes_are_those_of_the_files(pico: Pico, tmp_path: Path, split: int | None) -> None:
    """To the byte, padding included."""
    model = model_of(pico, "qwen2")
    planned = target.plan(
        model, recipe_for(model, even=True), tmp_path / "m.gguf", target.Options(split=split, modelfile=split is None)
    )
    bake_plan(planned)
    assert planned.sizes == {p.name: p.stat().st_size for p in tmp_path.iterdir() if not p.name.endswith(".json")}


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--type", "q9_9"), 2, ("'q9_9'", "f32, f16, bf16, q8_0", "q4_k_m")),
        (("--type", "list"), 2, ("f32, f16, bf16, q8_0", "q4_k_m")),
        (("-o", "m"), 2, ("ends in .gguf", "-o m.gguf")),
        (("-o", "m.GGUF"), 2, ("ends in .gguf",)),
        (("-o", "m-00001-of-00002.gguf"), 2, ("part of m.gguf", "--split-max-size")),
        (("--split-max-size", "12"), 2, ("examples: 2G, 500M",)),
        (("--window", "128"), 2, ("below the original window, 256",)),
        (("--window", "1k"), 2, ("beyond the recipe's last tier, 512",)),
        (("--tokenizer-pre", "nonsense"), 2, ("no tokenizer", "nonsense")),
        (("--imatrix", "x.gguf"), 2, ("nothing is quantised", "--type")),
        (("--llama-library", "/nowhere"), 3, ("/nowhere does not exist",)),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    tmp_path: Path, cli: Cli, plain: tuple[Path, Path], more: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    """The exit code says whose mistake it is, the line what was found and what would be right."""
    before = sorted(path.name for path in tmp_path.iterdir())
    if more[0] == "-o":
        more = ("-o", str(tmp_path / more[1]))
    result = cli(*command(*plain, tmp_path / "m.gguf", *more))
    assert result.code == code and len(result.err.splitlines()) == 1, result.err
    assert all(word in result.err for word in words), result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_name_that_is_not_utf_8_is_a_usage_error(tmp_path: Path, cli: Cli, plain: tuple[Path, Path]) -> None:
    """Neither metadata nor a manifest can hold it: said before anything is done, as source and as output."""
    odd = os.fsdecode(os.fsencode(tmp_path / "m") + b"\xff.gguf")
    for arguments in (command(*plain, Path(odd)), command(Path(odd), plain[1], tmp_path / "m.gguf")):
        result = cli(*arguments)
        assert result.code == 2 and "is not UTF-8" in result.err and len(result.err.splitlines()) == 1


def test_a_requested_pre_tokenizer_is_written(tmp_path: Path, cli: Cli) -> None:
    """Found in the tokenizer's structure otherwise; a name that contradicts it is written with a warning."""
    folder = write_pico(tmp_path / "m", max_position_embeddings=WINDOW, vocab_size=1010)
    (folder / "tokenizer.json").write_text(byte_level(split(QWEN2)).to_str())
    recipe = write_recipe(recipe_for(open_model(folder), even=True), tmp_path / "recipe")
    for name, more in (("qwen2", ()), ("llama-bpe", ("--tokenizer-pre", "llama-bpe"))):
        result = cli(*command(folder, recipe, tmp_path / f"{name}.gguf", *more))
        assert result.code == 0
        assert fields(tmp_path / f"{name}.gguf")["tokenizer.ggml.pre"] == ("STRING", name)
        assert ("tokenizer.json splits text as qwen2 does" in result.err) == bool(more)


def test_a_file_is_verified_at_once(tmp_path: Path, cli: Cli, plain: tuple[Path, Path]) -> None:
    """--verify, with the library that was named: its exit code, and the report in the manifest."""
    library = find_library().files[0]
    result = cli(*command(*plain, tmp_path / "m.gguf", "--llama-library", library, "--verify"))
    assert result.code == 0, result.err
    parity = Manifest.read(tmp_path / "m.gguf").parity
    assert parity is not None and parity["passed"] is True
    assert library.name in json.dumps(parity["runtimes"]), "an installed one was taken instead"


# --- the same bytes, and what it takes -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_k_m"])
def test_a_second_run_gives_the_same_bytes_however_the_work_is_cut(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Threads and the size of blocks leave no trace; nor do the time, the place and the output's name."""
    model = model_of(pico, "llama", **WIDE)
    recipe: Recipe = recipe_for(model, even=True)
    digests = {sha256_of(bake(model, recipe, tmp_path / f"{run}.gguf", type=kind)) for run in range(2)}
    monkeypatch.setattr(weights, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(weights, "BLOCK_VALUES", 700)
    monkeypatch.setattr("lrconvert.checkpoint.blocks.BLOCK_VALUES", 300)
    digests.add(sha256_of(bake(model, recipe, tmp_path / "elsewhere" / "3.gguf", type=kind)))
    assert len(digests) == 1


def test_k_quants_without_a_library_name_the_extra(
    tmp_path: Path, cli: Cli, pico_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 6 before anything is written; types that NumPy can make are made."""
    folder = pico_folder("llama", max_position_embeddings=WINDOW, **WIDE)
    recipe = write_recipe(recipe_for(open_model(folder), even=True), tmp_path / "recipe")

    def none(path: object = None) -> None:
        raise EnvironmentFailure("no llama.cpp here")

    monkeypatch.setattr("lrconvert.runtimes.llama_library.find_library", none)
    result = cli(*command(folder, recipe, tmp_path / "m.gguf", "--type", "q4_k_m"))
    assert result.code == 6 and "pip install 'lrconvert[llama]'" in result.err and len(result.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe"]
    assert cli(*command(folder, recipe, tmp_path / "m.gguf", "--type", "q8_0")).code == 0


def test_torch_and_transformers_are_neither_imported_nor_needed(tmp_path: Path, plain: tuple[Path, Path]) -> None:
    """A bake with types of every kind and a re-bake of its result, in a process where importing them fails."""

    def python(code: str, *arguments: object) -> str:
        code = f"import sys; from lrconvert.cli import run; {code}"
        texts = [str(argument) for argument in arguments]
        done = subprocess.run([sys.executable, "-c", code, *texts], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    blocked = (
        "sys.modules |= dict.fromkeys(('torch', 'transformers', 'tensorflow', 'jax')); sys.exit(run(sys.argv[1:]))"
    )
    python(blocked, *command(*plain, tmp_path / "m.gguf", "--type", "q4_k_m", "--modelfile"))
    python(blocked, *command(tmp_path / "m.gguf", plain[1], tmp_path / "again.gguf"))
    looked = "assert not run(sys.argv[1:]); print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert python(looked, *command(*plain, tmp_path / "n.gguf", "--type", "f16")).splitlines()[-1] == "[]"
