# SPDX-License-Identifier: Apache-2.0
"""The transformers runtime: native code, or the artifact's own with `trust_remote_code`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrconvert.runtimes.base import Interpreter, Scores, WorkerSession

WORKER = Path(__file__).with_name("transformers_worker.py")


class TransformersSession(WorkerSession):
    """A folder in transformers, which scores tokens by itself: logits stay in its process."""

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        plain = [[int(token) for token in row] for row in rows]
        answer = self._interpreter.ask({"do": "score", "rows": plain, "judged": [int(count) for count in judged]})
        losses, preferred = (self._interpreter.array(answer[name]) for name in ("losses", "preferred"))
        ends = np.cumsum(judged)[:-1]
        parts = zip(np.split(losses, ends), np.split(preferred, ends), strict=True)
        return [Scores(row, chosen.astype(bool)) for row, chosen in parts]


def open_session(
    artifact: Path,
    *,
    custom: bool,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    python: str | None = None,
    interpreter: Interpreter | None = None,
) -> TransformersSession:
    """Load the artifact; `custom` runs the code that lies in it, in the worker's process alone.

    `python` names another interpreter, to check the same artifact against another version of transformers;
    `interpreter` is one that already runs.
    """
    options = {
        "artifact": str(artifact.resolve()),
        "custom": custom,
        "device": device,
        "dtype": dtype,
        "threads": threads,
    }
    return TransformersSession(WORKER, options, python=python, interpreter=interpreter)
