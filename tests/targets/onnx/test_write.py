# SPDX-License-Identifier: Apache-2.0
"""Writing an ONNX folder: the same bytes every time, whole or not at all, and what is refused beforehand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Result, recipe_for
from safetensors.numpy import load_file, save_file
from support.forks import ForkedCommands
from support.onnx_files import DATA, GRAPH, command, export, files_of, recipe_with, tensors_of, write_adapter
from support.pico import write_pico
from support.staging import RUN_WITH_SMALL_FILES, linux_only

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.manifest import MANIFEST, Manifest
from lrconvert.artifact.record import BakeRecord
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import InputError, LrconvertError, UnsupportedError, UsageError
from lrconvert.progress import Step
from lrconvert.recipe import write_recipe
from lrconvert.targets import onnx as target

Pico = Callable[..., Model]
Cli = Callable[..., Result]
UP = "model.layers.1.mlp.up_proj.weight"
KINDS: list[dict[str, Any]] = [
    {}, {"attention": "standard"}, {"dtype": "f16", "double": False}, {"dtype": "bf16"}, {"dtype": "int8"},
    {"dtype": "int4", "attention": "standard", "opset": 24},
]  # fmt: skip


def with_sides(folder: Path, **changes: Any) -> Path:
    """A pico model with the files that lie beside weights."""
    write_pico(folder, **changes)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64, "clean": True}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004")
    return folder


# --- the same bytes --------------------------------------------------------------------------------------


RUN_ALL = """
import json, sys
from lrconvert.cli import run
for arguments in json.loads(sys.argv[1]):
    if code := run(arguments):
        sys.exit(code)
