# SPDX-License-Identifier: Apache-2.0
"""An adapter is merged once. Twice would double what was trained, and `verify` would find nothing: it compares with the
model that the manifest names, and the adapter merged into that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Result

from lrconvert.recipe import recipe_folder

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a shipped adapter in it."""
    from lrconvert import hf

    return hf("demo", "demo-2048k", tmp_path_factory.mktemp("once") / "trained").path


@pytest.mark.parametrize("command", ["hf", "onnx", "gguf"])
def test_a_recipe_whose_adapter_is_there_already(command: str, trained: Path, tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / ("m.gguf" if command == "gguf" else "m")
    done = cli(command, trained, "--recipe", "demo-2048k", "-o", output, "--dry-run")
    assert done.code == 3, done.err
    assert "demo-2048k/adapter is merged into it already (lrconvert.json). Name the model that it was made" in done.err
    assert done.err.rstrip().endswith("from: demo")


def test_a_recipe_whose_adapter_was_trained_without_the_one_that_is_there(
    trained: Path, tmp_path: Path, cli: Cli
) -> None:
    done = cli("hf", trained, "--recipe", "demo-2048k-any", "-o", tmp_path / "m", "--dry-run")
    assert done.code == 3
    assert "demo-2048k-any/adapter was trained without it" in done.err
    done = cli("hf", trained, "--recipe", "demo-8x", "-o", tmp_path / "m", "--dry-run")
    assert done.code == 0, done.err  # no adapter


def test_an_adapter_that_is_given(trained: Path, tmp_path: Path, cli: Cli) -> None:
    """The same one is refused, and another is the user's to add. Without a manifest nobody can say."""
    own, other = (recipe_folder(name) / "adapter" for name in ("demo-2048k", "demo-2048k-any"))
    done = cli("hf", trained, "--adapter", own, "-o", tmp_path / "m", "--dry-run")
    assert done.code == 3 and "merged into it already" in done.err
    done = cli("hf", trained, "--adapter", other, "-o", tmp_path / "m", "--dry-run")
    assert done.code == 0, done.err
    (trained / "lrconvert.json").rename(tmp_path / "lrconvert.json")
    try:
        done = cli("hf", trained, "--adapter", own, "-o", tmp_path / "m", "--dry-run")
    finally:
        (tmp_path / "lrconvert.json").rename(trained / "lrconvert.json")
    assert done.code == 0, done.err


def test_a_search_on_such_a_recipe(trained: Path, tmp_path: Path, cli: Cli) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(9000) % 50)
    text = tmp_path / "tokens.npy"
    done = cli("search", trained, "--on", "demo-2048k", "--target", "4m", "--text", text, "-o", tmp_path / "o")
    assert done.code == 3 and "merged into it already" in done.err, done.err
