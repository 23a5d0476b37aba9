# SPDX-License-Identifier: Apache-2.0
"""The steps of a long task, counted."""

from __future__ import annotations

from lrconvert.progress import Step, Steps


def test_steps_are_counted_and_weighed() -> None:
    """A step is done when the next one starts; its share is that of its cost, and grows within it."""
    seen: list[Step] = []
    steps = Steps("checks", seen.append, "cases")
    steps.expect(30)
    steps.expect(10, steps=2)
    steps.start("large", 30)
    steps.within(0.5)
    steps.within(0.1)  # a second pass over the same step
    steps.start("small", 10)
    steps.start("small", 10)
    steps.finish()
    assert [(step.what, step.done, round(step.part, 3)) for step in seen] == [
        ("large", 0, 0.0),
        ("large", 0, 0.3),
        ("large", 0, 0.3),
        ("small", 1, 0.6),
        ("small", 2, 0.8),
        ("", 3, 1.0),
    ]
    assert {(step.task, step.total, step.unit) for step in seen} == {("checks", 3, "cases")}


def test_more_steps_than_expected() -> None:
    """The count never says 4 of 3, nor is more than everything done."""
    seen: list[Step] = []
    steps = Steps("checks", seen.append)
    steps.expect()
    for _ in range(3):
        steps.start("another")
    steps.finish()
    assert all(step.total is not None and step.done <= step.total and step.part <= 1 for step in seen)
    assert (seen[-1].done, seen[-1].total, seen[-1].part) == (3, 3, 1.0)


def test_a_task_without_total_has_no_part() -> None:
    assert Step("loading").part == 0.0
    assert Step("writing", done=1, total=4, unit="bytes").part == 0.25
    assert Step("writing", done=0, total=0).part == 0.0
