# SPDX-License-Identifier: Apache-2.0
"""What is shipped, and what the README promises."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Result

from lrconvert.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_holds_the_recipes_the_model_and_the_modeling_code(tmp_path: Path) -> None:
    """Built by the backend itself, without a network; nothing of the tests comes along."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "lrconvert/data/demo/model.safetensors",
        "lrconvert/data/demo/tokenizer.json",
        "lrconvert/data/demo/LICENSE",
        "lrconvert/data/recipes/demo-8x/recipe.json",
        "lrconvert/data/recipes/demo-2048k/adapter/adapter_model.safetensors",
        "lrconvert/data/recipes/smollm2-135m-2048k/adapter/adapter_model.safetensors",
        "lrconvert/data/recipes/demo-yarn-8x/recipe.json",
        "lrconvert/data/recipes/demo-8x-any/recipe.json",
        "lrconvert/data/recipes/demo-yarn-8x-any/README.md",
        "lrconvert/data/recipes/smollm2-135m-64k-any/recipe.json",
        "lrconvert/data/recipes/llama2-7b-2048k/recipe.json",
        "lrconvert/data/recipes/mistral-7b-2048k/README.md",
        "lrconvert/data/recipe.schema.json",
        "lrconvert/targets/hf/modeling_longrope.py",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    (notice,) = (name for name in names if name.endswith("/licenses/NOTICE"))
    told = zipfile.ZipFile(wheel).read(notice).decode()
    for name in shipped_recipes():
        licence = load_recipe(name).provenance.licence
        assert licence is None or (name in told and "Permission is hereby granted" in told), name
    assert wheel.stat().st_size < 48 * 2**20


def test_the_readme_and_ci_run_the_same_test_command() -> None:
    """`.ci/run` calls exactly what the README tells a person to call."""
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert ".venv/bin/python -m pytest\n" in readme
    assert "\n.venv/bin/python -m pytest\n" in ci
    assert "-c constraints.txt -e '.[test]'" in readme and "-c constraints.txt -e '.[test]'" in ci
    assert ".venv/bin/lrconvert demo" in readme and ".venv/bin/lrconvert demo" in ci


def test_ci_and_releases_try_every_python_that_is_promised() -> None:
    """The suite on the lowest and the highest, what would be released on all of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [line.rpartition(" ")[2] for line in project["classifiers"] if line.startswith("Programming Language")]
    promised = sorted((name for name in names if "." in name), key=lambda name: int(name.partition(".")[2]))
    assert project["requires-python"] == f">={promised[0]}"

    def tried(workflow: str, job: str) -> list[str]:
        jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())["jobs"]
        return jobs[job]["strategy"]["matrix"]["python"]

    assert tried("ci.yml", "suite") == [promised[0], promised[-1]]
    assert tried("ci.yml", "between") == promised[1:-1]
    assert tried("release.yml", "try") == promised


def test_no_file_is_too_large() -> None:
    """At most 16 MiB a file, 60 MiB of weights in all."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.decode().split("\0") if name}
    assert max(sizes.values()) <= 16 * 2**20
    assert sum(size for name, size in sizes.items() if name.endswith(".safetensors")) <= 60 * 2**20


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_verify_without_its_extra_says_which(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    done = cli("verify", "anything")
    assert done.code == 6
    assert module in done.err and "pip install 'lrconvert[hf]'" in done.err
    assert done.err.count("\n") == 1
