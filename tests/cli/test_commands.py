# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, one line an error, data on stdout, and no heavy import before it is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Result, recipe_for
from support.pico import FAMILIES, pico_config, pico_tensors, write_pico

from lrconvert.artifact.manifest import MANIFEST
from lrconvert.checkpoint import Model, open_model
from lrconvert.cli import COMMANDS
from lrconvert.cli._bake import default_output
from lrconvert.errors import EnvironmentFailure, InputError, ParityError, UnsupportedError, UsageError
from lrconvert.families import get_family
from lrconvert.recipe import load_recipe, parse_recipe, write_recipe

Run = Callable[..., Result]


@pytest.fixture
def model(pico_folder: Callable[..., Path]) -> Path:
    return pico_folder()


@pytest.fixture
def recipe(tmp_path: Path, pico: Callable[..., Model]) -> Path:
    return write_recipe(recipe_for(pico()), tmp_path / "recipe")


@pytest.fixture
def artifact(tmp_path: Path, model: Path, recipe: Path, cli: Run) -> Path:
    result = cli("hf", model, "--recipe", recipe, "-o", tmp_path / "artifact")
    assert result.code == 0, result.err
    return tmp_path / "artifact"


def write_gguf(path: Path, family: str = "qwen2") -> Path:
    """A pico GGUF in F32 with a byte-level vocabulary; qwen2's q and k are not permuted."""
    config = pico_config(family)
    writer = gguf.GGUFWriter(path, get_family(family).gguf_architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["t", "1", "t1", *(f"<{i}>" for i in range(3, config["vocab_size"]))])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 1"])
    names = {row.hf.replace("{layer}", str(i)): row.gguf.replace("{layer}", str(i))
             for row in get_family(family).rows for i in range(config["num_hidden_layers"])}  # fmt: skip
    for name, array in pico_tensors(config).items():
        writer.add_tensor(names[name], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one_line(result: Result, code: int) -> str:
    """The error: the last line on stderr, which is the only one of ours; nothing of a traceback."""
    assert result.code == code, result
    lines = result.err.splitlines()
    assert [line for line in lines if line.startswith("lrconvert: ")] == lines[-1:]
    assert "Traceback" not in result.err
    return lines[-1]


# --- bad input, in short ---------------------------------------------------------------------------------


def test_the_exit_codes_are_the_documented_ones(cli: Run) -> None:
    """The tree of errors, the help and the codes agree."""
    codes = {
        error.exit_code: error for error in (UsageError, InputError, UnsupportedError, ParityError, EnvironmentFailure)
    }
    assert sorted(codes) == [2, 3, 4, 5, 6]
    text = " ".join(cli("--help").out.split())
    assert "0 done, 1 our bug, 2 usage, 3 bad input, 4 not supported, 5 parity failed, 6 environment" in text


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"family": "qwen2"}, ["qwen2", "llama"]),
        ({"rope_theta": 500000.0}, ["500000.0", "10000.0"]),
        ({"rotary_dim": 8}, ["dimension 8", "16 in the model"]),
    ],
)
def test_a_recipe_for_another_model_names_both_values(
    changes: dict[str, Any], values: list[str], tmp_path: Path, model: Path, recipe: Path, cli: Run
) -> None:
    """Family, θ, head size: exit code 3 from `hf` and from `recipe check`."""
    loaded = load_recipe(recipe)
    if "rotary_dim" in changes:
        changes = {**changes, "tiers": tuple(replace(tier, factors=tier.factors[:4]) for tier in loaded.tiers)}
    other = write_recipe(replace(loaded, **changes), tmp_path / "other")
    for arguments in (
        ["hf", model, "--recipe", other, "-o", tmp_path / "out"],
        ["recipe", "check", other, "--model", model],
    ):
        line = one_line(cli(*arguments), 3)
        for value in values:
            assert value in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("window", ["129", "1m", "63"])
