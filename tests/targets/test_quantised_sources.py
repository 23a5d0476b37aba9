# SPDX-License-Identifier: Apache-2.0
"""A quantised folder becomes every format: its weights dequantised, said in words, and verified on what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import Result, own_name, recipe_for
from safetensors.numpy import load_file
from support.engine_suite import with_attention
from support.onnx_files import write_adapter
from support.quantised import write_quantised

from lrconvert.artifact.manifest import Manifest
from lrconvert.artifact.record import BakeRecord
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.checkpoint.quantised import fp8
from lrconvert.evals.subject import Subject, computed, dequantised, opened
from lrconvert.evals.texts import Text
from lrconvert.recipe import write_recipe
from lrconvert.searching.plan import plan_search
from lrconvert.searching.request import SearchRequest
from lrconvert.targets import gguf, hf, target_of
from lrconvert.training.network import load_network

LAYOUTS = ("fp8-block", "ct-int4-asym", "gptq-4-ordered", "awq", "bnb-nf4-double")
EXTENSION = """name = "one"
[[stage]]
kind = "derive"
window = 128
[[stage]]
kind = "tune"
window = 128
steps = 1
keys = 0
length = 64
"""
Cli = Callable[..., Result]


def written(folder: Path) -> dict[str, np.ndarray]:
    """The weights of an artifact of any format, under the names of the model."""
    checkpoint = target_of(folder).open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture
def recipe(pico: Callable[..., Model], tmp_path: Path) -> Path:
    return write_recipe(recipe_for(pico("llama"), even=True), tmp_path / "recipe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_has_plain_weights_in_the_model_s_dtype(layout: str, tmp_path: Path, recipe: Path, cli: Cli) -> None:
    """Rounded once, from what they mean. The config has no quantization_config, and everybody says what they were."""
    meant = write_quantised(tmp_path / "m", layout, torch_dtype="bfloat16")
    result = cli("hf", tmp_path / "m", "--recipe", recipe, "-o", tmp_path / "o")
    assert result.code == 0, result.err
    kinds = open_model(tmp_path / "m").quantised
    said = f"weights dequantised from {kinds}, written as bf16"
    assert said in result.err and said in (tmp_path / "o" / "README.md").read_text()
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    edits = cli("hf", tmp_path / "m", "--recipe", recipe, "-o", tmp_path / "p", "--dry-run")
    assert "config.json: quantization_config {" in edits.out and "→ none" in edits.out
    manifest = Manifest.read(tmp_path / "o")
    assert manifest.source["quantised"] == kinds and manifest.bake.stored == "BF16"
    found = written(tmp_path / "o")
    assert found.keys() == meant.keys()
    for name, values in meant.items():
        off = np.abs(found[name].astype(np.float64) - values.astype(ml_dtypes.bfloat16).astype(np.float64))
        assert (off == 0).mean() > 0.99 and (off <= np.abs(values) * 2**-7).all(), name  # float32 can tip a rounding


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_another_dtype_can_be_asked_for(dtype: str, tmp_path: Path, recipe: Path, cli: Cli) -> None:
    meant = write_quantised(tmp_path / "m", "gptq-4")
    assert cli("hf", tmp_path / "m", "--recipe", recipe, "-o", tmp_path / "o", "--dtype", dtype).code == 0
    kind = {"f32": np.float32, "f16": np.float16}[dtype]
    assert all(np.array_equal(values, meant[name].astype(kind)) for name, values in written(tmp_path / "o").items())


@pytest.mark.parametrize("layout", ["fp8-block", "gptq-4-ordered"])
def test_a_gguf_and_an_onnx_folder_have_the_same_weights(layout: str, tmp_path: Path, recipe: Path, cli: Cli) -> None:
    meant = write_quantised(tmp_path / "m", layout)
    for target, output, more in (("gguf", "o.gguf", ("--type", "f32")), ("onnx", "o", ())):
        result = cli(target, tmp_path / "m", "--recipe", recipe, "-o", tmp_path / output, *more)
        assert result.code == 0, result.err
        assert "weights dequantised from" in result.err and "written as f32" in result.err
        found = written(tmp_path / output)
        assert all(np.array_equal(found[name], values.astype(np.float32)) for name, values in meant.items())


def test_a_gguf_has_the_model_s_own_dtype_where_none_is_named(
    tmp_path: Path, pico: Callable[..., Model], recipe: Path
) -> None:
    """GPTQ's models compute in float16; only a GGUF source has to be asked for one."""
    write_quantised(tmp_path / "m", "gptq-4", torch_dtype="float16")
    plan = gguf.plan(open_model(tmp_path / "m"), recipe_for(pico("llama"), even=True), tmp_path / "o.gguf")
    assert plan.record == BakeRecord(128, "f16", capability="llama.cpp")


@pytest.mark.parametrize("layout", ["fp8-block", "gptq-4-ordered"])
def test_verify_judges_on_the_dequantised_weights(layout: str, tmp_path: Path, recipe: Path, cli: Cli) -> None:
    """And says so; an artifact of other weights fails."""
    write_quantised(tmp_path / "m", layout)
    artifact = own_name(tmp_path / "o")
    assert cli("hf", tmp_path / "m", "--recipe", recipe, "-o", artifact).code == 0
    result = cli("verify", artifact, "--code", "custom", "--threads", 1)
    assert result.code == 0, result.out + result.err
    assert "the model is quantised, " in result.out and "its dequantised weights are what" in result.out
    write_quantised(tmp_path / "other", layout, seed=8)
    wrong = cli("verify", artifact, "--code", "custom", "--threads", 1, "--against", tmp_path / "other")
    assert wrong.code == 5


