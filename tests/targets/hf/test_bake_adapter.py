# SPDX-License-Identifier: Apache-2.0
"""Baking with an adapter: only shards that it touches are written, and verify uses merged weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf-modules-"))

import ml_dtypes
import numpy as np
import pytest
from conftest import Result, recipe_for
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.pico import write_pico

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.manifest import MANIFEST, Manifest
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.adapter import choose_adapter, merged, open_adapter
from lrconvert.checkpoint.source import sha256_of
from lrconvert.checkpoint.tensor_file import TensorFile
from lrconvert.errors import UsageError
from lrconvert.recipe import load_recipe, recipe_folder, write_recipe
from lrconvert.targets import hf

INDEX, CONFIG, WEIGHTS = "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"
Q1, EMBEDDING, LM_HEAD = "model.layers.1.self_attn.q_proj", "model.embed_tokens.weight", "lm_head.weight"


def adapter_for(path: Path, modules: list[str], *, saved: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A LoRA with a pair for each [64, 64] module, and `saved` tensors."""
    rng = np.random.default_rng(3)
    tensors = {f"base_model.model.{name}": array for name, array in (saved or {}).items()}
    for module in modules:
        for part in ("A", "B"):
            shape = (4, 64) if part == "A" else (64, 4)
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = rng.standard_normal(shape).astype(np.float32)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS)
    saved_modules = [name.removesuffix(".weight") for name in saved or {}]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "modules_to_save": saved_modules or None, **changes}
    (path / CONFIG).write_text(json.dumps(config))
    return path


def all_attention(path: Path, **changes: Any) -> Path:
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in ("q", "o")]
    return adapter_for(path, modules, **changes)


def bake(base: Path, adapter: Path, output: Path, **options: Any) -> Path:
    model = open_model(base)
    bake_plan(
        hf.plan(model, recipe_for(model, even=True), output, hf.Options(**options), adapter=open_adapter(adapter))
    )
    return output


