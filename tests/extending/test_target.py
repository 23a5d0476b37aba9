# SPDX-License-Identifier: Apache-2.0
"""A plan cut at a window below its own."""

from __future__ import annotations

import pytest

from lrconvert.errors import UsageError
from lrconvert.extending.plan import Calibrate, Evaluate, Search, Tune, load_plan, parse_plan
from lrconvert.extending.problems import problems

TWICE_TRAINED = """
name = "twice"
stage = [
    {kind = "derive", window = "256k"},
    {kind = "tune", window = "256k", length = "64k", steps = 9, jumps = [1, 1]},
    {kind = "evaluate", perplexity = ["8k", "64k", "256k"], retrieval = ["8k", "256k"]},
    {kind = "search", window = "1024k", row_length = "64k", decide = "448k"},
    {kind = "tune", window = "1024k", length = "64k", steps = 9},
    {kind = "search", window = "2048k", row_length = "64k"},
    {kind = "recover"},
    {kind = "evaluate", perplexity = ["8k", "448k"], retrieval = ["8k", "2048k"]},
]
"""


def test_a_cut_plan_ends_at_its_target() -> None:
    """Later sets are gone, the last one is for the target alone, and what is left can be carried out."""
    whole = parse_plan(TWICE_TRAINED, "a test")
    for target, kinds in (
        (32768, ["derive", "tune", "evaluate", "recover", "evaluate"]),
        (262144, ["derive", "tune", "evaluate", "recover", "evaluate"]),
        (524288, ["derive", "tune", "evaluate", "search", "tune", "recover", "evaluate"]),
        (1500000, ["derive", "tune", "evaluate", "search", "tune", "search", "recover", "evaluate"]),
    ):
        plan = whole.up_to(target)
        assert [stage.kind for stage in plan.stage] == kinds, target
        assert plan.target == target and problems(plan, 8192) == [], target
        for stage in plan.stage:
            if isinstance(stage, Evaluate):
                assert max(*stage.perplexity, *stage.retrieval) <= target, target
            if isinstance(stage, Tune):
                assert stage.length <= stage.window <= target, target
            if isinstance(stage, Search):
                assert (stage.decide or 0) <= stage.window, target
    assert whole.up_to(whole.target) == whole


@pytest.mark.parametrize(("target", "tunes"), [("64k", 2), ("128k", 3), ("256k", 3), ("512k", 3)])
def test_every_training_under_a_set_stays_with_it(target: str, tunes: int) -> None:
    """The plan demo trains three times at 256k. Where rows are no longer than what its teacher reads, it teaches
    nothing."""
    plan = load_plan("demo").up_to(1024 * int(target[:-1]))
    kept = [stage for stage in plan.stage if isinstance(stage, Tune)]
    assert len(kept) == tunes and all(stage.window == min(plan.target, 2**18) for stage in kept)
    assert all(stage.distil < stage.length for stage in kept) and problems(plan, 4096) == []


def test_a_cut_plan_calibrates_as_far_as_it_reaches() -> None:
    plan = parse_plan(
        'stage = [{kind = "derive", window = "256k"}, {kind = "calibrate", lengths = ["64k", "256k"]},'
        '{kind = "calibrate", lengths = ["256k"]}]', "a test"
    )  # fmt: skip
    assert [stage.lengths for stage in plan.up_to(131072).stage[1:] if isinstance(stage, Calibrate)] == [(65536,)]


def test_a_plan_reaches_no_further_than_its_sets() -> None:
    with pytest.raises(UsageError, match="--target 4194304 is beyond the plan small, which reaches 2097152"):
        load_plan("small").up_to(2**22)
