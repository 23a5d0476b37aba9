# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/: Python examples run, links lead somewhere, the commands exist."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import Result
from support.snippets import blocks_of, short_demo

import lrconvert
from lrconvert.checkpoint import locate
from lrconvert.cli import cli as lrconvert_cli

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("*.md", "docs/*.md", "recipes/*/README.md", "examples/*/README.md")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
COMMANDS = re.compile(r"^(?:torchrun .*? --no-python )?lrconvert ((?:--debug )?[a-z].*)$", re.MULTILINE)


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Result]) -> None:
    """Top to bottom, in one namespace, on two layers of the embedded model with a window of one llama.cpp context in
    place of `demo`, doubled by the recipe."""
    if missing := [verb for verb in ("evaluate", "search") if not hasattr(lrconvert, verb)]:
        pytest.skip(f"lrconvert has no {' and no '.join(missing)} yet")
    model = short_demo(tmp_path / "short-demo", window=256, layers=2)
    monkeypatch.chdir(tmp_path)
    shutil.copy(locate("demo") / "heldout.txt", "book.txt")
    made = cli("recipe", "derive", model, "--method", "yarn", "--factor", "2", "--uniform", "-o", "my-recipe")
    assert made.code == 0, made.err
    namespace: dict[str, Any] = {}
    for number, (language, text) in enumerate(blocks_of(ROOT / "docs" / "python.md"), 1):
        if language == "python":
            code = compile(text.replace('"demo"', repr(str(model))), f"docs/python.md, block {number}", "exec")
            exec(code, namespace)
    assert namespace["report"].passed


def commands_of(page: Path) -> list[str]:
    """Every lrconvert command in the sh blocks of a page, without what the shell adds."""
    text = "\n".join(text for language, text in blocks_of(page) if language == "sh").replace("\\\n", " ")
    return [found.partition("#")[0].strip() for found in COMMANDS.findall(text)]


def unknown_in(command: str) -> list[str]:
    """Words of a command line that lrconvert has no command or option for."""
    words = command.split()
    group: click.Command = lrconvert_cli
    context = click.Context(group)
    while isinstance(group, click.Group) and words:
        name = words.pop(0)
        if name.startswith("-"):
            continue
        found = group.get_command(context, name)
        if found is None:
            return [name]
        group = found
    known = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in words if word.startswith("-") and word.split("=")[0] not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_exists(page: Path) -> None:
    """Names and options; whether they do what the page says is for other tests."""
    unknown = {command: found for command in commands_of(page) if (found := unknown_in(command))}
    assert unknown == {}


@pytest.mark.parametrize(
    ("command", "unknown"),
    [
        ("hf demo --recipe r -o x", []),
        ("hf demo --receipt r", ["--receipt"]),
        ("recipe draw r", ["draw"]),
        ("bake", ["bake"]),
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str, unknown: list[str]) -> None:
    assert unknown_in(command) == unknown


OPTION = re.compile(r"`(--[a-z][a-z-]*)")
# Of llama-server, torchrun, vLLM and the scripts in benchmarks/ and tools/.
FOREIGN = {"--cache-reuse", "--context-shift", "--fit", "--help", "--kv-unified", "--layers", "--list",
           "--max-model-len", "--max-restarts", "--only", "--quick", "--readme", "--seconds",
           "--slot-save-path", "--widen"}  # fmt: skip


def all_options(command: click.Command = lrconvert_cli) -> set[str]:
    found = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found |= all_options(command.get_command(context, name) or lrconvert_cli)
    return found


def test_every_option_in_prose_exists() -> None:
    """`--option` in a sentence or a table names an option of some command, or of a program named in FOREIGN."""
    known = all_options() | FOREIGN
    named = {option: page.name for page in PAGES for option in OPTION.findall(page.read_text(encoding="utf-8"))}
    assert {option: page for option, page in named.items() if option not in known} == {}
