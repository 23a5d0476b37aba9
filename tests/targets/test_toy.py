# SPDX-License-Identifier: Apache-2.0
"""A target in one module: a folder of .npy files. What it takes to add one, and no more.

Nothing of the package is touched: a row in the registry of targets and one in that of runtimes take it through bake,
inspect, verify, card and push.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recipe_for
from support.toy_runtime import RUNTIME, ToySession

import lrconvert
from lrconvert import hub
from lrconvert.api.baking import plan_bake
from lrconvert.artifact.bake import bake
from lrconvert.artifact.card import CARD, CardText, render, source_card
from lrconvert.artifact.checks import Row, rows_of
from lrconvert.artifact.manifest import Manifest
from lrconvert.artifact.plan import Edit, Plan, Stream, StreamTensor
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.target import Target
from lrconvert.checkpoint import Checkpoint, Model, TensorInfo
from lrconvert.checkpoint.adapter import Adapter
from lrconvert.checkpoint.base import read_json
from lrconvert.checkpoint.blocks import Block, row_blocks
from lrconvert.checkpoint.source import snapshot
from lrconvert.errors import UnsupportedError, UsageError
from lrconvert.hub import publish
from lrconvert.hub.access import Account
from lrconvert.hub.remote import Remote
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec
from lrconvert.runtimes import RUNTIMES
from lrconvert.runtimes import register as register_runtime
from lrconvert.runtimes.backend import Runtime
from lrconvert.targets import register, target_names, target_of, unregister

CONFIG, SUFFIX = "config.json", ".npy"

# --- the target ------------------------------------------------------------------------------------------


class NpyCheckpoint(Checkpoint):
    """One array a file, its name the tensor's."""

    format = "npy"
    computing = "float32"

    def __init__(self, path: Path) -> None:
        self.path, self.config = path, read_json(path / CONFIG)
        self.tensors = {
            file.stem: TensorInfo(file.stem, "F32", np.load(file, mmap_mode="r").shape, file)
            for file in sorted(path.glob(f"*{SUFFIX}"))
        }

    def blocks(self, name: str) -> Iterator[Block]:
        values = np.load(self.tensors[name].file, allow_pickle=False)
        for start, stop in row_blocks(values.shape):
            yield Block(start, stop, partial(values.__getitem__, slice(start, stop)))

    def weight_files(self) -> list[Path]:
        return [info.file for info in self.tensors.values()]

    def side_files(self) -> dict[str, Path | bytes]:
        return {}


def plan(model: Model, recipe: Recipe, output: Path, options: Any = None, *, adapter: Adapter | None = None) -> Plan:
    spec = model.resolve(recipe)
    short, long = spec.tiers[0], spec.tiers[-1]
    scaling = {
        "short_factor": list(short.factors),
        "long_factor": list(long.factors),
        "attention_factor": long.attention_factor,
        "original_max_position_embeddings": short.max_length,
        "rope_type": "longrope",
    }
    config = {**model.checkpoint.config, "max_position_embeddings": spec.window, "rope_scaling": scaling}
    card = render(model, recipe, spec, CARD_TEXT, source=source_card(model))
    return Plan(
        target="npy",
        model=model,
        recipe=recipe,
        spec=spec,
        output=output,
        record=BakeRecord(spec.window, "F32"),
        texts={CONFIG: json.dumps(config).encode(), CARD: card.encode()},
        copies={},
        streams=[array_file(model.checkpoint, tensor.name, tensor.shape) for tensor in model.roles.values()],
        headline="arrays",
        edits=[Edit(CONFIG, "rope_scaling", None, scaling)],
        stamps=snapshot(model.checkpoint.weight_files()),
    )


