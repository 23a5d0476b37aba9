# SPDX-License-Identifier: Apache-2.0
"""Whole artifacts in real transformers: healthy ones pass with room to spare, every mutant is caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Result, own_name, recipe_for
from support.pico import FAMILIES
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.manifest import MANIFEST
from lrconvert.checkpoint import Model
from lrconvert.errors import InputError, UsageError
from lrconvert.parity import Options, Report
from lrconvert.parity.mutants import RECIPE_MUTANTS, unpermuted_qk
from lrconvert.recipe import Recipe, write_recipe
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.transformers import WORKER
from lrconvert.targets import hf

# A healthy pico artifact is this far inside its tolerance; a mutant is this far outside.
ROOM = 100


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    """One interpreter for all artifacts here: importing transformers takes longer than a pico model does."""
    interpreter = Interpreter(WORKER)
    yield Options(threads=1, interpreter=interpreter)
    interpreter.close()


def bake(model: Model, recipe: Recipe, output: Path) -> Path:
    output = own_name(output)
    bake_plan(hf.plan(model, recipe, output))
    return output


def margins(report: Report) -> dict[str, float]:
    return {f"{row.code} {row.case}": row.margin for row in report.rows if row.margin is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_artifact_passes_with_room(
    pico: Callable[..., Model], tmp_path: Path, family: str, options: Options
) -> None:
    """Two tiers that native code can express: native and custom code both agree, far inside the bounds. That of phimoe
    never uses the long set, and is held against just that."""
    model = pico(family)
    artifact = bake(model, recipe_for(model, even=True), tmp_path / "a")
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    assert len(report.losses) == (family == "phimoe")
    passed = {row.code for row in report.rows if row.verdict == "pass"}
    assert passed == {"files", "config", "weights", "native", "custom"}
    assert min(margins(report).values()) > ROOM
    stored = json.loads((artifact / MANIFEST).read_text())
    assert stored["parity"]["passed"] is True
    assert all(record["sha256"] for record in stored["files"].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_tiers_and_start_tokens_are_exact_in_custom_code(
    pico: Callable[..., Model], tmp_path: Path, family: str, options: Options
) -> None:
    """Three tiers with n̂ and an attention factor each: custom code exact, native's losses named and measured."""
    model = pico(family)
    artifact = bake(model, recipe_for(model, tiers=3, start_tokens=12), tmp_path / "a")
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    custom = [row for row in report.rows if row.code == "custom"]
    assert {row.verdict for row in custom} == {"pass"}
    assert {"decode across 64", "decode across 128", "batch across the boundary"} <= {row.case for row in custom}
    assert len(report.losses) == 3
    lost = {row.case: row.kl_mean or 0.0 for row in report.rows if row.case.startswith("lost")}
    assert set(lost) == {"lost at 64", "lost at 128", "lost at 256"}
    assert max(lost.values()) > 1e-3


MUTANTS = [*RECIPE_MUTANTS, "unpermuted q/k"]
CHOSEN = [(family, mutant) for family in FAMILIES for mutant in MUTANTS]


@pytest.mark.parametrize(("family", "mutant"), CHOSEN, ids=[f"{f}-{m}" for f, m in CHOSEN])
def test_every_mutant_is_caught(
    pico: Callable[..., Model], tmp_path: Path, family: str, mutant: str, options: Options
) -> None:
    """Each mistake fails a case in native code and in custom code, by far more than its tolerance."""
    model = pico(family)
    # Native code has no start tokens to drop: that mutant is shown on custom code alone.
    starts = 12 if mutant == "no start tokens" else 0
    right = recipe_for(model, even=True, start_tokens=starts)
    if mutant == "unpermuted q/k":
        artifact = bake(unpermuted_qk(model), right, tmp_path / "a")
    else:
        wrong = RECIPE_MUTANTS[mutant](right)
        assert wrong is not None and wrong != right
        artifact = bake(model, wrong, tmp_path / "a")
    report = verify(artifact, against=model.reference, recipe=right, options=options)
    assert not report.passed
    for code in ("custom",) if starts else ("native", "custom"):
        # Phi-3's native code computes its attention factor by itself: it can't be made to drop it.
        if (family, mutant, code) == ("phi3", "no attention factor", "native"):
            continue
        # Phi-3.5-MoE's has one set, and here one attention factor: no boundary to move.
        if family == "phimoe" and mutant.startswith("boundary") and code == "native":
            continue
        caught = [row for row in report.failed if row.code == code]
        assert caught, f"{mutant} passed in {code} code"
        assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > ROOM


