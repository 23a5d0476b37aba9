# SPDX-License-Identifier: Apache-2.0
"""What strangers wrote is shown, and does nothing to the terminal that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Result, recipe_for

from lrconvert.checkpoint import open_model
from lrconvert.cli import _output as out
from lrconvert.cli._steps import bake_step
from lrconvert.recipe import write_recipe

Cli = Callable[..., Result]
ACTS = "a\x1b[2Jb\rc\x07d\x9be\u202ef\ud800g"
SHOWN = r"a\u001b[2Jb\u000dc\u0007d\u009be\u202ef\ud800g"


@pytest.mark.parametrize("show", [out.say, out.hint, out.warn])
def test_nothing_that_a_terminal_acts_on_is_shown(
    show: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    show(f"{ACTS}\n\tλ̂ 🦙")
    streams = capsys.readouterr()
    assert f"{SHOWN}\n\tλ̂ 🦙\n" in streams.out + streams.err


def test_json_says_the_same_with_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    out.data({"name": ACTS})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"name": ACTS} and "\x1b" not in printed and "\x9b" not in printed


def test_cells_are_texts_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets would be styles, or an error."""
    out.console.cache_clear()
    try:
        out.table(("name",), [("[/]",), ("[bold]x",), ("\x1b[31m",)], title="[red]of all")
    finally:
        out.console.cache_clear()
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("[/]", "[bold]x", r"\u001b[31m", "[red]of all"))


def test_the_last_line_of_an_error_too(cli: Cli, pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Here the name of a shard, in an index."""
    index = {"weight_map": {"a": "\x1b[2J.safetensors"}}
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_bytes((pico_folder() / "config.json").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused = cli("inspect", folder)
    assert refused.code == 3 and r"\u001b[2J" in refused.err and "\x1b" not in refused.err


def test_a_list_of_recipes_survives_their_names(cli: Cli, pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    recipe = replace(recipe_for(open_model(pico_folder())), family="[/]")
    write_recipe(recipe, tmp_path / "[bold]x")
    listed = cli("recipe", "list", tmp_path)
    assert listed.code == 0 and "[bold]x" in listed.out and "[/]" in listed.out


def test_a_model_may_be_called_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The next step is proposed under a name that a file can have."""
    monkeypatch.chdir(tmp_path)
    assert bake_step("hf", "me/model", "a" * 5000).endswith(f"-o {'a' * 80}")