def array_file(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Stream:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    tensor = StreamTensor(name, 4 * int(np.prod(shape)), partial(jobs, checkpoint, name))
    return Stream(name + SUFFIX, [tensor], header.getvalue())


def jobs(checkpoint: Checkpoint, name: str) -> Iterator[tuple[Callable[[], memoryview], int]]:
    for block in checkpoint.blocks(name):
        yield partial(as_bytes, block), 4 * int(np.prod(checkpoint.tensors[name].shape))


def as_bytes(block: Block) -> memoryview:
    return memoryview(np.ascontiguousarray(block.read(), np.float32).tobytes())


def checks(artifact: Path, stored: NpyCheckpoint, model: Model, spec: RopeSpec, record: BakeRecord) -> list[Row]:
    right = stored.config["max_position_embeddings"] == spec.window
    return rows_of("config", "window is the recipe's", [] if right else [("window", "it is another")])


CARD_TEXT = CardText("numpy", ("longrope",), lambda repo: ["## How to run", "", f"`numpy.load` {repo}"],
                     lambda family, dropped, losses: ["Arrays, nothing else."])  # fmt: skip
TARGET = Target(
    name="npy",
    title="a folder of arrays",
    recognises=lambda path: path.is_dir() and any(path.glob(f"*{SUFFIX}")),
    plan=plan,
    open=NpyCheckpoint,
    checks=checks,
    runtime="npy",
    stored=True,
    card=CARD_TEXT,
    explain=lambda checkpoint: [f"{len(checkpoint.tensors)} arrays"],
)

# --- what runs it ----------------------------------------------------------------------------------------


class NpySession(ToySession):
    """The toy runtime's Llama over arrays."""

    def __init__(self, artifact: Path) -> None:
        super().__init__(artifact)
        self.weights = {file.stem: np.load(file).astype(np.float64) for file in artifact.glob(f"*{SUFFIX}")}


(toy,) = RUNTIME.backends
NPY_RUNTIME = Runtime("npy", ("npy",), (replace(toy, name="npy", open=lambda artifact, options: NpySession(artifact)),))

# --- the proof -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(TARGET)
    register_runtime(NPY_RUNTIME)
    yield
    unregister(TARGET.name)
    del RUNTIMES[NPY_RUNTIME.name]


@pytest.fixture
def model(pico: Callable[..., Model]) -> Model:
    return pico("llama")


@pytest.fixture
def artifact(model: Model, tmp_path: Path) -> Path:
    bake(plan_bake("npy", model, recipe_for(model, even=True), tmp_path / "arrays"))
    return tmp_path / "arrays"


def test_it_is_baked_whole_with_a_manifest_and_a_card(model: Model, artifact: Path) -> None:
    """Every tensor is the model's, and the manifest names every file with its digest."""
    manifest = Manifest.read(artifact)
    assert manifest.target == "npy" and manifest.bake == BakeRecord(128, "F32")
    assert set(manifest.files) == {path.name for path in artifact.iterdir()} - {"lrconvert.json"}
    assert all(record.sha256 for record in manifest.files.values())
    for tensor in model.roles.values():
        np.testing.assert_array_equal(np.load(artifact / f"{tensor.name}{SUFFIX}"), model.checkpoint.read(tensor.name))
    card = (artifact / CARD).read_text()
    assert "Arrays, nothing else." in card and 'library_name: "numpy"' in card and "Not verified yet" in card


def test_it_is_inspected(artifact: Path) -> None:
    assert target_of(artifact) is TARGET and target_names()[0] == "npy"
    found = lrconvert.inspect(artifact)
    assert (found.format, found.family, found.kind) == ("npy", "llama", "longrope")
    assert found.words == [f"{found.tensors} arrays"] and found.manifest is not None
    assert found.targets["npy"] is None  # what it was, it can become again


def test_it_is_verified_and_the_report_stays_with_it(artifact: Path) -> None:
    """On both sides of the boundary, by its own runtime, on its own weights."""
    report = lrconvert.verify(artifact)
    assert report.passed, report.summary
    cases = {row.case for row in report.rows if row.code == "npy"}
    assert cases >= {"below 64", "at 64", "one past 64", "far end", "decode across 64"}
    assert {row.code for row in report.rows} == {"files", "config", "weights", "npy"}
    assert (Manifest.read(artifact).parity or {})["passed"] is True
    other = lrconvert.verify(artifact.rename(artifact.with_name("moved")), runtime="npy")
    assert other.passed


@pytest.mark.parametrize("mutant", sorted(set(RECIPE_MUTANTS) - {"no start tokens"}))
def test_a_mistake_fails(mutant: str, model: Model, tmp_path: Path) -> None:
    right = recipe_for(model, even=True)
    wrong = RECIPE_MUTANTS[mutant](right)
    assert wrong is not None
    bake(plan_bake("npy", model, wrong, tmp_path / "wrong"))
    report = lrconvert.verify(tmp_path / "wrong", against=model.reference, recipe=right)
    assert [row for row in report.failed if row.code == "npy"], mutant


def test_changed_weights_fail(artifact: Path) -> None:
    """A tensor that isn't the model's is named; another runtime is refused."""
    path = artifact / f"model.norm.weight{SUFFIX}"
    np.save(path, np.load(path) * np.float32(1.01))
    assert {row.code for row in lrconvert.verify(artifact).failed} >= {"files", "weights"}
    path.unlink()
    assert "model.norm.weight is missing" in str([row.reason for row in lrconvert.verify(artifact).failed])
    with pytest.raises(UsageError, match=r"llama\.cpp does not run npy artifacts"):
        lrconvert.verify(artifact, runtime="llama.cpp")


def test_push_plans_it(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, its card with its own way to run it, its manifest without local paths."""
    lrconvert.verify(artifact)
    account = Account("me", "test")
    monkeypatch.setattr(publish, "look", lambda name, *others, **more: Remote(name, account))
    planned = hub.plan(artifact, "me/arrays")
    assert {addition.path_in_repo for addition in planned.additions} == {path.name for path in artifact.iterdir()}
    (card,) = [addition for addition in planned.additions if addition.path_in_repo == CARD]
    with card.as_file() as file:
        text = file.read().decode()
    assert "`numpy.load` me/arrays" in text and "verified:" in text


def test_a_config_without_a_family_is_refused(artifact: Path) -> None:
    (artifact / CONFIG).write_text("{}")
    with pytest.raises(UnsupportedError, match="model_type None is not a family"):
        lrconvert.inspect(artifact)
