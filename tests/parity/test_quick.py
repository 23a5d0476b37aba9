# SPDX-License-Identifier: Apache-2.0
"""`--profile quick`: few cases that still catch every mistake of the recipe, and rows that don't wait for others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Result, own_name, recipe_for
from support.verifying import verify

from lrconvert.api.verifying import verify as api_verify
from lrconvert.artifact.bake import bake
from lrconvert.artifact.checks import Row
from lrconvert.artifact.manifest import manifest_path
from lrconvert.checkpoint import Model
from lrconvert.engines.capability import CUSTOM_HF
from lrconvert.errors import UsageError
from lrconvert.parity import Options
from lrconvert.parity.cases import CPU, QUICK, Case, build_cases, kept
from lrconvert.parity.mutants import RECIPE_MUTANTS, unpermuted_qk
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.progress import Step
from lrconvert.recipe import Recipe, load_recipe
from lrconvert.reference import Reference
from lrconvert.runtimes import base, llama_cpp, onnxruntime, transformers
from lrconvert.runtimes.backend import ANYTHING
from lrconvert.targets import gguf, hf, onnx

Pico = Callable[..., Model]
CODES = {"hf": "custom", "gguf": "llama.cpp", "onnx": "onnxruntime"}
WORKERS = {"hf": transformers.WORKER, "gguf": llama_cpp.WORKER, "onnx": onnxruntime.WORKER}


@pytest.fixture(scope="module")
def interpreters(request: pytest.FixtureRequest) -> Callable[[str], base.Interpreter]:
    """One a format for all artifacts here."""
    running: dict[str, base.Interpreter] = {}

    def get(kind: str) -> base.Interpreter:
        if kind not in running:
            running[kind] = base.Interpreter(WORKERS[kind])
            request.addfinalizer(running[kind].close)
        return running[kind]

    return get


def artifact(kind: str, model: Model, recipe: Recipe, folder: Path) -> Path:
    """Baked in float32."""
    output = own_name(folder / "a")
    if kind == "gguf":
        output = output.with_suffix(".gguf")
        bake(gguf.plan(model, recipe, output, gguf.Options(type="f32")))
    else:
        bake({"hf": hf, "onnx": onnx}[kind].plan(model, recipe, output))
    return output


# --- what is asked -------------------------------------------------------------------------------------------------


def test_it_asks_one_length_on_each_side_of_every_boundary_and_the_far_end(pico: Pico) -> None:
    spec = load_recipe("llama2-7b-2048k")
    model = pico(max_position_embeddings=4096, head_dim=128)
    resolved = model.resolve(spec)
    cases = list(build_cases(resolved, CUSTOM_HF, QUICK))
    sides = {side for tier in spec.tiers[:-1] for side in (tier.max_length, tier.max_length + 1)}
    assert [case.length for case in cases] == sorted({*sides, spec.tiers[-1].max_length})
    assert {case.kind for case in cases} == {"forward"}
    assert all(case.spread and case.tokens == 512 for case in cases)
    whole = list(build_cases(resolved, CUSTOM_HF, CPU))
    assert sum(case.tokens for case in whole if not case.skipped) > 3 * sum(case.tokens for case in cases)


def test_code_without_positions_still_sees_both_sides_of_a_boundary(pico: Pico) -> None:
    """It can't be asked a spread sequence: whole ones as long as a CPU's budget, and what is beyond is said."""
    spec = pico(max_position_embeddings=4096, head_dim=128).resolve(load_recipe("llama2-7b-2048k"))
    accepts = replace(ANYTHING, positions="none")
    asked = {case.length: case for case in build_cases(spec, CUSTOM_HF, QUICK, accepts=accepts)}
    assert not asked[4096].spread and not asked[4096].skipped and not asked[4097].skipped
    assert asked[8193].skipped
    assert QUICK.most(accepts) == CPU.dense and QUICK.most(ANYTHING) == 512


MUTANTS = [
    *(("hf", mutant) for mutant in (*RECIPE_MUTANTS, "unpermuted q/k")),
    *(("gguf", mutant) for mutant in RECIPE_MUTANTS if mutant != "no start tokens"),  # llama.cpp knows none
    *(("onnx", mutant) for mutant in ("swapped sets", "no attention factor", "boundary one late")),
]


@pytest.mark.parametrize(("kind", "mutant"), MUTANTS)
def test_every_mutant_is_caught(
    kind: str, mutant: str, pico: Pico, tmp_path: Path, interpreters: Callable[[str], base.Interpreter]
) -> None:
    model = pico("llama", max_position_embeddings=256)  # a boundary that llama.cpp can see
    right = recipe_for(model, even=True, start_tokens=12 if mutant == "no start tokens" else 0)
    wrong = right if mutant == "unpermuted q/k" else RECIPE_MUTANTS[mutant](right)
    assert wrong is not None
    codes = ("custom",) if kind == "hf" else None
    options = Options(threads=1, interpreter=interpreters(kind), profile="quick", backends=codes)
    baked = artifact(kind, unpermuted_qk(model) if wrong is right else model, wrong, tmp_path)
    report = verify(baked, against=model.reference, recipe=right, options=options)
    said_by = "metadata" if (kind, mutant) == ("gguf", "boundary one late") else CODES[kind]  # contexts hide it
    assert said_by in {row.code for row in report.failed}, f"{mutant} passed"
    assert verify(artifact(kind, model, right, tmp_path), options=options).passed


# --- what is kept and said ---------------------------------------------------------------------------------------


def test_the_manifest_keeps_the_report_of_the_last_full_verification(
    pico: Pico, tmp_path: Path, interpreters: Callable[[str], base.Interpreter]
) -> None:
    model = pico("llama")
    baked = artifact("hf", model, recipe_for(model, even=True), tmp_path)
    full = Options(threads=1, interpreter=interpreters("hf"))
    quick = replace(full, profile="quick")

    def stored() -> dict[str, object]:
        return json.loads(manifest_path(baked).read_text())

    report = verify(baked, options=quick)
    assert report.passed and any("quick profile" in note for note in report.notes)
    assert stored()["parity"] is None
    assert all(record["sha256"] for record in stored()["files"].values())  # type: ignore[attr-defined]
    verify(baked, options=full)
    kept_report = stored()["parity"]
    assert kept_report is not None
    verify(baked, options=quick)
    assert stored()["parity"] == kept_report


def test_the_command_has_it_and_refuses_contradictions(pico: Pico, tmp_path: Path, cli: Callable[..., Result]) -> None:
    model = pico("llama")
    baked = artifact("hf", model, recipe_for(model, even=True), tmp_path)
    done = cli("verify", baked, "--profile", "quick", "--code", "custom", "--json")
    assert done.code == 0, done.err
    rows = [row["case"] for row in json.loads(done.out)["rows"] if row["code"] == "custom"]
    assert rows == ["at 64", "one past 64", "far end"]
    assert "Choose one of them" in cli("verify", baked, "--profile", "quick", "--full").err
    assert cli("verify", baked, "--profile", "quick", "--full").code == 2
    with pytest.raises(UsageError, match="profile 'fast': one of quick, full is needed"):
        api_verify(baked, profile="fast")  # type: ignore[arg-type]


# --- rows when they are known ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "gguf", "onnx"])
def test_rows_of_a_tier_come_before_the_reference_reads_the_next(
    kind: str, pico: Pico, tmp_path: Path, interpreters: Callable[[str], base.Interpreter]
) -> None:
    """In every runtime: the rows of the first set are there when the pass of the second begins."""
    model = pico("llama", max_position_embeddings=256)
    told: list[str] = []

    def step(now: Step) -> None:
        if now.what.startswith("reference, set for") and now.what not in told:
            told.append(now.what)

    def row(known: Row) -> None:
        if known.code in ("native", "custom", "llama.cpp", "onnxruntime"):
            told.append(known.case)

    baked = artifact(kind, model, recipe_for(model, even=True), tmp_path)
    options = Options(threads=1, interpreter=interpreters(kind), backends=("custom",) if kind == "hf" else None)
    report = verify(baked, options=options, progress=step, watch=row)
    assert report.passed
    first, second = (told.index(f"reference, set for {length} tokens") for length in (256, 512))
    assert first < told.index("below 256") < told.index("at 256") < second < told.index("far end")


def test_codes_share_the_passes_of_the_reference(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spread case with the same set is computed once; with another set, or without room to keep it, again."""
    model = pico("llama", max_position_embeddings=4096)
    spec = model.resolve(recipe_for(model, even=True))
    passes: list[int] = []
    computed = Reference.logits

    def counted(self: Reference, tokens: np.ndarray, **asked: object) -> np.ndarray:
        passes.append(len(tokens))
        return computed(self, tokens, **asked)  # type: ignore[arg-type]

    monkeypatch.setattr(Reference, "logits", counted)
    runner = ReferenceRunner(model)
    far = Case("far end", "forward", (8192,), spread=True)
    one, two = runner.forward(spec, far), runner.forward(spec, far)
    assert len(passes) == 1 and np.array_equal(one, two) and len(one) == len(kept(512))
    other = replace(spec, tiers=(spec.tiers[0], replace(spec.tiers[1], attention_factor=2.0)))
    assert not np.array_equal(runner.forward(other, far), one)
    monkeypatch.setattr("lrconvert.parity.reference_runner.MOST_KEPT", 0)
    runner.forward(replace(spec, tiers=(spec.tiers[0], replace(spec.tiers[1], attention_factor=3.0))), far)
    assert len(passes) == 3
