# SPDX-License-Identifier: Apache-2.0
"""mlx-lm itself, on this machine's CPU: artifacts against the reference under the rule that it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import engine_suite as suite
from support.engine_suite import Pico

from lrconvert.parity import Options
from lrconvert.runtimes.mlx import WORKER

pytestmark = pytest.mark.mlx
FAMILIES = suite.claimed("mlx-lm")
# What mlx-lm reads: the long set. It computes its attention factor itself, and has no boundary to get wrong.
MUTANTS = ("swapped sets", "factors as multipliers")


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    with suite.engine("mlx", WORKER, shared=True) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_the_portable_subset_agrees(pico: Pico, tmp_path: Path, options: Options, family: str) -> None:
    report = suite.check_healthy(pico(family), tmp_path / "a", options, far=128)
    assert report.runtimes["mlx"]["mlx-lm"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_factor_has_to_be_folded(pico: Pico, tmp_path: Path, options: Options, family: str) -> None:
    suite.check_attention(pico(family), tmp_path, options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_long_set_is_caught(pico: Pico, tmp_path: Path, options: Options, family: str, mutant: str) -> None:
    suite.check_mutant(pico(family), tmp_path / "a", options, mutant)


def test_positions_are_refused(pico: Pico, tmp_path: Path, options: Options) -> None:
    suite.check_questions_it_can_not_answer(pico("llama"), tmp_path / "a", options)
