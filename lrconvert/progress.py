# SPDX-License-Identifier: Apache-2.0
"""How far a long task is. Whatever takes long tells a `Progress` about its steps; the command line shows them.

steps = Steps("checks", progress)
steps.expect(4096)                  for each step, before the first: its cost
steps.start("far end", 4096)        for each step, when it starts
steps.finish()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BYTES = "bytes"  # the unit of a task that reads or writes files


@dataclass(frozen=True)
class Step:
    """`done` of `total` steps of a task are finished, and `what` is under way. `total` is None while it is unknown.

    `unit` is what is counted, where that is not plain from the task. `share` is the part of the work that is done,
    where steps differ in cost. `left` are the seconds until the task is done, where the task knows better than its
    rate so far.
    """

    task: str
    what: str = ""
    done: int = 0
    total: int | None = None
    unit: str = ""
    share: float | None = None
    left: float | None = None

    @property
    def part(self) -> float:
        """The part of the work that is done, 0 to 1; 0 where that is not known."""
        part = self.share if self.share is not None else self.done / self.total if self.total else 0.0
        return min(max(part, 0.0), 1.0)


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """For callers that watch nothing."""


class Steps:
    """The steps of a task, counted. Costs are in any one unit: bytes, or tokens of forward passes."""

    def __init__(self, task: str, progress: Progress | None, unit: str = "") -> None:
        self.task, self.unit, self._progress = task, unit, progress or silent
        self._started, self._total = 0, 0
        self._spent, self._expected = 0.0, 0.0
        self._what, self._cost, self._within = "", 0.0, 0.0  # of the step under way

    def expect(self, cost: float = 1.0, steps: int = 1) -> None:
        """So many more steps will come, of this cost each."""
        self._total += steps
        self._expected += cost * steps

    def start(self, what: str, cost: float = 1.0) -> None:
        """The step before is done; this one is under way."""
        self._spent += self._cost
        self._started += 1
        self._what, self._cost, self._within = what, cost, 0.0
        self._tell()

    def within(self, part: float) -> None:
        """This part of the step under way is done. A second pass over the same step does not take it back."""
        self._within = max(self._within, part)
        self._tell()

    def finish(self) -> None:
        """The last step is done."""
        self._spent += self._cost
        self._started, self._what, self._cost, self._within = self._started + 1, "", 0.0, 0.0
        self._tell()

    def _tell(self) -> None:
        share = (self._spent + self._cost * self._within) / self._expected if self._expected else 0.0
        done = max(self._started - 1, 0)
        self._progress(Step(self.task, self._what, done, max(self._total, done), self.unit, min(share, 1.0)))