def stored(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def expected(base: Path, adapter: Path, **options: Any) -> dict[str, np.ndarray]:
    checkpoint = merged(open_model(base), open_adapter(adapter), **options).checkpoint
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# --- shards ----------------------------------------------------------------------------------------------


def test_only_a_touched_shard_is_written(tmp_path: Path) -> None:
    """The others are the source's inodes, the index too; the new one has the old one's name, order and header."""
    base = write_pico(tmp_path / "base", shards=4)
    adapter = adapter_for(tmp_path / "adapter", [Q1])
    out = bake(base, adapter, tmp_path / "out")
    touched = json.loads((base / INDEX).read_text())["weight_map"][f"{Q1}.weight"]
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    for name in shards:
        assert (out / name).samefile(base / name) == (name != touched)
    assert (out / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert list(TensorFile(out / touched).tensors) == list(TensorFile(base / touched).tensors)
    assert (out / touched).stat().st_size == (base / touched).stat().st_size
    with safe_open(out / touched, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same(stored(out), expected(base, adapter))
    assert not np.array_equal(stored(out)[f"{Q1}.weight"], stored(base)[f"{Q1}.weight"])
    records = Manifest.read(out).files
    assert {name for name in shards if not records[name].linked} == {touched}
    assert records[touched].sha256 == sha256_of(out / touched)


def test_the_plan_says_what_is_written(tmp_path: Path) -> None:
    base = write_pico(tmp_path / "base", shards=3)
    model = open_model(base)
    adapter = open_adapter(adapter_for(tmp_path / "adapter", [Q1]))
    plan = hf.plan(model, recipe_for(model), tmp_path / "out", adapter=adapter)
    bake_plan(plan)
    written = {path.name: path.stat().st_size for path in plan.output.iterdir() if path.name != MANIFEST}
    assert plan.sizes == written
    assert [stream.name for stream in plan.streams] == [model.checkpoint.tensors[f"{Q1}.weight"].file.name]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_head_of_its_own_is_added_to_the_last_file_and_the_index(shards: int, tmp_path: Path) -> None:
    """lm_head saved on a tied model: a tensor, an entry, both totals, and a config that says so."""
    base = write_pico(tmp_path / "base", shards=shards, tie_word_embeddings=True)
    if shards > 1:
        index = json.loads((base / INDEX).read_text())
        index["metadata"]["total_parameters"] = index["metadata"]["total_size"] // 4
        index["foreign"] = 1
        (base / INDEX).write_text(json.dumps(index))
    head = np.random.default_rng(5).standard_normal((101, 64)).astype(np.float32)
    adapter = adapter_for(tmp_path / "adapter", [], saved={LM_HEAD: head})
    out = bake(base, adapter, tmp_path / "out")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert [(out / name).samefile(base / name) for name in files] == [True] * (shards - 1) + [False]
    assert list(TensorFile(out / files[-1]).tensors)[-1] == LM_HEAD
    np.testing.assert_array_equal(stored(out)[LM_HEAD], head)
    np.testing.assert_array_equal(stored(out)[EMBEDDING], stored(base)[EMBEDDING])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    if shards > 1:
        new, old = (json.loads((folder / INDEX).read_text()) for folder in (out, base))
        assert new["weight_map"] == {**old["weight_map"], LM_HEAD: files[-1]}
        assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + head.nbytes
        assert new["metadata"]["total_parameters"] == old["metadata"]["total_parameters"] + head.size
        assert new["foreign"] == 1
    assert not open_model(out).shape.tied
    transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_array_equal(loaded.lm_head.weight.detach().numpy(), head)
    np.testing.assert_array_equal(loaded.model.embed_tokens.weight.detach().numpy(), stored(base)[EMBEDDING])


def test_tables_that_nobody_reads_are_left_out_of_a_written_shard(tmp_path: Path) -> None:
    """And of the index; untouched shards keep theirs."""
    base = write_pico(tmp_path / "base", shards=2)
    index = json.loads((base / INDEX).read_text())
    touched = index["weight_map"][f"{Q1}.weight"]
    for number, path in enumerate(sorted(base.glob("*.safetensors"))):
        name = f"model.layers.{number}.self_attn.rotary_emb.inv_freq"
        save_file({**load_file(path), name: np.ones(8, np.int64)}, path, metadata={"format": "pt"})
        index["weight_map"][name] = path.name
        index["metadata"]["total_size"] += 64
    (base / INDEX).write_text(json.dumps(index))
    out = bake(base, adapter_for(tmp_path / "adapter", [Q1]), tmp_path / "out")
    new = json.loads((out / INDEX).read_text())
    left = {n: f for n, f in index["weight_map"].items() if "inv_freq" not in n or f != touched}
    assert new["weight_map"] == left and len(left) == len(index["weight_map"]) - 1
    assert new["metadata"]["total_size"] == index["metadata"]["total_size"] - 64
    assert set(open_model(out).checkpoint.tensors) == set(left)


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"dtype": "f32"}])
def test_two_bakes_are_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    base = write_pico(tmp_path / "base", shards=3)
    adapter = all_attention(tmp_path / "adapter")
    made = [bake(base, adapter, tmp_path / name, **options) for name in ("one", "two")]
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in made)
    assert one == two


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")])
@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16])
def test_a_dtype_of_the_artifact_is_reached_with_one_rounding(
    dtype: str, name: str, source: Any, tmp_path: Path
) -> None:
    """From the float32 sum at once, not by way of the base's dtype."""
    base = write_pico(tmp_path / "base")
    path = base / "model.safetensors"
    save_file({k: v.astype(source) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    adapter = all_attention(tmp_path / "adapter")
    out = bake(base, adapter, tmp_path / "out", dtype=dtype)
    wanted = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[name]
    wide = expected(base, adapter, rounded=False)
    assert_same(stored(out), {key: array.astype(wanted) for key, array in wide.items()})


def test_large_tensors_come_out_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, made by several threads: every byte where it belongs."""
    from lrconvert.checkpoint import blocks

    monkeypatch.setattr(blocks, "BLOCK_VALUES", 130)
    base = write_pico(tmp_path / "base", shards=2)
    adapter = all_attention(tmp_path / "adapter")
    out = bake(base, adapter, tmp_path / "out")
    monkeypatch.undo()
    assert_same(stored(out), expected(base, adapter))


def test_an_error_while_merging_leaves_nothing(tmp_path: Path, cli: Callable[..., Result]) -> None:
    base = write_pico(tmp_path / "base")
    adapter = all_attention(tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    tensors[f"base_model.model.{Q1}.lora_B.weight"][3, 2] = np.inf
    save_file(tensors, adapter / WEIGHTS)
    recipe = write_recipe(recipe_for(open_model(base)), tmp_path / "recipe")
    before = sorted(tmp_path.iterdir())
    result = cli("hf", base, "--recipe", recipe, "--adapter", adapter, "-o", tmp_path / "out")
    assert result.code == 3 and f"merged {Q1}.weight: holds values that are not finite" in result.err
    assert sorted(tmp_path.iterdir()) == before


# --- the command, recipes, verify ------------------------------------------------------------------------


def test_the_command_merges_and_says_so(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """The manifest knows the adapter again; without --adapter the recipe's own is taken, from beside it."""
    base = write_pico(tmp_path / "base")
    recipe = recipe_for(open_model(base))
    folder = tmp_path / "recipe"
    adapter = all_attention(folder / "lora", base_model_name_or_path="org/trained-on")
    write_recipe(recipe, folder)
    carrying = json.loads((folder / "recipe.json").read_text()) | {"adapter": "lora"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plain.json").write_text((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(carrying))
    given = cli("hf", base, "--recipe", tmp_path / "other" / "plain.json", "--adapter", adapter, "-o", tmp_path / "a")
    carried = cli("hf", base, "--recipe", folder, "-o", tmp_path / "b")
    assert (given.code, carried.code) == (0, 0), given.err + carried.err
    assert "was trained on org/trained-on" in given.err
    assert_same(stored(tmp_path / "a"), expected(base, adapter))
    assert_same(stored(tmp_path / "b"), expected(base, adapter))
    digests = {"config_sha256": sha256_of(adapter / CONFIG), "weights_sha256": sha256_of(adapter / WEIGHTS)}
    assert Manifest.read(tmp_path / "a").source["adapter"] == {"reference": str(adapter), **digests}
    assert Manifest.read(tmp_path / "b").source["adapter"] == {"reference": str(adapter), **digests}
    both = cli("hf", base, "--recipe", folder, "--adapter", adapter, "-o", tmp_path / "c")
    assert both.code == 0, both.err
    dry = cli("hf", base, "--recipe", folder, "-o", tmp_path / "d", "--dry-run")
    assert dry.code == 0 and "model.safetensors: " in dry.out and "converted" in dry.out


def test_adapter_and_recipe_that_disagree(tmp_path: Path, cli: Callable[..., Result]) -> None:
    base = write_pico(tmp_path / "base")
    recipe = write_recipe(recipe_for(open_model(base)), tmp_path / "recipe")
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"adapter": "org/lora"}))
    other = all_attention(tmp_path / "adapter")
    result = cli("hf", base, "--recipe", recipe, "--adapter", other, "-o", tmp_path / "out")
    assert result.code == 2
    assert f"adapter and recipe disagree: --adapter is {other}, the recipe was made for org/lora" in result.err
    assert load_recipe(recipe).adapter == "org/lora" and recipe_folder(recipe) == recipe.parent == tmp_path / "recipe"


