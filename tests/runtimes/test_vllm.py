# SPDX-License-Identifier: Apache-2.0
"""vLLM itself, its CPU build: artifacts against the reference under the rule that it has. Takes minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import engine_suite as suite
from support.engine_suite import SHAPE, Pico

from lrconvert.parity import Options
from lrconvert.runtimes.vllm import WORKER

pytestmark = pytest.mark.vllm
FAMILIES = suite.claimed("vLLM")


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    """A process for every artifact: vLLM keeps rotary tables by their settings, and memory until it ends."""
    with suite.engine("vllm", WORKER, shared=False) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_the_portable_subset_agrees(pico: Pico, tmp_path: Path, options: Options, family: str) -> None:
    """The far end is one short of the window: vLLM keeps room for a token."""
    report = suite.check_healthy(pico(family, **SHAPE), tmp_path / "a", options, far=127)
    assert report.runtimes["vllm"]["vllm"]


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_the_attention_factor_has_to_be_folded(pico: Pico, tmp_path: Path, options: Options, family: str) -> None:
    suite.check_attention(pico(family, **SHAPE), tmp_path, options)


@pytest.mark.parametrize(("family", "mutant"), [("llama", "swapped sets"), ("phi3", "factors as multipliers")])
def test_a_wrong_long_set_is_caught(pico: Pico, tmp_path: Path, options: Options, family: str, mutant: str) -> None:
    suite.check_mutant(pico(family, **SHAPE), tmp_path / "a", options, mutant)


def test_positions_are_refused(pico: Pico, tmp_path: Path, options: Options) -> None:
    suite.check_questions_it_can_not_answer(pico("llama", **SHAPE), tmp_path / "a", options)
