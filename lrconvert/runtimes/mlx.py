# SPDX-License-Identifier: Apache-2.0
"""The mlx-lm runtime, in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from lrconvert.runtimes.base import Interpreter, WorkerSession

WORKER = Path(__file__).with_name("mlx_worker.py")


def open_session(
    artifact: Path, *, dtype: str = "float32", python: str | None = None, interpreter: Interpreter | None = None
) -> WorkerSession:
    """Load the artifact. `python` names an interpreter that has mlx-lm; `interpreter` is one that already runs."""
    options = {"artifact": str(artifact.resolve()), "dtype": dtype}
    return WorkerSession(WORKER, options, python=python, interpreter=interpreter)
