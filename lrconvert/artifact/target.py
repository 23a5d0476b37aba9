# SPDX-License-Identifier: Apache-2.0
"""What a target is: one value that says everything a command has to know of a format.

`lrconvert.targets` keeps the registry. Bake, verify, inspect, card, push and the command line read a row of it, and
nothing else knows which formats there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lrconvert.artifact.card import CardText
from lrconvert.artifact.checks import Row
from lrconvert.artifact.plan import Plan
from lrconvert.artifact.record import BakeRecord
from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.adapter import Adapter
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec

C = TypeVar("C", bound=Checkpoint)  # what an artifact of the format is, read back


class PlanFunction(Protocol):
    """Resolve the recipe, edit, lay out; touch no weights yet."""

    def __call__(
        self, model: Model, recipe: Recipe, output: Path, options: Any = None, *, adapter: Adapter | None = None
    ) -> Plan: ...


@dataclass(frozen=True)
class Foreign:
    """What is known about an artifact of this format that another program wrote."""

    family: str | None
    file: str | None
    words: list[str]


@dataclass(frozen=True)
class Target(Generic[C]):
    """One format.

    `recognises`: is a path an artifact of this format, whoever wrote it? `open` reads one back as a checkpoint. `plan`
    takes the target's own options, None for its defaults. `refuses` says why a model can't become this, None where it
    can. `checks` are read off the files; `explain` puts the rotation of an artifact into words, `foreign` that of one
    which another program wrote. `stored`: the reference computes with the weights in the artifact, not with the
    model's, because their types round. `checks` then get the artifact as `open` reads it, else None. `capability` names
    (`engines.capability.NAMED`) the most that its code can express, None for everything. `runtime` is the one whose
    report is the artifact's. `needs` are modules to run and write it, each with the extra that brings it, `reads_with`
    those to read it. `repairs`: a source whose own scaling is broken can be baked.
    """

    name: str
    title: str
    recognises: Callable[[Path], bool]
    plan: PlanFunction
    open: Callable[[Path], C]
    checks: Callable[[Path, C, Model, RopeSpec, BakeRecord], list[Row]]
    runtime: str
    stored: bool = False
    capability: str | None = None
    card: CardText | None = None
    refuses: Callable[[Model], str | None] = lambda model: None
    explain: Callable[[C], list[str]] = lambda checkpoint: []
    foreign: Callable[[Path], Foreign | None] = lambda path: None
    needs: tuple[tuple[str, str], ...] = ()
    reads_with: tuple[tuple[str, str], ...] = ()
    repairs: bool = False

    def record(self, window: int) -> BakeRecord:
        """What is assumed about an artifact without a manifest."""
        return BakeRecord(window, capability=self.capability)
