# SPDX-License-Identifier: Apache-2.0
"""The GitHub action and the pre-commit hook: their steps, run as CI would run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import Result
from support.forks import ForkedCommands

from lrconvert.cli.hook import artifacts_of, main

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: dict[str, dict[str, Any]] = {step["name"]: step for step in ACTION["runs"]["steps"]}


Step = Callable[..., tuple[subprocess.CompletedProcess[str], str, str]]


@pytest.fixture
def step(tmp_path: Path, commands: ForkedCommands, main_forking: str) -> Step:
    """A step in `tmp_path`, with an `lrconvert` that need not import everything anew."""
    (tmp_path / "programs").mkdir()
    program = commands.program(tmp_path / "programs" / "lrconvert", main_forking)
    return lambda name, **inputs: run_step(name, tmp_path, program.parent, **inputs)


def run_step(
    name: str, folder: Path, programs: Path, **inputs: str
) -> tuple[subprocess.CompletedProcess[str], str, str]:
    """A step as the runner runs it: expressions filled in, bash with -eo pipefail, files for output and summary."""
    values = {key: str(entry.get("default", "")) for key, entry in ACTION["inputs"].items()} | inputs
    step = STEPS[name]
    own = {
        key: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: values[found[1]], str(value))
        for key, value in step.get("env", {}).items()
    }
    files = {key: folder / key.lower() for key in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "GITHUB_ACTION_PATH": str(ROOT),
        **{key: str(file) for key, file in files.items()},
        **own,
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done, files["GITHUB_OUTPUT"].read_text(), files["GITHUB_STEP_SUMMARY"].read_text()


@pytest.fixture
def artifact(cli: Callable[..., Result], plain: tuple[Path, Path], tmp_path: Path) -> Path:
    folder, recipe = plain
    assert cli("hf", folder, "--recipe", recipe, "-o", tmp_path / "made").code == 0
    return tmp_path / "made"


def test_the_verify_step_passes_and_fails_as_ci_would_see_it(step: Step, artifact: Path, tmp_path: Path) -> None:
    """Reports, output and summary are there in both cases; the exit code is that of verify."""
    done, output, summary = step("Verify", artifact="made", profile="files", output="out")
    assert done.returncode == 0, done.stderr
    assert output == "passed=true\n" and summary.startswith("## ✅ made")
    suite = ElementTree.parse(tmp_path / "out" / "verify.xml").getroot()
    assert suite.tag in ("testsuite", "testsuites") and not list(suite.iter("failure"))
    assert "</html>" in (tmp_path / "out" / "verify.html").read_text()
    (artifact / "config.json").write_text((artifact / "config.json").read_text().replace("10000", "20000"))
    done, output, summary = step("Verify", artifact="made", profile="files", output="out")
    assert done.returncode == 5 and output == "passed=false\n"
    assert summary.startswith("## ❌ made") and "rope\\_theta is 20000" in summary


def test_the_verify_step_takes_every_input(
    step: Step, artifact: Path, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """--against, --recipe, the profile and the lock arrive, names with spaces too."""
    folder, recipe = plain
    inputs = {"artifact": "made", "against": str(folder), "recipe": str(recipe), "lock": "my lock", "output": "my out"}
    done, _, _ = step("Verify", profile="quick", **inputs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "my lock").is_file() and (tmp_path / "my out" / "verify.md").is_file()
    assert "quick profile" in done.stdout


def test_an_artifact_that_is_not_there_is_said(step: Step) -> None:
    done, output, summary = step("Verify", artifact="nowhere")
    assert done.returncode == 3 and output == "passed=false\n" and "exit code 3" in summary


def test_every_input_is_used_and_documented() -> None:
    """An input that no step reads does nothing; docs/ci.md names each."""
    text, page = (ROOT / "action.yml").read_text(), (ROOT / "docs" / "ci.md").read_text()
    for name in ACTION["inputs"]:
        assert f"inputs.{name}" in text, name
        assert f"`{name}`" in page, name
    assert [name for name, entry in ACTION["inputs"].items() if entry.get("required")] == ["artifact"]


def test_the_install_step_installs_this_version(tmp_path: Path) -> None:
    """pip is asked for the checkout of the action with its constraints, or for what the input says."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    install = STEPS["Install"]["run"]
    own = f"-c {ROOT}/constraints.txt {ROOT}[hf,llama,onnx]"
    for given, expected in (("", own), ("lrconvert==1 x", "lrconvert==1 x")):
        environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "GITHUB_ACTION_PATH": str(ROOT), "INSTALL": given}
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", install], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == f"-m pip install {expected}", done.stderr


# --- the hook --------------------------------------------------------------------------------------------


def test_the_hook_finds_the_artifacts_of_files(artifact: Path, tmp_path: Path) -> None:
    """A folder's, however deep the file lies; a GGUF's by its name; nothing of others."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "m.lrconvert.json").write_text("{}")
    names = ["made/config.json", "made/onnx/x.json", "m.gguf", "m.Modelfile", "m.lrconvert.json", "other/config.json"]
    assert artifacts_of([str(tmp_path / name) for name in names]) == [tmp_path / "m.gguf", tmp_path / "made"]


def test_the_hook_fails_for_a_tampered_artifact(artifact: Path, tmp_path: Path) -> None:
    """As pre-commit calls it: the entry and the changed files."""
    assert main([str(artifact / "config.json")]) == 0
    assert main([str(tmp_path / "elsewhere.json")]) == 0
    (artifact / "config.json").write_text((artifact / "config.json").read_text().replace("10000", "20000"))
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    python = shutil.which("python", path=str(Path(sys.executable).parent)) or sys.executable
    command = [python, *hook["entry"].split()[1:], "made/config.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 5 and "rope_theta" in done.stdout
    names = ("a/config.json", "m.gguf", "m.lrconvert.json", "x.py")
    assert [name for name in names if re.search(hook["files"], name)] == ["a/config.json", "m.gguf", "m.lrconvert.json"]
