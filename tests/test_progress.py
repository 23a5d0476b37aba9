# SPDX-License-Identifier: Apache-2.0
"""The steps of a long task, counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import recipe_for
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model
from lrconvert.progress import Step, Steps
from lrconvert.targets import get_target


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


def test_a_bake_counts_every_byte(pico: Callable[..., Model], tmp_path: Path) -> None:
    """Of files that are generated, linked, copied and converted: the count never falls, and ends at the total."""
    model = pico("llama")
    recipe = recipe_for(model, even=True)
    for name, target, link in (("links", "hf", None), ("copies", "hf", False), ("file.gguf", "gguf", None)):
        plan = get_target(target).plan(model, recipe, tmp_path / name)
        steps: list[Step] = []
        bake(plan, link=link, progress=steps.append)
        done, total = [step.done for step in steps], sum(plan.sizes.values())
        assert done == sorted(done) and done[-1] == total, name
        assert {(step.task, step.unit, step.total) for step in steps} == {("writing", "bytes", total)}, name


def test_a_verification_counts_its_checks(pico: Callable[..., Model], tmp_path: Path) -> None:
    """Checksums, weights, checks, in this order; every count ends at its total, and no share falls."""
    model = pico("llama")
    recipe = recipe_for(model)  # native code can't express it: what it drops is measured
    for name, target, tasks in (
        ("folder", "hf", ["checksums", "weights", "checks"]),
        ("onnx", "onnx", ["checksums", "weights", "checks"]),
    ):
        bake(get_target(target).plan(model, recipe, tmp_path / name))
        steps: list[Step] = []
        report = verify(tmp_path / name, progress=steps.append)
        assert report.passed, report.summary
        assert list(dict.fromkeys(step.task for step in steps)) == tasks
        for task in tasks:
            own = [step for step in steps if step.task == task]
            parts = [step.part for step in own]
            assert parts == sorted(parts), task
            assert own[-1].done == own[-1].total and parts[-1] == 1.0, task
        checks = [step.what for step in steps if step.task == "checks"]
        computed = [row for row in report.rows if row.length is not None]  # the others read files
        assert len(computed) / 2 < len(dict.fromkeys(checks)), "a step for each case"