"""


def test_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    """Graph, weights, configs, card and manifest, in two processes of different hash seeds: no time, no place, no order
    that a set or a thread chose."""
    folder = with_sides(tmp_path / "model", shards=2)
    recipe = write_recipe(recipe_for(open_model(folder), tiers=3, start_tokens=12), tmp_path / "recipe")
    names = {"dtype": "--dtype", "attention": "--attention", "opset": "--opset"}
    for seed in ("1", "2"):
        commands = []
        for number, kind in enumerate(KINDS):
            options = [text for key, value in kind.items() if key in names for text in (names[key], str(value))]
            options += [] if kind.get("double", True) else ["--no-double"]
            output = tmp_path / seed / str(number)
            commands.append([str(each) for each in command(folder, recipe, output, *options)])
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        started = [sys.executable, "-c", RUN_ALL, json.dumps(commands)]
        done = subprocess.run(started, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for number, kind in enumerate(KINDS):
        assert files_of(tmp_path / "1" / str(number)) == files_of(tmp_path / "2" / str(number)), kind


def test_shards_of_the_source_do_not_show(tmp_path: Path) -> None:
    """One file or five: the same graph, the same data."""
    made = {}
    for shards in (1, 5):
        model = open_model(write_pico(tmp_path / f"m{shards}", shards=shards))
        made[shards] = files_of(export(model, recipe_for(model), tmp_path / f"o{shards}"))
    for name in (GRAPH, DATA, "config.json"):
        assert made[1][name] == made[5][name]


def test_a_plan_knows_every_size(tmp_path: Path) -> None:
    """And the manifest every digest; the progress ends where the plan said."""
    model = open_model(with_sides(tmp_path / "model"))
    for kind in KINDS:
        output = tmp_path / "-".join(map(str, ["o", *kind.values()]))
        planned = target.plan(model, recipe_for(model), output, target.Options(**kind))
        steps: list[Step] = []
        manifest = bake_plan(planned, progress=steps.append)
        written = {name: len(data) for name, data in files_of(output).items() if name != MANIFEST}
        assert planned.sizes == written
        total, done = sum(written.values()), [step.done for step in steps]
        assert done[-1] == total and done == sorted(done) and {step.total for step in steps} == {total}
        assert {name: record.size for name, record in manifest.files.items()} == written
        assert all(record.sha256 == sha256_of(output / name) for name, record in manifest.files.items())
        assert Manifest.read(output).to_json() == manifest.to_json() and manifest.target == "onnx"
        assert {"dtype": manifest.bake.stored, **manifest.options}.items() >= kind.items()


def test_side_files_come_along(tmp_path: Path) -> None:
    """Tokenizer, template and licence; the window that tokenizer_config.json and config.json state is the new one."""
    folder = with_sides(tmp_path / "model")
    model = open_model(folder)
    output = export(model, recipe_for(model), tmp_path / "o")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (output / name).read_bytes() == (folder / name).read_bytes()
        assert not (output / name).samefile(folder / name)
    assert json.loads((output / "tokenizer_config.json").read_text()) == {"model_max_length": 128, "clean": True}
    config = json.loads((output / "config.json").read_text())
    assert config["max_position_embeddings"] == 128 and config["torch_dtype"] == "float32"
    assert config["rope_scaling"]["rope_type"] == "longrope"
    assert not list(output.glob("*.safetensors")) and not list(output.glob("*.py"))
    assert "--recipe" not in (output / "README.md").read_text().splitlines()[0]


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_weights_are_rounded_once(tmp_path: Path, source: Any, dtype: str) -> None:
    """Of any dtype to any: NumPy's own rounding to nearest, bit for bit; none where the values fit."""
    folder = write_pico(tmp_path / "m")
    tensors = {name: values.astype(source) for name, values in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    model = open_model(folder)
    found = tensors_of(open_model(export(model, recipe_for(model), tmp_path / "o", dtype=dtype)))
    kind = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    for name, values in tensors.items():
        assert found[name].dtype == kind
        np.testing.assert_array_equal(found[name], values.astype(kind), err_msg=name)


# --- whole or not at all ---------------------------------------------------------------------------------


def test_an_existing_output_is_refused_and_replaced_with_force(tmp_path: Path, cli: Cli) -> None:
    """Exit code 2 before the model is opened; --force replaces what lrconvert wrote and nothing of somebody's."""
    folder = write_pico(tmp_path / "m")
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    output = tmp_path / "o"
    assert cli(*command(folder, recipe, output)).code == 0
    before = files_of(output)
    refused = cli(*command(tmp_path / "gone", recipe, output))
    assert refused.code == 2 and "--force" in refused.err
    assert files_of(output) == before
    assert cli(*command(folder, recipe, output, "--force", "--dtype", "f16")).code == 0
    assert (output / DATA).stat().st_size < len(before[DATA])
    (output / "notes.txt").write_text("mine")
    refused = cli(*command(folder, recipe, output, "--force"))
    assert refused.code == 2 and "notes.txt" in refused.err
    assert (output / "notes.txt").read_text() == "mine"


def test_a_dry_run_writes_nothing_and_says_what_would_be(tmp_path: Path, cli: Cli) -> None:
    """Not even where the output exists; the sizes are those of a real run, and the warnings too."""
    folder = with_sides(tmp_path / "m")
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    before = files_of(tmp_path)
    for options in ([], ["--dtype", "bf16"], ["--dtype", "int4"], ["--no-double", "--attention", "standard"]):
        result = cli(*command(folder, recipe, tmp_path / "new" / "o", "--dry-run", *options))
        assert result.code == 0, result.err
        assert "nothing was written" in result.err and "onnx/model.onnx_data" in result.out
        assert "max_position_embeddings 64 → 128" in result.out and "tiers up to 64, 128" in result.out
        assert ("no bfloat16 products on a CPU" in result.err) == ("bf16" in options)
        assert ("can't be padded on the left" in result.err) == ("standard" not in options)
        assert files_of(tmp_path) == before and not (tmp_path / "new").exists()


# A kill in the middle of the nth tensor; 0: after all of them, when the folder is about to appear.
RUN_AND_DIE = """
import os, signal, sys
from lrconvert.artifact.staging import Staging
from lrconvert.targets.onnx import tensors
left = int(sys.argv[1])
def dying(made):
    def make(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(*arguments, **named)
    return make
tensors._plain, tensors._packed = dying(tensors._plain), dying(tensors._packed)
if left == 0:
    Staging.publish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
from lrconvert.cli import run
sys.exit(run(sys.argv[2:]))
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    texts = [str(argument) for argument in arguments]
    return subprocess.run([sys.executable, "-c", code, *texts], capture_output=True, text=True, check=False)


@linux_only
@pytest.mark.parametrize("limit", [0, 3000, 100_000])
def test_a_full_disk_is_the_environment(tmp_path: Path, limit: int, commands: ForkedCommands) -> None:
    """At the first byte, in the graph and in the weights: exit code 6, one line, and nothing is left."""
    folder = write_pico(tmp_path / "m")
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    before = files_of(tmp_path)
    done = commands.run(RUN_WITH_SMALL_FILES, limit, *command(folder, recipe, tmp_path / "new" / "o"))
    assert done.returncode == 6, done.stderr
    assert "nothing was written" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert files_of(tmp_path) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("moment", "options"), [(1, []), (9, []), (9, ["--dtype", "int8"]), (0, [])])
def test_a_kill_leaves_the_old_folder_and_the_next_run_cleans_up(
    tmp_path: Path, moment: int, options: list[str], commands: ForkedCommands
) -> None:
    """With the first tensor, in the middle of the weights, when all is written but not published."""
    folder = write_pico(tmp_path / "m")
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    output = tmp_path / "o"
    export(open_model(folder), recipe_for(open_model(folder)), output)
    before = files_of(output)
    done = commands.run(RUN_AND_DIE, moment, *command(folder, recipe, output, "--force", "--dtype", "f16", *options))
    assert done.returncode == -signal.SIGKILL
    assert files_of(output) == before
    assert len(list(tmp_path.iterdir())) == 5  # the lock and the staging folder of a process that is gone
    export_again = target.plan(open_model(folder), recipe_for(open_model(folder)), output, target.Options())
    bake_plan(export_again, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "r", "o"}
    assert files_of(output) == before


@pytest.mark.parametrize("change", ["rewritten", "removed"])
def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path, change: str) -> None:
    """Between plan and publish: nothing appears, and the file is named."""
    folder = write_pico(tmp_path / "m")
    model = open_model(folder)
    planned = target.plan(model, recipe_for(model), tmp_path / "o", target.Options())
    weights = folder / "model.safetensors"
    if change == "rewritten":
        weights.write_bytes(weights.read_bytes())
        os.utime(weights, ns=(1, 1))
    else:
        weights.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        bake_plan(planned)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "o"))]


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--opset", "22"], 2, "--opset 22: 23 to 25 are known"),
        (["--opset", "99"], 2, "--opset 99"),
        (["--opset", "x"], 2, "--opset"),
        (["--dtype", "q4_0"], 2, "--dtype"),
        (["--attention", "flash"], 2, "--attention"),
        (["--window", "100k"], 2, "window"),
        (["--window", "0"], 2, "window"),
        (["--window", "32"], 2, "window"),
        (["--genai-rewind"], 2, "boundaries: 64"),
        (["--adapter", "no/such/adapter/here"], 3, "adapter"),
    ],
)  # fmt: skip
def test_options_that_can_not_be_served_are_refused(
    tmp_path: Path, pico_folder: Callable[..., Path], options: list[str], code: int, words: str, cli: Cli
) -> None:
    """One line with the option and what there is; nothing is written."""
    folder = pico_folder("llama")
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    result = cli(*command(folder, recipe, tmp_path / "o", *options))
    assert result.code == code, result.err
    assert words in result.err and len(result.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_options_that_overlap_do_not_disturb_each_other(tmp_path: Path, cli: Cli) -> None:
    """All of them at once: an export that verifies, with a rewind at 4096, tables, a window and opset 24."""
    folder = write_pico(tmp_path / "m", max_position_embeddings=4096, num_hidden_layers=1)
    model = open_model(folder)
    recipe = write_recipe(recipe_with(model, (4096, 8192, 65536), starts=4), tmp_path / "r")
    more = (
        "--window",
        "8192",
        "--genai-rewind",
        "--no-double",
        "--opset",
        "24",
        "--attention",
        "standard",
        "--dtype",
        "f16",
    )
    result = cli(*command(folder, recipe, tmp_path / "o", *more))
    assert result.code == 0, result.err
    manifest = Manifest.read(tmp_path / "o")
    assert manifest.options == {"attention": "standard", "opset": 24, "double": False, "genai_rewind": True}
    assert manifest.bake == BakeRecord(8192, "f16")
    genai = json.loads((tmp_path / "o" / "genai_config.json").read_text())
    assert genai["model"]["type"] == "phi3" and genai["model"]["context_length"] == 8192
    # With all three tiers genai's one boundary is not enough.
    result = cli(*command(folder, recipe, tmp_path / "p", "--genai-rewind"))
    assert result.code == 2 and "boundaries: 4096, 8192" in result.err


@pytest.mark.parametrize(
    ("value", "error", "needle"),
    [(65520.0, UnsupportedError, "beyond float16's range"), (-1e30, UnsupportedError, "--dtype bf16"),
     (np.nan, InputError, "not finite"), (np.inf, InputError, "not finite")],
)  # fmt: skip
def test_what_float16_can_not_hold_is_refused(
    value: float, error: type[LrconvertError], needle: str, tmp_path: Path
) -> None:
    """The tensor is named, nothing is left, the old folder stays, and float32 still works."""
    folder = write_pico(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][3, 4] = value
    save_file(tensors, folder / "model.safetensors")
    model = open_model(folder)
    recipe = recipe_for(model)
    with pytest.raises(error, match=needle) as caught:
        export(model, recipe, tmp_path / "o", dtype="f16")
    assert UP in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    export(model, recipe, tmp_path / "o")
    before = files_of(tmp_path / "o")
    with pytest.raises(error):
        bake_plan(target.plan(model, recipe, tmp_path / "o", target.Options(dtype="f16")), force=True)
    assert files_of(tmp_path / "o") == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_a_quantiser_would_hide_is_refused(value: float, dtype: str, tmp_path: Path) -> None:
    """A weight that is no number becomes one when it is quantised: the tensor is named instead."""
    folder = write_pico(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][3, 4] = value
    save_file(tensors, folder / "model.safetensors")
    model = open_model(folder)
    with pytest.raises(InputError, match=r"up_proj\.weight holds values that are not finite"):
        export(model, recipe_for(model), tmp_path / "o", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("size", [2, 6, 12, 20])
def test_heads_that_the_fused_operator_does_not_take_are_refused(tmp_path: Path, size: int, cli: Cli) -> None:
    """Multiples of 8 only: ONNX Runtime would refuse every call of such a graph. The standard operator takes any."""
    model = open_model(write_pico(tmp_path / "m", head_dim=size))
    recipe = write_recipe(recipe_for(model, tiers=3, start_tokens=12), tmp_path / "r")
    refused = cli(*command(tmp_path / "m", recipe, tmp_path / "o"))
    assert refused.code == 4 and "--attention standard" in refused.err and not (tmp_path / "o").exists()
    done = cli(*command(tmp_path / "m", recipe, tmp_path / "o", "--attention", "standard", "--verify"))
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", UP])
def test_scales_beyond_float16_are_refused(name: str, tmp_path: Path) -> None:
    """int8 and int4 store the scale of a block in float16: a 128th of its largest value, or an eighth."""
    folder = write_pico(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][5, 5] = 1e7
    save_file(tensors, folder / "model.safetensors")
    model = open_model(folder)
    with pytest.raises(UnsupportedError, match=rf"{name} holds values beyond float16's range"):
        export(model, recipe_for(model), tmp_path / "o", dtype="int8")


def test_bfloat16_is_exported_with_a_warning(tmp_path: Path, pico_folder: Callable[..., Path], cli: Cli) -> None:
    """For GPUs; `--verify` on a CPU refuses it by name, after it was written."""
    folder = pico_folder("llama")
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    result = cli(*command(folder, recipe, tmp_path / "o", "--dtype", "bf16"))
    assert result.code == 0 and "no bfloat16 products on a CPU; this folder runs with CUDA" in result.err
    result = cli("verify", tmp_path / "o")
    assert result.code == 4 and "bfloat16" in result.err and "--device cuda" in result.err


def test_a_recipe_of_another_family_or_shape_is_refused(tmp_path: Path, pico: Pico, cli: Cli) -> None:
    for family, changes in (("qwen2", {}), ("llama", {"rope_theta": 5e5}), ("llama", {"head_dim": 32})):
        other = write_recipe(recipe_for(pico(family, **changes)), tmp_path / "r", force=True)
        result = cli(*command(pico("llama").checkpoint.path, other, tmp_path / "o"))
        assert result.code in (2, 3, 4) and len(result.err.splitlines()) == 1, (family, changes, result)
        assert not (tmp_path / "o").exists()


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, pico_folder: Callable[..., Path], cli: Cli) -> None:
    adapter = write_adapter(tmp_path / "lora", {"model.layers.9.self_attn.q_proj": (64, 64)})
    folder = pico_folder("llama")
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    result = cli(*command(folder, recipe, tmp_path / "o", "--adapter", adapter))
    assert result.code == 3 and "layers.9" in result.err and not (tmp_path / "o").exists()


# --- extras and imports ----------------------------------------------------------------------------------

EXTRA = "pip install 'lrconvert[onnx]'"


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_a_missing_extra_is_the_environment(
    tmp_path: Path, pico_folder: Callable[..., Path], module: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 6 and what to install: for an export that needs it, for verify, and for reading the folder."""
    folder = pico_folder("llama")
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    assert cli(*command(folder, recipe, tmp_path / "there")).code == 0
    monkeypatch.setitem(sys.modules, module, None)
    if module == "onnxruntime":
        monkeypatch.setitem(sys.modules, "onnxruntime.capi._pybind_state", None)
        assert cli(*command(folder, recipe, tmp_path / "plain")).code == 0, "float32 needs no quantiser"
    attempts = [command(folder, recipe, tmp_path / "o", "--dtype", "int8"), ("verify", tmp_path / "there")]
    if module == "onnx":
        attempts += [command(folder, recipe, tmp_path / "o"), ("inspect", tmp_path / "there")]
    for attempt in attempts:
        result = cli(*attempt)
        assert result.code == 6, (attempt, result)
        assert module in result.err and EXTRA in result.err and len(result.err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_missing_extra_in_a_fresh_process(tmp_path: Path, pico_folder: Callable[..., Path]) -> None:
    """Where nothing of onnx was imported before, as for a user, it is the environment all the same."""
    folder = pico_folder("llama")
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    asked = command(folder, recipe, tmp_path / "o")
    assert light(["onnx"], asked)[0] == [6]
    assert light(["onnxruntime", "onnxruntime.capi"], (*asked, "--dtype", "int8"))[0] == [6]


def test_a_config_that_json_can_not_express(tmp_path: Path, pico_folder: Callable[..., Path], cli: Cli) -> None:
    """NaN in the source's config.json, which Python reads: bad input, named, as for a Hugging Face artifact."""
    folder = tmp_path / "source"
    shutil.copytree(pico_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "odd": float("nan")}))
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "r")
    result = cli(*command(folder, recipe, tmp_path / "o"))
    assert result.code == 3 and "config.json: holds what JSON can't express" in result.err


