# SPDX-License-Identifier: Apache-2.0
"""An ONNX folder as the source of a Hugging Face folder: weights are written anew, and are the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Result, recipe_for
from safetensors.numpy import load_file
from support.onnx_files import export, tensors_of
from support.pico import FAMILIES
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.artifact.manifest import Manifest
from lrconvert.checkpoint import Model, open_model
from lrconvert.recipe import write_recipe
from lrconvert.targets import hf

Pico = Callable[..., Model]
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # rows that hold whole blocks of int4


def test_weights_are_equal(pico: Pico, tmp_path: Path) -> None:
    """Every tensor of every family, fused and tied ones too, byte by byte where the graph keeps the source's dtype."""
    for family in FAMILIES:
        model = pico(family)
        recipe = recipe_for(model, even=True)
        folder = export(model, recipe, tmp_path / f"{family}-onnx")
        source = open_model(folder)
        plan = hf.plan(source, recipe, tmp_path / family)
        bake(plan)
        written, original = load_file(tmp_path / family / "model.safetensors"), tensors_of(model)
        assert written.keys() == original.keys(), family
        for name, array in original.items():
            assert written[name].dtype == array.dtype and written[name].tobytes() == array.tobytes(), (family, name)
        assert not any(record.linked for record in Manifest.read(tmp_path / family).files.values()), family


@pytest.mark.parametrize("kind", ["f16", "bf16", "int8", "int4"])
def test_weights_are_those_of_the_graph(kind: str, pico: Pico, tmp_path: Path) -> None:
    """Rounded once, by the export: what is written is what ONNX Runtime computes with, and no second rounding."""
    model = pico("llama", **WIDE)
    recipe = recipe_for(model, even=True)
    source = open_model(export(model, recipe, tmp_path / "onnx", dtype=kind))
    options = hf.Options(dtype="f32" if kind.startswith("int") else kind)
    bake(hf.plan(source, recipe, tmp_path / "hf", options))
    written, original = load_file(tmp_path / "hf" / "model.safetensors"), tensors_of(model)
    assert written.keys() == original.keys()
    changed = 0
    for name, array in tensors_of(source).items():
        np.testing.assert_array_equal(written[name].astype(np.float64), array.astype(np.float64), err_msg=name)
        changed += not np.array_equal(array.astype(np.float64), original[name].astype(np.float64))
    assert changed, "the export rounded something, else this test shows nothing"


def test_the_command_and_its_verification(pico: Pico, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """`lrconvert hf ONNX` makes a folder that transformers computes right, against the model behind the graph."""
    model = pico("llama")
    recipe = recipe_for(model, even=True)
    export(model, recipe, tmp_path / "onnx")
    path = write_recipe(recipe, tmp_path / "recipe")
    done = cli("hf", tmp_path / "onnx", "--recipe", path, "-o", tmp_path / "hf")
    assert done.code == 0, done.err
    report = verify(tmp_path / "hf", against=model.reference, recipe=recipe)
    assert report.passed, report.summary