def test_a_window_out_of_reach_is_usage(window: str, tmp_path: Path, model: Path, recipe: Path, cli: Run) -> None:
    line = one_line(cli("hf", model, "--recipe", recipe, "-o", tmp_path / "out", "--window", window), 2)
    assert "--window" in line and ("128" in line or "64" in line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("window", ["0", "-5", "x", "1.5", "99999999999", ""])
def test_a_window_that_is_no_number_of_tokens_is_usage(window: str, model: Path, recipe: Path, cli: Run) -> None:
    line = one_line(cli("hf", model, "--recipe", recipe, "-o", "out", f"--window={window}"), 2)
    assert "not a number of tokens" in line and "lrconvert hf --help" in line


def test_an_output_that_exists_is_usage(artifact: Path, model: Path, recipe: Path, cli: Run) -> None:
    """It says --force; --force replaces an artifact, and nothing that holds a file of the user's."""
    arguments = ("hf", model, "--recipe", recipe, "-o", artifact)
    assert "--force" in one_line(cli(*arguments), 2)
    assert cli(*arguments, "--force", "--window", "100").code == 0
    assert json.loads((artifact / "config.json").read_text())["max_position_embeddings"] == 100
    (artifact / "notes.txt").write_text("mine")
    assert "notes.txt" in one_line(cli(*arguments, "--force"), 2)
    assert (artifact / "notes.txt").read_text() == "mine"
    (artifact / MANIFEST).unlink()
    assert "not written by lrconvert" in one_line(cli(*arguments, "--force"), 2)


@pytest.mark.parametrize(("target", "suffix"), [("hf", ""), ("gguf", ".gguf"), ("onnx", "-onnx")])
def test_an_output_is_named_for_what_it_is_made_from(
    target: str, suffix: str, model: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the current folder: model and recipe. Twice is once too often; a model is never its own output."""
    (tmp_path / "here").mkdir()
    recipe = write_recipe(recipe_for(open_model(model), even=True), tmp_path / "recipe")
    monkeypatch.chdir(tmp_path / "here")
    stem = f"{model.name}-recipe"
    named = f"{stem}{suffix}"
    assert cli(target, model, "--recipe", recipe).code == 0
    assert Path(named).exists()
    again = cli(target, model, "--recipe", recipe)
    assert again.code == 2 and named in again.err and "--force" in again.err
    if target != "onnx":
        before = Path(named).stat().st_mtime_ns
        assert cli(target, named).code == 0
        assert Path(named).stat().st_mtime_ns == before and Path(f"{stem}-{target}{suffix}").exists()


def test_an_output_s_name_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a way out of the folder, and a link's own name: in a cache it leads to a digest."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "0f3a").touch()
    (tmp_path / "a" / "b" / "m.gguf").symlink_to(tmp_path / "0f3a")
    monkeypatch.chdir(tmp_path / "a" / "b")
    for model, recipe, named in (
        ("m.gguf", "r", "m-r"), ("..", None, "a"), (".", None, "b"), ("OWNER/NAME:Q4_K_M", "r", "NAME-Q4_K_M-r"),
        ("x/config.json", "y/recipe.json", "x-y"), ("OWNER/Llama-3.1", "/r/s/", "Llama-3.1-s"),
    ):  # fmt: skip
        assert default_output("hf", model, recipe) == Path(named), model


def test_the_model_itself_is_never_the_output(model: Path, recipe: Path, cli: Run) -> None:
    before = {path: path.read_bytes() for path in model.iterdir()}
    one_line(cli("hf", model, "--recipe", recipe, "-o", model, "--force"), 2)
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_verify_without_torch_names_the_extra(artifact: Path) -> None:
    """Exit code 6, one line with what to install."""
    code = "import sys; sys.modules['torch'] = None; from lrconvert.cli import run; sys.exit(run(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "verify", artifact], capture_output=True, text=True)
    assert done.returncode == 6
    assert "pip install 'lrconvert[hf]'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_family_nobody_knows_is_not_supported(tmp_path: Path, recipe: Path, cli: Run) -> None:
    folder = write_pico(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    for arguments in (["inspect", folder], ["hf", folder, "--recipe", recipe, "-o", tmp_path / "out"]):
        line = one_line(cli(*arguments), 4)
        assert "'mamba'" in line
        for family in FAMILIES:
            assert family in line


def test_a_failed_verification_is_5(artifact: Path, cli: Run) -> None:
    """A changed file is enough; the row names it."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    path = artifact / "generation_config.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"3"))
    result = cli("verify", artifact, "--code", "native", "--threads", "1", "--json")
    assert result.code == 5, result.err
    assert "generation_config.json" in result.out


