# SPDX-License-Identifier: Apache-2.0
"""Multipliers in whole artifacts: right in every format and dtype, and none can be dropped unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import recipe_for
from support.verifying import CODES, WORKERS, baked, options_by_target, verify

from lrconvert.checkpoint import Model, open_model
from lrconvert.families.multipliers import NAMES
from lrconvert.parity import Options
from lrconvert.parity.mutants import without_multiplier

WINDOW = 256  # llama.cpp's contexts count in steps of it
FAR = 100
Pico = Callable[..., Model]


@pytest.fixture(scope="module")
def options() -> Iterator[Callable[[str], Options]]:
    with options_by_target() as get:
        yield get


DROPPED = [*(("granite", name) for name in NAMES), *(("minicpm", name) for name in NAMES if name != "attention")]


@pytest.mark.parametrize("target", WORKERS)
@pytest.mark.parametrize(("family", "name"), DROPPED)
def test_a_dropped_multiplier_is_caught(
    pico: Pico, tmp_path: Path, family: str, name: str, target: str, options: Callable[[str], Options]
) -> None:
    """By every code of every format, far outside of its tolerance."""
    model = pico(family, max_position_embeddings=WINDOW)
    wrong, recipe = without_multiplier(model, name), recipe_for(model, even=True)
    assert wrong is not None
    artifact = baked(target, wrong, recipe, tmp_path)
    report = verify(artifact, against=model.reference, recipe=recipe, options=options(target))
    for code in CODES[target]:
        caught = [row for row in report.failed if row.code == code]
        assert caught, f"passed in {code}"
        assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


def test_models_without_multipliers_have_none_to_drop(pico: Pico) -> None:
    assert [without_multiplier(pico("llama"), name) for name in NAMES] == [None] * len(NAMES)


TYPES: list[tuple[str, str, dict[str, Any]]] = [
    ("granite", "onnx", {"dtype": "f16"}),
    ("granite", "onnx", {"dtype": "int8", "attention": "standard"}),
    ("granite", "hf", {"dtype": "bf16"}),
    ("granite", "gguf", {"type": "q8_0", "static": True}),
    ("minicpm", "onnx", {"dtype": "int8"}),
    ("minicpm", "gguf", {"type": "f16"}),
    ("minicpm", "gguf", {"static": True}),
]


@pytest.mark.parametrize(("family", "target", "more"), TYPES, ids=str)
def test_other_types_are_right_too(
    pico: Pico, tmp_path: Path, family: str, target: str, more: dict[str, Any], options: Callable[[str], Options]
) -> None:
    model = pico(family, max_position_embeddings=WINDOW)
    report = verify(baked(target, model, recipe_for(model, even=True), tmp_path, **more), options=options(target))
    assert report.passed, report.summary


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_minicpm_is_right_on_both_sides_of_the_window(
    pico: Pico, tmp_path: Path, target: str, options: Callable[[str], Options]
) -> None:
    """Under its own name, in float32; tests/families/test_minicpm.py has the folder that is a llama."""
    model = pico("minicpm", max_position_embeddings=WINDOW)
    report = verify(baked(target, model, recipe_for(model, even=True), tmp_path), options=options(target))
    assert report.passed, report.summary
    passed = {row.case: row for row in report.rows if row.code in CODES[target] and row.verdict == "pass"}
    assert {"at 256", "one past 256", "far end"} <= set(passed)
    assert max(row.kl_mean or 0 for row in passed.values()) < 1e-9


@pytest.mark.parametrize("target", WORKERS)
@pytest.mark.parametrize("family", ["granite", "minicpm"])
def test_a_gguf_is_a_source_like_any_other(
    pico: Pico, tmp_path: Path, family: str, target: str, options: Callable[[str], Options]
) -> None:
    """Its scales come back as the config's, and what is baked from the file is right on both sides of the window."""
    model = pico(family, max_position_embeddings=WINDOW, tie_word_embeddings=True)
    recipe = recipe_for(model, even=True)
    again = open_model(baked("gguf", model, recipe, tmp_path))
    for name in NAMES:
        assert getattr(again.shape.multipliers, name) == pytest.approx(getattr(model.shape.multipliers, name), 1e-7)
    report = verify(baked(target, again, recipe, tmp_path), options=options(target))
    assert report.passed, report.summary