LIGHT = """
import json, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None
import lrconvert
from lrconvert.cli import run
codes = [run(arguments) for arguments in json.loads(sys.argv[2])]
heavy = {"onnx", "onnxruntime", "torch", "transformers", "tensorflow", "jax"}
print(json.dumps([codes, sorted(name for name in heavy if sys.modules.get(name) is not None)]))
"""


def light(blocked: list[str], *commands: tuple[object, ...]) -> tuple[list[int], list[str]]:
    """Exit codes of commands in one fresh process, and which heavy modules it imported."""
    texts = [[str(argument) for argument in arguments] for arguments in commands]
    done = python(LIGHT, json.dumps(blocked), json.dumps(texts))
    assert done.returncode == 0, done.stderr
    codes, heavy = json.loads(done.stdout.splitlines()[-1])
    return codes, heavy


def test_what_has_nothing_to_do_with_onnx_imports_none_of_it(
    tmp_path: Path, pico_folder: Callable[..., Path], plain: tuple[Path, Path]
) -> None:
    """Importing the package, every help text, `inspect` of a Hugging Face folder, `hf`: also in a process where
    importing onnx or onnxruntime fails."""
    folder, recipe = plain
    commands: tuple[tuple[object, ...], ...] = (
        ("--help",), ("onnx", "--help"), ("verify", "--help"), ("inspect", folder), ("recipe", "show", recipe),
        ("hf", folder, "--recipe", recipe, "-o", tmp_path / "h"), ("inspect", tmp_path / "h"),
    )  # fmt: skip
    assert light([], *commands[:5]) == ([0] * 5, [])
    assert light(["onnx", "onnxruntime"], *commands) == ([0] * 7, [])


