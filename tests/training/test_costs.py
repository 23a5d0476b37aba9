# SPDX-License-Identifier: Apache-2.0
"""The cost of a pass, from two that were measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.extending import write_wordy

from lrconvert.checkpoint import open_model
from lrconvert.training import costs
from lrconvert.training.costs import ATTENTION, attention_share, fitted
from lrconvert.training.loaded import LoadedModel

LENGTHS = (512, 2048)
SHARE = 2e-4


def test_measured_costs_are_carried_over() -> None:
    """Of a device whose attention takes three times as long for an operation, at any length."""

    def seconds(tokens: float) -> float:
        return 1e-4 * tokens * (1 + 3 * SHARE * tokens)

    found = fitted(LENGTHS, (seconds(512), seconds(2048)), (7e6 + 512e3, 7e6 + 2048e3), SHARE)
    for tokens in (100, 512, 2048, 65536):
        assert found.seconds(tokens) == pytest.approx(seconds(tokens))
        assert found.memory(tokens) == pytest.approx(7e6 + 1e3 * tokens)
    assert fitted(LENGTHS, (1.0, 2.0), None, SHARE).memory(100) is None


@pytest.mark.parametrize("factor", [0.1, 1.5, 4.0, 50.0])
def test_a_disturbed_measurement_stays_within_what_devices_do(factor: float) -> None:
    """The longer row keeps its time; one 32 times as long lies between the least and the most that attention takes."""
    true = fitted(LENGTHS, (0.06, 0.3), None, SHARE)
    found = fitted(LENGTHS, (0.06 * factor, 0.3), None, SHARE)
    assert found.seconds(2048) == pytest.approx(0.3) == pytest.approx(true.seconds(2048))
    bounds = [0.3 * 32 * (1 + k * SHARE * 65536) / (1 + k * SHARE * 2048) for k in ATTENTION]
    assert bounds[0] * (1 - 1e-9) <= found.seconds(65536) <= bounds[1] * (1 + 1e-9)


def test_all_processes_make_equally_many_passes() -> None:
    """However long each takes: the leading one's seconds count, here a whole one. Others wait within a pass."""
    passes: list[int] = []
    workers = SimpleNamespace(agree=lambda seconds: 1.0)
    model: Any = SimpleNamespace(device=torch.device("cpu"), workers=workers)
    assert costs._fastest(model, lambda loaded, tokens: passes.append(1), np.zeros((1, 8), np.int64)) == 1.0
    assert len(passes) == 2


def test_the_share_of_attention_is_the_models(tmp_path: Path) -> None:
    model = open_model(write_wordy(tmp_path / "wordy"))
    shape, loaded = model.shape, LoadedModel(model, device="cpu")
    parameters = sum(weight.numel() for weight in loaded.network.parameters())
    assert attention_share(loaded) == shape.layers * shape.heads * shape.head_dim / parameters
