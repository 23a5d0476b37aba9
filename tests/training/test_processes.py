# SPDX-License-Identifier: Apache-2.0
"""Who answers which question, in processes that are only thought of: teams themselves need GPUs."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch.distributed as dist

from lrconvert.training.processes import Workers


def workers(count: int, rank: int, *, team: int = 1, together: bool = False) -> Workers:
    """One of `count` processes, without a process group."""
    made = Workers.__new__(Workers)
    made.count, made.rank, made.team, made.sharded = count, rank, team, together
    made._mesh = cast("Any", object()) if together else None
    return made


@pytest.mark.parametrize(
    ("team", "together", "questions", "answered"),
    [
        (1, False, 4, [0, 1, 2, 3]),
        (1, False, 2, [0, 1, None, None]),
        (1, True, 2, [0, 1, 1, 1]),  # who waits for others has to do what they do
        (2, True, 2, [0, 0, 1, 1]),
        (2, True, 1, [0, 0, 0, 0]),
        (4, True, 1, [0, 0, 0, 0]),
    ],
)
def test_every_team_answers_a_question(team: int, together: bool, questions: int, answered: list[int | None]) -> None:
    """And the answers that are gathered are the questions', in their order."""
    every = [workers(4, rank, team=team, together=together) for rank in range(4)]
    assert [each.own(questions) for each in every] == answered

    def everybody(box: list[Any], own: Any) -> None:
        box[:] = [None if index is None else f"answer {index}" for index in answered]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", everybody)
        assert every[0].gather("own", questions) == [f"answer {index}" for index in range(questions)]
