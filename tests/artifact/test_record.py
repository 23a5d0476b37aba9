# SPDX-License-Identifier: Apache-2.0
"""How an artifact was baked is one record: written and read whole, and read from manifests of version 1 too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, recipe_for

import lrconvert
from lrconvert.api.baking import plan_bake
from lrconvert.artifact.bake import bake
from lrconvert.artifact.manifest import MANIFEST, Manifest, manifest_path
from lrconvert.artifact.record import BakeRecord
from lrconvert.checkpoint import Model
from lrconvert.errors import InputError
from lrconvert.parity.expected import expected
from lrconvert.targets.gguf import Options as GgufOptions
from lrconvert.targets.hf import Options as HfOptions

ATTENTION = 1.3
# Target, what is asked of it, and the options of a version 1 manifest beside the window.
BAKES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "hf": ("hf", HfOptions(), {"dtype": None}),
    "hf, converted": ("hf", HfOptions(dtype="bf16"), {"dtype": "BF16"}),
    "hf, portable": ("hf", HfOptions(portable=True), {"dtype": None, "portable": True, "folded_attention": None}),
    "gguf": ("gguf", GgufOptions(type="q8_0"), {"type": "q8_0", "architecture": "llama"}),
    "gguf, static and folded": (
        "gguf",
        GgufOptions(type="f32", static=True, fold=True),
        {"type": "f32", "architecture": "llama", "static_long": True, "folded_attention": None},
    ),
    "onnx": ("onnx", None, {"dtype": "f32", "attention": "gqa", "opset": 23, "double": True, "genai_rewind": False}),
}


def baked(pico: Callable[..., Model], folder: Path, target: str, options: Any) -> Path:
    """An artifact of a recipe with one attention factor that isn't the formula's."""
    model = pico("llama", max_position_embeddings=256)
    recipe = recipe_for(model, even=True)
    recipe = replace(recipe, tiers=tuple(replace(tier, attention_factor=ATTENTION) for tier in recipe.tiers))
    plan = plan_bake(target, model, recipe, folder / ("m.gguf" if target == "gguf" else "m"), options)
    bake(plan)
    return plan.opens


def as_version_1(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The manifest as lrconvert wrote it before there was a record."""
    manifest = json.loads(manifest_path(path).read_text())
    record = manifest.pop("bake")
    folded = {"folded_attention": record["attention_scale"]} if "folded_attention" in options else {}
    manifest |= {"manifest_version": 1, "options": {"window": record["window"], **options, **folded}}
    return manifest


@pytest.mark.parametrize("name", sorted(BAKES))
def test_a_manifest_of_version_1_means_the_same(name: str, pico: Callable[..., Model], tmp_path: Path) -> None:
    """The record that is read from it, and what the artifact has to compute by it, are those of version 2."""
    target, options, spelled = BAKES[name]
    path = baked(pico, tmp_path, target, options)
    new = Manifest.read(path)
    assert new.manifest_version == 2
    manifest_path(path).write_text(json.dumps(as_version_1(path, spelled)))
    old = Manifest.read(path)
    assert old.bake == new.bake != BakeRecord(512, "F64")
    model = pico("llama", max_position_embeddings=256)
    spec = model.resolve(recipe_for(model, even=True))
    first, second = (expected(model, spec, manifest.bake, path) for manifest in (old, new))
    assert (first.spec, first.kept, first.dropped, first.scale) == (
        second.spec,
        second.kept,
        second.dropped,
        second.scale,
    )


def test_an_artifact_of_version_1_is_verified_and_stays_readable(
    pico: Callable[..., Model], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """Portable, so that forgetting the record would be seen: the folded factor is part of what is compared."""
    target, options, spelled = BAKES["hf, portable"]
    path = baked(pico, tmp_path, target, options)
    manifest_path(path).write_text(json.dumps(as_version_1(path, spelled)))
    report = lrconvert.verify(path, codes=["native"])
    assert report.passed and any(row.code == "portable" for row in report.rows)
    written = json.loads((path / MANIFEST).read_text())
    assert written["bake"]["capability"] == "portable"
    assert Manifest.read(path).bake.attention_scale != 1.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bake": {"window": 0}}, "bake.window"),
        ({"bake": {"window": 512, "stored": 3}}, "bake.stored"),
        ({"bake": {"window": 512, "what": 1}}, "what"),
        ({"bake": {"window": 512, "attention_scale": 0}}, "attention_scale"),
        ({"manifest_version": 3}, "version 3"),
        ({"manifest_version": 1, "options": {"window": "512"}}, "bake.window"),
        ({"manifest_version": 1, "options": {"folded_attention": "x"}}, "attention_scale"),
    ],
)
def test_a_damaged_record_is_bad_input(
    values: dict[str, Any], words: str, pico: Callable[..., Model], tmp_path: Path
) -> None:
    path = baked(pico, tmp_path, "hf", HfOptions())
    manifest = json.loads((path / MANIFEST).read_text())
    if values.get("manifest_version") == 1:
        del manifest["bake"]
    (path / MANIFEST).write_text(json.dumps({**manifest, **values}))
    with pytest.raises(InputError, match=words):
        Manifest.read(path)


def test_a_capability_of_a_newer_lrconvert_is_named(pico: Callable[..., Model], tmp_path: Path) -> None:
    model = pico("llama")
    spec = model.resolve(recipe_for(model, even=True))
    with pytest.raises(InputError, match="baked for 'tpu'"):
        expected(model, spec, BakeRecord(128, capability="tpu"), tmp_path)