def test_an_export_imports_neither_torch_nor_transformers(tmp_path: Path, plain: tuple[Path, Path]) -> None:
    """Nor needs them; ONNX Runtime only where weights are quantised."""
    blocked = ["torch", "transformers", "tensorflow", "jax"]
    codes, heavy = light(
        [*blocked, "onnxruntime"], command(*plain, tmp_path / "a"), command(*plain, tmp_path / "b", "--dtype", "f16"),
        ("inspect", tmp_path / "a"),
    )  # fmt: skip
    assert (codes, heavy) == ([0, 0, 0], ["onnx"])
    assert light(blocked, command(*plain, tmp_path / "c", "--dtype", "int4")) == ([0], ["onnx", "onnxruntime"])


def test_the_whole_command_verifies(tmp_path: Path, plain: tuple[Path, Path], cli: Cli) -> None:
    """`--verify` is `lrconvert verify` of what was written, with its exit code; the manifest keeps the report."""
    result = cli(*command(*plain, tmp_path / "o", "--verify"))
    assert result.code == 0, result.err
    assert "verified: " in result.out
    parity = Manifest.read(tmp_path / "o").parity
    assert parity is not None and parity["passed"] is True
    shown = cli("inspect", tmp_path / "o")
    assert shown.code == 0 and "baked by lrconvert from" in shown.out and "verified: " in shown.out


def test_a_window_beyond_the_recipe_is_refused(pico: Pico, tmp_path: Path) -> None:
    model = pico("llama")
    with pytest.raises(UsageError, match="512"):
        target.plan(model, recipe_for(model), tmp_path / "o", target.Options(window=512))
