# SPDX-License-Identifier: Apache-2.0
"""What an extension removes when it replaces a recipe: the adapter that the old one named, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import recipe_for

from lrconvert.checkpoint import Model
from lrconvert.extending.api import _write
from lrconvert.recipe import write_recipe


@pytest.mark.parametrize("named", ["..", ".", "../thesis", "thesis", "adapter-old"])
def test_a_recipe_that_was_there_can_not_name_what_is_removed(
    tmp_path: Path, pico: Callable[..., Model], named: str
) -> None:
    """Its file may be a stranger's."""
    recipe = recipe_for(pico())
    folder, source = tmp_path / "recipes" / "mine", write_recipe(recipe, tmp_path / "source")
    write_recipe(replace(recipe, adapter="x"), folder)
    values = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({**values, "adapter": named}))
    kept = [folder / "thesis" / "text", folder.parent / "thesis" / "text", folder / "adapter-old" / "notes"]
    old = folder / "adapter-old" / "adapter_model.safetensors"
    for path in (*kept, old):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    _write(recipe, source, folder, True)
    assert all(path.exists() for path in kept) is (named != "adapter-old")
    assert kept[0].exists() and kept[1].exists() and old.exists() is (named != "adapter-old")
