# SPDX-License-Identifier: Apache-2.0
"""The README's commands run top to bottom, as they are printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.forks import ForkedCommands
from support.snippets import blocks_of, short_demo

README = Path(__file__).resolve().parents[1] / "README.md"
# Two commands install the package and run something. Everything else is run here.
INSTALLS = ("'.[demo]' && .venv/bin/lrconvert demo\n", "'.[test]' && .venv/bin/python -m pytest\n")


def script(*, python: bool = False) -> str:
    """All sh blocks as one script: what one block sets, the next one has. With `python`, Python blocks run where they
    stand; that imports transformers once more than `verify`, which loads the artifact in the same way."""
    lines = ["set -eu"]
    for language, text in blocks_of(README):
        if language == "sh" and not text.endswith(INSTALLS):
            lines.append(text)
        elif language == "python" and python:
            lines.append(f"python - <<'END'\n{text}END\n")
    return "\n".join(lines)


def run(text: str, folder: Path, programs: Path = Path(sys.executable).parent) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(programs), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "HF_HOME": str(folder / "hub")}
    return subprocess.run(
        ["sh", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )


def test_only_the_two_install_lines_are_left_out() -> None:
    """So a third command that can't run in a test doesn't slip in."""
    skipped = [text for language, text in blocks_of(README) if language == "sh" and text.endswith(INSTALLS)]
    assert len(skipped) == len(INSTALLS)
    assert all(text.count("\n") == 1 for text in skipped)
    assert "pip install" not in script()


@pytest.fixture
def programs(tmp_path: Path, commands: ForkedCommands, main_forking: str) -> Path:
    """A folder whose `lrconvert` need not import everything anew; `.ci/run` runs the installed one."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return commands.program(folder / "lrconvert", main_forking).parent


def test_the_commands_run_top_to_bottom(tmp_path: Path, programs: Path) -> None:
    """On two layers of the embedded model with a short window in place of `demo`."""
    text = script()
    assert text.count("MODEL=demo\n") == 1
    model = short_demo(tmp_path / "short-demo", window=64, layers=2)
    done = run(text.replace("MODEL=demo\n", f"MODEL={model}\n"), tmp_path, programs)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("my-recipe/recipe.json", "my-model/lrconvert.json", "my-model.gguf", "my-onnx/lrconvert.json"):
        assert (tmp_path / name).is_file(), name
    assert "verified:" in done.stdout


@pytest.mark.slow
def test_the_commands_run_as_they_are_printed(tmp_path: Path) -> None:
    """On `demo` itself, Python blocks too: `.ci/run` does this."""
    done = run(script(python=True), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified:" in done.stdout


def test_a_command_that_fails_is_noticed(tmp_path: Path, programs: Path) -> None:
    """The script stops at the first failure, wherever it stands."""
    done = run(script().replace("lrconvert inspect $MODEL", "lrconvert inspect nowhere"), tmp_path, programs)
    assert done.returncode == 3
    assert not (tmp_path / "my-recipe").exists()
