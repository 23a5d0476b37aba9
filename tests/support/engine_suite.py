# SPDX-License-Identifier: Apache-2.0
"""What the marked tests of an engine ask: artifacts in the real program, in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import recipe_for
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model
from lrconvert.engines.table import ENGINES
from lrconvert.errors import InputError
from lrconvert.parity import Options, Report, Row
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.recipe import Recipe
from lrconvert.runtimes.base import Interpreter
from lrconvert.targets import hf

Pico = Callable[..., Model]
# vLLM's CPU build has no heads smaller than this.
SHAPE = {"hidden_size": 128, "head_dim": 32}
ROOM = 30  # a healthy artifact is this far inside its tolerance
FAR = 100  # a mutant is this far outside


def claimed(name: str) -> list[str]:
    """The families that the table says something of, for an engine: others were never asked."""
    return sorted({family for row in ENGINES if row.name == name for family in row.families or ()})


def python_of(runtime: str) -> str:
    """The engine's interpreter, or the test is skipped."""
    variable = f"LRCONVERT_{runtime.upper()}_PYTHON"
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter with {runtime}; CONTRIBUTING.md says how to make one")
    return python


@contextmanager
def engine(runtime: str, worker: Path, *, shared: bool) -> Iterator[Options]:
    """Options that ask the engine; `shared`: one process for all artifacts."""
    python = python_of(runtime)
    interpreter = Interpreter(worker, python=python) if shared else None
    yield Options(threads=1, runtime=runtime, python=python, interpreter=interpreter)
    if interpreter is not None:
        interpreter.close()


def rows_of(report: Report, code: str | None, verdict: str | None = None) -> dict[str, Row]:
    return {row.case: row for row in report.rows if row.code == code and verdict in (None, row.verdict)}


def bake(model: Model, recipe: Recipe, output: Path, *, portable: bool = False) -> Path:
    bake_plan(hf.plan(model, recipe, output, hf.Options(portable=portable)))
    return output


def with_attention(recipe: Recipe, attention: float) -> Recipe:
    return replace(recipe, tiers=tuple(replace(tier, attention_factor=attention) for tier in recipe.tiers))


def check_healthy(model: Model, output: Path, options: Options, *, far: int) -> Report:
    """The portable subset agrees on both sides of the boundary and at the far end; that short sequences use the
    long set is measured, not hidden."""
    code = options.runtime
    report = verify(bake(model, recipe_for(model, even=True), output), options=options)
    assert report.passed, report.summary
    passed = rows_of(report, code, "pass")
    assert set(passed) == {"below 64", "at 64", "one past 64", "far end", "decode across 64"}
    assert passed["far end"].length == far
    assert min(row.margin or 0 for row in passed.values()) > ROOM
    known = rows_of(report, code, "known")
    assert set(known) == {"lost at 64"}
    assert (known["lost at 64"].kl_mean or 0) > 1e-2  # a random model; what a trained one loses is another matter
    assert any("one factor set for all lengths" in loss for loss in report.losses)
    return report


def check_attention(model: Model, output: Path, options: Options) -> None:
    """A factor that isn't the formula's is ignored, as the losses say; folded, it does what the recipe asks."""
    code, recipe = options.runtime, with_attention(recipe_for(model, even=True), 1.35)
    plain = verify(bake(model, recipe, output / "plain"), options=options)
    assert plain.passed, plain.summary
    assert any("computes its attention factor" in loss for loss in plain.losses)
    assert (rows_of(plain, code)["lost at 128"].kl_mean or 0) > 1e-3
    portable = verify(bake(model, recipe, output / "portable", portable=True), options=options)
    assert portable.passed, portable.summary
    assert "lost at 128" not in rows_of(portable, code)
    assert not any("attention factor" in loss for loss in portable.losses)


def check_mutant(model: Model, output: Path, options: Options, mutant: str) -> None:
    """A mistake in the recipe that reaches what the engine reads fails there, by far."""
    right = recipe_for(model, even=True)
    wrong = RECIPE_MUTANTS[mutant](right)
    assert wrong is not None
    report = verify(bake(model, wrong, output), against=model.reference, recipe=right, options=options)
    caught = [row for row in report.failed if row.code == options.runtime]
    assert caught, f"{mutant} passed in {options.runtime}"
    assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


def check_questions_it_can_not_answer(model: Model, output: Path, options: Options) -> None:
    """Positions of one's own are refused, not ignored."""
    from lrconvert.parity.options import chosen_backends

    artifact = bake(model, recipe_for(model, even=True), output)
    (backend,) = chosen_backends(artifact, "hf", options)
    with (
        closing(backend.open(artifact, options)) as session,
        pytest.raises(InputError, match="only the positions of a whole"),
    ):
        session.logits([[1, 2, 3]], positions=[0, 1, 5], keep=[0])