def test_verify_catches_a_decoder_that_is_wrong(
    tmp_path: Path, recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Baked with one decoder and verified with another: transposed scales are far beyond every bound."""
    write_quantised(tmp_path / "m", "fp8-block")
    artifact = own_name(tmp_path / "o")
    right = fp8.scale_rows
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "scale_rows", lambda *given: np.roll(right(*given), 24, axis=1))
        assert cli("hf", tmp_path / "m", "--recipe", recipe, "-o", artifact).code == 0
    assert cli("verify", artifact, "--code", "custom", "--threads", 1).code == 5


def test_inspect_names_what_the_weights_are(tmp_path: Path, cli: Cli) -> None:
    write_quantised(tmp_path / "m", "bnb-nf4-double")
    result = cli("inspect", tmp_path / "m")
    assert result.code == 0
    assert "the model is quantised, bitsandbytes nf4 (blocks of 64, double): its weights are read" in result.out
    assert json.loads(cli("inspect", tmp_path / "m", "--json").out)["quantised"].startswith("bitsandbytes nf4")
    for target in ("hf", "gguf", "onnx"):
        assert f"can become {target}" in result.out


def test_a_folded_attention_factor_multiplies_dequantised_weights(tmp_path: Path, pico: Callable[..., Model]) -> None:
    meant = write_quantised(tmp_path / "m", "awq")
    model = open_model(tmp_path / "m")
    recipe = with_attention(recipe_for(pico("llama")), 1.3)
    plan = hf.plan(model, recipe, tmp_path / "o", hf.Options(portable=True, lossy=True))
    scale, name = plan.record.attention_scale, "model.layers.0.self_attn.q_proj.weight"
    assert scale != 1.0
    data = next(stream for stream in plan.streams if stream.name == "model.safetensors")
    tensor = next(tensor for tensor in data.tensors if tensor.name == name)
    found = np.concatenate([np.frombuffer(make(), np.float32) for make, _ in tensor.jobs()]).reshape(64, 64)
    np.testing.assert_allclose(found, meant[name] * scale, rtol=3e-7)


def test_an_adapter_is_merged_into_dequantised_weights(tmp_path: Path) -> None:
    """What a QLoRA is: its base in 4 bits, the adapter on top."""
    meant = write_quantised(tmp_path / "m", "bnb-nf4")
    module = "model.layers.0.self_attn.q_proj"
    folder = write_adapter(tmp_path / "a", {module: (64, 64)})
    left, right = (load_file(folder / "adapter_model.safetensors")[f"base_model.model.{module}.lora_{x}.weight"]
                   for x in "BA")  # fmt: skip
    model = merged(open_model(tmp_path / "m"), open_adapter(str(folder)))
    found = model.checkpoint.read(f"{module}.weight")
    wanted = meant[f"{module}.weight"] + left.astype(np.float64) @ right.astype(np.float64) * 6 / 4
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_search_and_a_training_load_the_dequantised_weights(tmp_path: Path) -> None:
    import torch

    meant = write_quantised(tmp_path / "m", "gptq-4-ordered")
    model = open_model(tmp_path / "m")
    network = load_network(model, torch.float32)
    for name, values in network.state_dict().items():
        assert np.array_equal(values.numpy(), meant[name].astype(np.float32)), name


def test_a_search_and_an_extension_say_what_they_run_on_and_train_an_adapter(tmp_path: Path, cli: Cli) -> None:
    write_quantised(tmp_path / "m", "gptq-4")
    text = Text("book.txt", "ab" * 32, np.arange(1024) % 101)
    plan = plan_search(SearchRequest(tmp_path / "m", 128, [text], budget=30))
    assert "the model is quantised, GPTQ 4 bits (groups of 32): the search runs on its deq" in plan.notes[0]
    np.save(tmp_path / "text.npy", np.arange(4096) % 101)
    (tmp_path / "plan.toml").write_text(EXTENSION)
    options = ("--text", tmp_path / "text.npy", "--plan", tmp_path / "plan.toml", "-o", tmp_path / "r")
    found = cli("extend", tmp_path / "m", *options)
    assert found.code == 0, found.err
    assert "the model is quantised, GPTQ 4 bits (groups of 32): the stages run on its dequantised weights" in found.err
    baked = cli("hf", tmp_path / "m", "--recipe", tmp_path / "r", "-o", tmp_path / "o")
    assert baked.code == 0 and (tmp_path / "r" / "adapter").is_dir(), baked.err


def test_an_evaluation_runs_the_dequantised_weights(tmp_path: Path) -> None:
    """In transformers without the quantiser's package, and by the reference: the same losses."""
    write_quantised(tmp_path / "m", "gptq-4-ordered")
    subject = Subject.of(str(tmp_path / "m"))
    row = (np.arange(60) * 7 % 101).tolist()
    losses = []
    for code in (None, "reference"):
        with opened(subject, code=code, text=False, threads=1) as (session, _):
            losses.append(np.asarray(session.score([row], [40])[0].losses))
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-4)
    model, _ = computed(subject)
    assert model.quantised == "GPTQ 4 bits (groups of 16)"
    with dequantised(subject) as folder:
        there = folder
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not there.exists()