USAGE: dict[str, tuple[list[str], str]] = {
    "an unknown command": (["bogus"], "bogus"),
    "an unknown option": (["inspect", "demo", "--bogus"], "--bogus"),
    "no model": (["inspect"], "MODEL"),
    "neither a ratio nor a target": (["recipe", "derive", "demo", "--method", "yarn"], "--target"),
    "a ratio and a target": (["recipe", "derive", "demo", "--method", "yarn", "--factor=2", "--target=8k"], "--factor"),
    "a target within the window": (["recipe", "derive", "demo", "--method", "yarn", "--target", "4k"], "4096"),
    "a dtype nobody has": (["hf", "demo", "--recipe", "r", "-o", "x", "--dtype", "int4"], "int4"),
    "no method": (["recipe", "derive", "demo", "--factor", "2"], "--method"),
    "a method nobody has": (["recipe", "derive", "demo", "--method", "x", "--factor", "2"], "'x'"),
    "a folder that is not there": (["recipe", "list", "no/such/folder"], "no/such/folder"),
    **{
        f"factor {value}": (["recipe", "derive", "demo", "--method", "yarn", "--factor", value], "factor")
        for value in ("1", "0", "-2", "nan", "inf", "1e300", "x")
    },
    **{
        f"attention factor {value}": (
            ["recipe", "derive", "demo", "--method", "pi", "--factor", "2", "--attention-factor", value],
            "--attention-factor",
        )
        for value in ("0", "-1", "nan", "inf", "x")
    },
    **{
        f"theta {value}": (["recipe", "import", "x.csv", "--theta", value], "--theta")
        for value in ("1", "nan", "inf", "x")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", USAGE)
def test_a_request_that_is_off_is_one_line_and_2(name: str, cli: Run) -> None:
    """Click's own errors too: one line, with where to read on."""
    arguments, needle = USAGE[name]
    result = cli(*arguments)
    assert needle in one_line(result, 2)
    assert (result.out, len(result.err.splitlines())) == ("", 1)


def test_no_command_prints_the_help(cli: Run) -> None:
    for arguments in ([], ["recipe"]):
        result = cli(*arguments)
        assert "Usage: lrconvert" in result.out + result.err


@pytest.mark.parametrize("reference", ["no/such/recipe", "", "recipe", "demo-yarn-9x"])
def test_a_recipe_that_is_not_there_lists_what_is(reference: str, cli: Run) -> None:
    assert "demo-yarn-8x" in one_line(cli("recipe", "show", reference), 3)


def test_something_that_is_no_model(tmp_path: Path, model: Path, cli: Run) -> None:
    """A file that is no GGUF, a device, a folder without a config."""
    (tmp_path / "file").write_text("hello")
    (tmp_path / "empty").mkdir()
    for reference, needle in (
        (tmp_path / "file", "neither a folder nor a GGUF"),
        (model / "model.safetensors", "neither a folder nor a GGUF"),
        ("/dev/null", "neither a folder nor a GGUF"),
        (tmp_path / "empty", "config.json"),
        ("nothing", "`demo` names the embedded model"),
    ):
        assert needle in one_line(cli("inspect", reference), 3)


def test_a_place_that_can_not_be_written_is_the_environment(
    tmp_path: Path, model: Path, recipe: Path, cli: Run
) -> None:
    """Whatever the command writes: exit code 6 and the path."""
    blocker = tmp_path / "file"
    blocker.write_text("mine")
    for arguments in (
        ["hf", model, "--recipe", recipe, "-o", blocker / "out"],
        ["recipe", "derive", model, "--method", "pi", "--factor", "2", "-o", blocker / "r"],
    ):
        assert str(blocker) in one_line(cli(*arguments), 6)
    assert blocker.read_text() == "mine"


# --- errors on the terminal ------------------------------------------------------------------------------


def test_debug_shows_the_traceback_and_only_debug(cli: Run) -> None:
    assert "Traceback" not in cli("inspect", "nothing").err
    result = cli("--debug", "inspect", "nothing")
    assert result.code == 3
    assert "Traceback" in result.err and result.err.splitlines()[-1].startswith("lrconvert: nothing: no such")


def test_a_bug_is_1_and_asks_for_a_report(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrconvert.api import inspecting

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(inspecting, "inspect", broken)
    result = cli("inspect", "demo")
    line = one_line(result, 1)
    assert "a bug in lrconvert, ZeroDivisionError: two lines" in line and "--debug" in line
    assert len(result.err.splitlines()) == 1


def test_an_interruption_is_130(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrconvert.api import inspecting

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspecting, "inspect", interrupted)
    result = cli("inspect", "demo")
    assert result.code == 130
    assert result.err.strip() == "lrconvert: interrupted"


def test_the_demo_shows_what_its_recipe_records(capsys: pytest.CaptureFixture[str]) -> None:
    """Every length up to the whole window, with the figures of the recipe's file."""
    from lrconvert.cli.demo import RECIPE, _show_record
    from lrconvert.recipe import load_recipe

    recipe = load_recipe(RECIPE)
    _show_record(recipe)
    shown = capsys.readouterr().out
    assert recipe.evaluation is not None
    measured = recipe.evaluation["measured"]
    for length in (4096, 262144, recipe.tiers[-1].max_length):
        row = next(line for line in shown.splitlines() if f" {length:,} " in line)
        perplexity, keys = measured[f"perplexity@{length}"]["perplexity"]["value"], measured[f"retrieval@{length}"]
        assert f"{perplexity:.1f}" in row and f"{keys['hits']} of {keys['trials']}" in row


@pytest.mark.parametrize("command", ["recipe list", "inspect demo --json", "recipe show demo-8x --json"])
def test_a_pipe_that_closes_early_is_no_error(command: str) -> None:
    """However much there was to say, and with nothing on stderr."""
    with subprocess.Popen(
        [sys.executable, "-m", "lrconvert", *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")


# --- what commands say -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 2])
def test_inspect_tells_the_facts(family: str, shards: int, tmp_path: Path, cli: Run) -> None:
    """As JSON and as text."""
    folder = write_pico(tmp_path, family, shards=shards)
    facts = json.loads(cli("inspect", folder, "--json").out)
    assert (facts["family"], facts["format"], facts["dtype"]) == (family, "safetensors", "F32")
    tensors = pico_tensors(json.loads((folder / "config.json").read_text()))
    assert facts["tensors"] == len(tensors)
    assert facts["parameters"] == sum(array.size for array in tensors.values())
    assert facts["files"] == (1 if shards == 1 else 3)
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.glob("model*"))
    assert facts["rope"]["kind"] == "default" and facts["rope"]["original_window"] == 64
    assert facts["targets"]["hf"] is None and facts["manifest"] is None
    refused = family == "phimoe"
    assert (facts["targets"]["gguf"] is not None) == refused
    result = cli("inspect", folder)
    assert f"{family}, safetensors, {len(tensors)} tensors" in result.out
    assert ("can become gguf" in result.out) != refused and "next: lrconvert recipe derive" in result.err


def test_inspect_knows_an_artifact(artifact: Path, model: Path, cli: Run) -> None:
    """Its tiers, and what it was made from."""
    facts = json.loads(cli("inspect", artifact, "--json").out)
    assert facts["rope"]["kind"] == "lrconvert"
    assert [tier["max_length"] for tier in facts["rope"]["tiers"]] == [64, 128]
    assert facts["manifest"] == {"model": str(model), "recipe": "pico", "parity": "not verified yet"}
    assert f"baked by lrconvert from {model} with pico" in cli("inspect", artifact).out


def test_inspect_and_hf_take_a_gguf(tmp_path: Path, cli: Run) -> None:
    path = write_gguf(tmp_path / "pico.gguf")
    result = cli("inspect", path, "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert (facts["family"], facts["format"], facts["dtype"], facts["files"]) == ("qwen2", "gguf", "F32", 1)
    assert facts["bytes"] == path.stat().st_size
    recipe = write_recipe(recipe_for(open_model(path)), tmp_path / "recipe")
    baked = cli("hf", path, "--recipe", recipe, "-o", tmp_path / "out")
    assert baked.code == 0, baked.err
    made = open_model(tmp_path / "out")
    for name, array in pico_tensors(pico_config("qwen2")).items():
        np.testing.assert_array_equal(made.checkpoint.read(name), array)


def test_inspect_of_a_cut_gguf_is_bad_input(tmp_path: Path, cli: Run) -> None:
    path = write_gguf(tmp_path / "pico.gguf")
    path.write_bytes(path.read_bytes()[:1000])
    assert "pico.gguf" in one_line(cli("inspect", path), 3)


def test_derive_show_check_and_list_agree(tmp_path: Path, model: Path, cli: Run) -> None:
    """The recipe on stdout is the recipe in the file; JSON parses; hints go to stderr."""
    arguments = ("recipe", "derive", model, "--method", "yarn", "--factor", "4", "--name", "r")
    printed = cli(*arguments)
    written = cli(*arguments, "-o", tmp_path / "all" / "r")
    assert (printed.code, written.code) == (0, 0)
    loaded = load_recipe(tmp_path / "all" / "r")
    assert parse_recipe(printed.out) == loaded
    assert parse_recipe(cli("recipe", "show", tmp_path / "all" / "r", "--json").out) == loaded
    assert "r: llama, 16 rotated dimensions" in cli("recipe", "show", tmp_path / "all" / "r").out
    assert cli("recipe", "check", tmp_path / "all" / "r", "--model", model).out == f"r: valid, fits {model}\n"
    (tmp_path / "all" / "broken").mkdir()
    (tmp_path / "all" / "broken" / "recipe.json").write_text("{}")
    listed = cli("recipe", "list", tmp_path / "all", "--json")
    assert [row["name"] for row in json.loads(listed.out)] == ["r"]
    assert "warning: " in listed.err and "broken" in listed.err
    assert "r" in cli("recipe", "list", tmp_path / "all").out
    assert "demo-yarn-8x" in [row["name"] for row in json.loads(cli("recipe", "list", "--json").out)]
    assert "--force" in one_line(cli(*arguments, "-o", tmp_path / "all" / "r"), 2)
    assert cli(*arguments, "-o", tmp_path / "all" / "r", "--force").code == 0


def test_what_is_imported_from_an_artifact_is_its_recipe(artifact: Path, recipe: Path, cli: Run) -> None:
    """The same tiers, bit for bit, from the config that was baked."""
    result = cli("recipe", "import", artifact / "config.json")
    assert result.code == 0, result.err
    assert parse_recipe(result.out).tiers == load_recipe(recipe).tiers


def test_plot_draws_lines_of_text_without_a_picture(recipe: Path, cli: Run) -> None:
    result = cli("recipe", "plot", recipe)
    assert result.code == 0 and len(result.out.splitlines()) >= 2
    assert "-o" in result.err


def test_hf_says_what_it_did(tmp_path: Path, model: Path, recipe: Path, cli: Run) -> None:
    """Windows, edits, files, links, and that nobody has verified it yet."""
    result = cli("hf", model, "--recipe", recipe, "-o", tmp_path / "out")
    assert result.out.startswith(f"{model} (llama): 64 → 128 tokens, tiers up to 64, 128\n")
    assert re.search(r"out: 5 files, [\d.]+ kB, 1 of them hard links to the source", result.out)
    assert f"not verified yet: lrconvert verify {tmp_path / 'out'}" in result.err
    copied = cli("hf", model, "--recipe", recipe, "-o", tmp_path / "copy", "--copy")
    assert "hard links" not in copied.out


def test_every_command_has_help(cli: Run) -> None:
    """Every command and subcommand answers --help; the overview has a line for each."""
    overview = cli("--help")
    assert overview.code == 0
    for name, (_, text) in COMMANDS.items():
        assert name in overview.out and text.split(",")[0] in overview.out
        assert cli(name, "--help").code == 0
    for name in ("list", "show", "check", "derive", "import", "plot"):
        assert cli("recipe", name, "-h").code == 0
    assert re.fullmatch(r"lrconvert, version \d+\.\d+\.\d+\S*\n", cli("--version").out)


# --- imports ---------------------------------------------------------------------------------------------

LIGHT = """
import json, sys
import lrconvert
from lrconvert.cli import run
code = max(run(command) for command in json.loads(sys.argv[1]))
heavy = sorted({"torch", "transformers", "onnx", "jax", "tensorflow"} & set(sys.modules))
print(f"imported: {heavy}", file=sys.stderr)
sys.exit(code)
"""


def run_light(*commands: list[object]) -> tuple[int, str]:
    """The highest exit code of commands in one fresh interpreter, and which heavy modules they imported."""
    asked = [[str(argument) for argument in command] for command in commands]
    command = [sys.executable, "-c", LIGHT, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()[-1]


def test_light_commands_import_neither_torch_nor_transformers(
    tmp_path: Path, model: Path, artifact: Path, recipe: Path
) -> None:
    """`--help`, `inspect` (folder, artifact, GGUF), every `recipe` subcommand, and `hf` itself. In one process: what
    one of them imports is never unimported."""
    path = write_gguf(tmp_path / "pico.gguf")
    commands: list[list[object]] = [
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        ["inspect", model],
        ["inspect", artifact, "--json"],
        ["inspect", path],
        ["recipe", "list"],
        ["recipe", "show", recipe],
        ["recipe", "check", recipe, "--model", model],
        ["recipe", "derive", model, "--method", "yarn", "--factor", "2"],
        ["recipe", "import", artifact / "config.json"],
        ["recipe", "plot", recipe],
        ["hf", model, "--recipe", recipe, "-o", tmp_path / "out", "--dtype", "bf16"],
    ]
    if run_light(*commands) != (0, "imported: []"):
        for command in commands:  # which one it was
            assert run_light(command) == (0, "imported: []"), command
        pytest.fail("not one of them alone, but all together")


def test_the_check_sees_an_import(tmp_path: Path) -> None:
    """A command that does import torch is seen: verify, on something that is no artifact."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    code, heavy = run_light(["verify", tmp_path])
    assert code == 3
    assert "torch" in heavy


def test_a_derived_recipe_keeps_the_name_of_a_path_not_the_path(tmp_path: Path, model: Path, cli: Run) -> None:
    """A recipe travels; what comes next is said with the user's own words."""
    result = cli("recipe", "derive", model, "--method", "ntk", "--factor", 2, "-o", tmp_path / "r")
    assert result.code == 0
    values = json.loads((tmp_path / "r" / "recipe.json").read_text())
    assert values["base_model"] == model.name and values["name"] == f"{model.name}-ntk-2x"
    assert f"lrconvert hf {model} --recipe {tmp_path / 'r'}" in result.err


def test_demo_is_the_embedded_model_whatever_folder_stands_there(
    tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli("inspect", "demo").out.startswith("demo: llama")
    assert cli("inspect", "./demo").code == 3


def test_what_serves_folders_only_says_so_of_a_gguf(cli: Run, tmp_path: Path) -> None:
    """`--code` has a word for a file, and the way out; `push` for one that lrconvert did not write."""
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    pushed = cli("push", file, "me/m")
    assert pushed.code == 3 and "not an lrconvert artifact" in pushed.err
    asked = cli("verify", file, "--code", "native")
    assert asked.code == 2 and "--runtime llama.cpp has only one" in asked.err
