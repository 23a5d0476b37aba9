# SPDX-License-Identifier: Apache-2.0
"""What other programs do with a longrope config: one table of facts, each with its source.

`assess` checks a recipe against every row. Re-measure when versions move, and make the page again (`engines.page`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrconvert.engines import of_files, of_folders
from lrconvert.engines.engine import Engine, Verdict, verdict
from lrconvert.families import ModelShape
from lrconvert.rope import RopeSpec

ENGINES: tuple[Engine, ...] = (*of_folders.ROWS, *of_files.ROWS)


def assess(
    spec: RopeSpec, family: str, config: Mapping[str, Any] | None = None, shape: ModelShape | None = None
) -> list[Verdict]:
    """A verdict on every engine. With a `config` its keys are checked too; without one, those that `lrconvert hf`
    writes are assumed. `shape`: of the model, where it is known."""
    return [verdict(rows, spec, family, config, shape) for rows in _by_name().values()]


def _by_name() -> dict[str, list[Engine]]:
    found: dict[str, list[Engine]] = {}
    for engine in ENGINES:
        found.setdefault(engine.name, []).append(engine)
    return found