def test_the_mutant_of_a_fused_projection_moves_q_and_k_alone(pico: Callable[..., Model]) -> None:
    """Phi-3 has q, k and v in one tensor: rows of each head of q and k are interleaved, those of v stay."""
    model = pico("phi3")
    shape, name = model.shape, model.roles["qkv", 0].name
    right, wrong = (each.checkpoint.read(name) for each in (model, unpermuted_qk(model)))
    rows = np.arange(len(right))
    heads = (shape.heads + shape.kv_heads) * shape.head_dim
    halves = rows[:heads].reshape(-1, 2, shape.head_dim // 2).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(wrong, right[np.concatenate([halves, rows[heads:]])])
    assert heads < len(rows) and not np.array_equal(wrong[:heads], right[:heads])


def test_mutants_that_do_not_apply_say_so(pico: Callable[..., Model]) -> None:
    model = pico("llama")
    plain = recipe_for(model, tiers=1)
    assert RECIPE_MUTANTS["boundary one late"](plain) is None
    assert RECIPE_MUTANTS["no start tokens"](plain) is None
    assert RECIPE_MUTANTS["swapped sets"](plain) is None


# --- files, sources, refusals ----------------------------------------------------------------------------


@pytest.fixture
def artifact(pico: Callable[..., Model], tmp_path: Path) -> Path:
    """A baked pico Llama whose files are its own."""
    model, output = pico("llama"), own_name(tmp_path / "a")
    bake_plan(hf.plan(model, recipe_for(model, even=True), output), link=False)
    return output


@pytest.fixture
def quick(options: Options) -> Options:
    return replace(options, backends=("custom",))


@pytest.mark.parametrize("damage", ["missing", "longer", "changed"])
def test_damaged_files_fail(artifact: Path, damage: str, quick: Options) -> None:
    """A file that is gone, longer, or has one other byte fails, whatever the logits say."""
    weights = artifact / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x01  # the last bit of one weight: no parity bound would see it
    if damage == "missing":
        (artifact / "generation_config.json").unlink()
    else:
        weights.write_bytes(bytes(data) + (b"x" if damage == "longer" else b""))
    report = verify(artifact, options=quick)
    assert not report.passed
    assert any(row.code == "files" for row in report.failed)


def test_people_may_edit_the_card(artifact: Path, quick: Options) -> None:
    """README.md is theirs: an edit is taken over into the manifest, and does not fail."""
    (artifact / "README.md").write_text("mine")
    assert verify(artifact, options=quick).passed
    assert json.loads((artifact / MANIFEST).read_text())["files"]["README.md"]["size"] == 4


def test_an_artifact_outlives_its_source(pico_folder: Callable[..., Path], tmp_path: Path, quick: Options) -> None:
    """Where the source is gone the artifact's own weights are the reference's, and the report says so."""
    from lrconvert.checkpoint import open_model

    source = tmp_path / "source"
    shutil.copytree(pico_folder("llama"), source)
    model = open_model(source)
    made = bake(model, recipe_for(model, even=True), tmp_path / "a")
    shutil.rmtree(source)
    report = verify(made, options=quick)
    assert report.passed
    assert any("own weights" in note for note in report.notes)


def test_a_source_that_changed_is_noticed(pico_folder: Callable[..., Path], tmp_path: Path, quick: Options) -> None:
    from lrconvert.checkpoint import open_model

    source = tmp_path / "source"
    shutil.copytree(pico_folder("llama"), source)
    model = open_model(source)
    made = bake(model, recipe_for(model, even=True), tmp_path / "a")
    shutil.copy(pico_folder("llama", num_hidden_layers=1) / "model.safetensors", source / "model.safetensors")
    shutil.copy(pico_folder("llama", num_hidden_layers=1) / "config.json", source / "config.json")
    with pytest.raises(InputError, match="no longer the model"):
        verify(made, options=quick)


def test_a_folder_without_manifest_needs_model_and_recipe(
    artifact: Path, pico: Callable[..., Model], quick: Options
) -> None:
    (artifact / MANIFEST).unlink()
    with pytest.raises(InputError, match="--against MODEL --recipe R"):
        verify(artifact, options=quick)
    model = pico("llama")
    with pytest.raises(UsageError, match="--recipe"):
        verify(artifact, against=model.reference, options=quick)
    assert verify(artifact, against=model.reference, recipe=recipe_for(model, even=True), options=quick).passed


def test_code_that_does_not_load_is_a_failure_of_the_artifact(artifact: Path, quick: Options) -> None:
    config = json.loads((artifact / "config.json").read_text())
    del config["longrope"]["tiers"][0]["factors"]
    (artifact / "config.json").write_text(json.dumps(config))
    report = verify(artifact, options=quick)
    assert [row.case for row in report.failed if row.code == "custom"] == ["loads"]


def test_the_command_exits_5_and_writes_junit(
    cli: Callable[..., Result], artifact: Path, pico: Callable[..., Model], tmp_path: Path
) -> None:
    """0 with the true recipe, 5 with another; the JSON and the XML say the same."""
    model = pico("llama")
    quick = ("--code", "custom", "--threads", 1)
    good = cli("verify", artifact, *quick, "--json", "--junit", tmp_path / "good.xml")
    assert good.code == 0 and json.loads(good.out)["passed"] is True
    assert 'failures="0"' in (tmp_path / "good.xml").read_text()
    other = recipe_for(model, even=True)
    wrong = RECIPE_MUTANTS["swapped sets"](other)
    assert wrong is not None
    path = write_recipe(wrong, tmp_path / "wrong")
    bad = cli("verify", artifact, *quick, "--recipe", path, "--junit", tmp_path / "bad.xml")
    assert bad.code == 5
    assert "FAILED" in bad.out
    assert "<failure" in (tmp_path / "bad.xml").read_text()
