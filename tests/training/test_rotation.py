# SPDX-License-Identifier: Apache-2.0
"""A rotation under trial: its tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lrconvert.rope import Tier
from lrconvert.training import rotation
from lrconvert.training.rotation import TrialRope

TIER = Tier(16, (1.0, 1.1, 1.5, 3.0), 4, 1.25)


def test_tables_are_those_of_the_tier() -> None:
    """cos and sin of `rope.Tier`, start tokens and attention factor included, each channel's twice."""
    trial = TrialRope(1e4, 8)
    trial.rotation = TIER
    tables = trial(torch.zeros(1).double(), torch.arange(10)[None])
    for found, wanted in zip(tables, TIER.cos_sin(np.arange(10), 1e4), strict=True):
        np.testing.assert_allclose(found[0].numpy(), np.concatenate([wanted, wanted], -1), atol=1e-15)


def test_tables_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds for a document of millions of tokens: parts, joined, are the whole."""
    rope = TrialRope(1e4, 8)
    rope.rotation = TIER
    x, positions = torch.zeros(1), torch.arange(10)[None]
    whole = rope(x, positions)
    monkeypatch.setattr(rotation, "TABLE_ROWS", 3)
    assert all(torch.equal(one, other) for one, other in zip(rope(x, positions), whole, strict=True))


def test_rows_may_have_positions_of_their_own() -> None:
    """Tables of several rows are those of each row alone; of rows that share positions there is one."""
    trial = TrialRope(1e4, 8)
    trial.rotation = TIER
    x, positions = torch.zeros(1).double(), torch.tensor([[0, 1, 5, 90], [3, 4, 900, 901]])
    both = trial(x, positions)
    for index, row in enumerate(positions):
        for found, wanted in zip(both, trial(x, row[None]), strict=True):
            assert found.shape == (2, 4, 8) and torch.equal(found[index], wanted[0])
