# SPDX-License-Identifier: Apache-2.0
"""The transformers runtime: native code, or the artifact's own with `trust_remote_code`."""

from __future__ import annotations

from pathlib import Path

from lrconvert.runtimes.base import Interpreter, WorkerSession

WORKER = Path(__file__).with_name("transformers_worker.py")


def open_session(
    artifact: Path,
    *,
    custom: bool,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    python: str | None = None,
    interpreter: Interpreter | None = None,
) -> WorkerSession:
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
    return WorkerSession(WORKER, options, python=python, interpreter=interpreter)
