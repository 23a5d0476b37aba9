# SPDX-License-Identifier: Apache-2.0
"""Scores of tokens: what the transformers worker makes by itself is what its logits say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import own_name, recipe_for
from support.engine_suite import bake

from lrconvert.checkpoint import Model
from lrconvert.runtimes.base import score_by_logits
from lrconvert.runtimes.transformers import open_session


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_scores_of_a_batch_are_those_of_its_rows(family: str, pico: Callable[..., Model], tmp_path: Path) -> None:
    """Rows of several lengths in one pass, one of them beyond the boundary, in the artifact's own code."""
    model = pico(family)
    folder = bake(model, recipe_for(model), own_name(tmp_path / family))
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, model.shape.vocab, size=length).tolist() for length in (9, 100, 40)]
    rows[0][-1] = 0
    judged = [1, 30, 39]
    with open_session(folder, custom=True) as session:
        found, wanted = session.score(rows, judged), score_by_logits(session, rows, judged)
        (logits,) = session.logits([rows[1]], keep=[len(rows[1]) - 2])
        rows[1][-1] = int(logits.argmax())
        (chosen,) = session.score(rows[1:2], [3])
    for ours, theirs, count in zip(found, wanted, judged, strict=True):
        assert len(ours.losses) == count
        np.testing.assert_allclose(ours.losses, theirs.losses, atol=2e-5)
        assert ours.preferred.tolist() == theirs.preferred.tolist()
    assert chosen.preferred[-1]
