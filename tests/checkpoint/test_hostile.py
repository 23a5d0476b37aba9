# SPDX-License-Identifier: Apache-2.0
"""Property tests: whatever a file holds, lrconvert answers with one of its own errors, or works.

Seeds are fixed (`derandomize`): a failure here is the same failure everywhere.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recipe_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.pico import pico_config, write_pico

from lrconvert.api.inspecting import inspect
from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.manifest import MANIFEST, Manifest
from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import InputError, LrconvertError
from lrconvert.recipe import parse_recipe
from lrconvert.recipe.importing import import_recipe
from lrconvert.targets import hf

FEW = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
numbers = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from([0, -1, 1, 2, 10**400, 2**31, 2**63, 1e308, 5e-324]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0}
CONFIG = pico_config(
    "llama", max_position_embeddings=256, original_max_position_embeddings=64, rope_scaling=LONGROPE, rms_norm_eps=1e-5
)


def or_refuses(action: Callable[[], object]) -> None:
    """The action works, or raises one of ours with a one-line message."""
    try:
        action()
    except LrconvertError as error:
        assert 2 <= error.exit_code <= 6
        assert str(error).strip()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def damaged(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with up to three values replaced, removed, or added."""
    result = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(result)):
            break
        path = draw(st.sampled_from(found))
        parent: Any = result
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "remove":
            del parent[path[-1]]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(values)
        else:
            parent[path[-1]] = draw(values)
    return result


@FEW
@given(config=damaged(CONFIG))
def test_configs(tmp_path: Path, config: dict[str, Any]) -> None:
    """Read, inspected, imported as a recipe: for any damage to a config."""
    folder = write_pico(tmp_path) if not (tmp_path / "model.safetensors").exists() else tmp_path
    (folder / "config.json").write_text(json.dumps(config))
    or_refuses(lambda: inspect(str(folder)))
    or_refuses(lambda: import_recipe([str(folder / "config.json")]))


@FEW
@given(data=st.data())
def test_recipes(data: st.DataObject, pico: Callable[..., Model]) -> None:
    """A damaged recipe is refused, or is one that still says what it says."""
    whole = json.loads(recipe_for(pico("llama")).to_json())
    text = json.dumps(data.draw(damaged(whole)))
    try:
        recipe = parse_recipe(text)
    except InputError:
        return
    assert parse_recipe(recipe.to_json()) == recipe
    recipe.warnings()


@FEW
@given(text=st.binary(max_size=200))
def test_recipe_files_of_any_bytes(text: bytes) -> None:
    or_refuses(lambda: parse_recipe(text))


@FEW
@given(data=st.data())
def test_safetensors_headers(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes changed in the length or the header, any cut: refused, or the same tensors' shapes hold."""
    folder = write_pico(tmp_path) if not (tmp_path / "whole").exists() else tmp_path
    kept = tmp_path / "whole"
    if not kept.exists():
        kept.write_bytes((folder / "model.safetensors").read_bytes())
    content = bytearray(kept.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    (folder / "model.safetensors").write_bytes(bytes(content))

    def read_all() -> None:
        model = open_model(folder)
        for tensor in model.roles.values():
            assert model.checkpoint.read(tensor.name).shape == tensor.shape

    or_refuses(read_all)


@FEW
@given(data=st.data())
def test_indexes(tmp_path: Path, data: st.DataObject) -> None:
    folder = write_pico(tmp_path, shards=2) if not (tmp_path / "index").exists() else tmp_path
    index, kept = folder / "model.safetensors.index.json", tmp_path / "index"
    if not kept.exists():
        kept.write_bytes(index.read_bytes())
    index.write_text(json.dumps(data.draw(damaged(json.loads(kept.read_text())))))
    or_refuses(lambda: open_model(folder))


@FEW
@given(data=st.data())
def test_manifests(tmp_path: Path, pico: Callable[..., Model], data: st.DataObject) -> None:
    """A manifest of any damage is read or refused; inspect says the same of its artifact."""
    artifact = tmp_path / "a"
    if not artifact.exists():
        bake_plan(hf.plan(pico("llama"), recipe_for(pico("llama")), artifact))
        (tmp_path / "kept").write_bytes((artifact / MANIFEST).read_bytes())
    whole = json.loads((tmp_path / "kept").read_text())
    (artifact / MANIFEST).write_text(json.dumps(data.draw(damaged(whole))))
    or_refuses(lambda: Manifest.read(artifact))
    or_refuses(lambda: inspect(str(artifact)))


# --- a source that changes -------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["rewritten", "removed"])
def test_a_source_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Between plan and publish, with weights converted: nothing is published, and the file is named."""
    folder = write_pico(tmp_path / "m")
    model = open_model(folder)
    plan = hf.plan(model, recipe_for(model), tmp_path / "a", hf.Options(dtype="bf16"))
    weights = folder / "model.safetensors"
    copied = np.fromfile(weights, np.uint8)
    if change == "rewritten":
        copied.tofile(weights)
        os.utime(weights, ns=(1, 1))
    else:
        weights.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        bake_plan(plan)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "a"))) == []