def test_which_adapter_is_chosen(tmp_path: Path) -> None:
    """Nobody's, the one given, the recipe's: beside it if there is one, else by its Hub id; the same one twice."""
    (tmp_path / "lora").mkdir()
    beside = str(tmp_path / "lora")
    assert choose_adapter(None, None, tmp_path) is None
    assert choose_adapter("org/x", None, tmp_path) == "org/x"
    assert choose_adapter(None, "lora", tmp_path) == beside
    assert choose_adapter(None, "org/x", tmp_path) == "org/x"
    assert choose_adapter("org/x", "org/x", tmp_path) == "org/x"
    assert choose_adapter(beside + "/../lora", "lora", tmp_path) == beside + "/../lora"
    for given, carried in (("org/x", "org/y"), ("org/x", "lora"), (beside, "org/x"), ("lora", "lora")):
        with pytest.raises(UsageError, match="disagree"):
            choose_adapter(given, carried, tmp_path)


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path, Path]]:
    """Base, adapter and the artifact made of both; copies, since tests change them."""
    folder = tmp_path_factory.mktemp("baked")
    write_pico(folder / "base", shards=2, tie_word_embeddings=True)
    head = 0.1 * np.random.default_rng(5).standard_normal((101, 64)).astype(np.float32)
    all_attention(folder / "adapter", saved={LM_HEAD: head})

    def get(where: Path, **options: Any) -> tuple[Path, Path, Path]:
        base, adapter = (shutil.copytree(folder / name, where / name) for name in ("base", "adapter"))
        return base, adapter, bake(base, adapter, where / "out", **options)

    return get


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}])
def test_verify_uses_merged_weights(options: dict[str, Any], tmp_path: Path, baked: Callable[..., Any]) -> None:
    """Native and custom code pass; an adapter whose scale is 1 % off fails in both, in float32."""
    pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    from support.verifying import verify

    from lrconvert.parity import Options

    base, adapter, out = baked(tmp_path, **options)
    report = verify(out, options=Options())
    assert report.passed, report.summary
    assert {row.code for row in report.rows} >= {"native", "custom"} and not report.notes
    if options:
        return  # bf16 weights hide one percent
    config = json.loads((adapter / CONFIG).read_text())
    wrong = shutil.copytree(adapter, tmp_path / "wrong")
    (wrong / CONFIG).write_text(json.dumps({**config, "lora_alpha": 1.01 * config["lora_alpha"]}))
    bake(base, wrong, tmp_path / "mutant")
    manifest = json.loads((tmp_path / "mutant" / MANIFEST).read_text())
    manifest["source"] = json.loads((out / MANIFEST).read_text())["source"]
    (tmp_path / "mutant" / MANIFEST).write_text(json.dumps(manifest))
    mutant = verify(tmp_path / "mutant", options=Options())
    assert not mutant.passed
    for code in ("native", "custom"):
        rows = [row for row in mutant.rows if row.code == code and row.verdict != "skipped"]
        assert rows and all(row.verdict == "fail" for row in rows if row.bound is not None), code


def test_verify_notices_another_adapter(tmp_path: Path, baked: Callable[..., Any], cli: Callable[..., Result]) -> None:
    """Changed: an error. Gone: compared with the artifact's own weights, and said; with --against, which needs it, an
    error."""
    pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    base, adapter, out = baked(tmp_path)
    config = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(config.replace('"lora_alpha": 2', '"lora_alpha": 3'))
    changed = cli("verify", out, "--code", "native")
    assert changed.code == 3 and "its adapter is no longer the one" in changed.err
    adapter.rename(tmp_path / "gone")
    fallback = cli("verify", out, "--code", "native")
    assert fallback.code == 0, fallback.err
    assert "can't be opened" in fallback.out and "compared with the artifact's own weights" in fallback.out
    against = cli("verify", out, "--code", "native", "--against", base)
    assert against.code == 3 and f"{adapter}: no such folder" in against.err
