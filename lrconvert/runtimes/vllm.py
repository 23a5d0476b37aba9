# SPDX-License-Identifier: Apache-2.0
"""The vLLM runtime, in an environment of its own; on its CPU build as well as on a GPU."""

from __future__ import annotations

from pathlib import Path

from lrconvert.runtimes.base import Interpreter, WorkerSession

WORKER = Path(__file__).with_name("vllm_worker.py")


def open_session(
    artifact: Path,
    *,
    dtype: str = "float32",
    threads: int | None = None,
    python: str | None = None,
    interpreter: Interpreter | None = None,
) -> WorkerSession:
    """Load the artifact. `python` names an interpreter that has vLLM; `interpreter` is one that already runs.

    What vLLM runs on, a CPU or a GPU, is decided by the build that is installed.
    """
    options = {"artifact": str(artifact.resolve()), "dtype": dtype, "threads": threads}
    return WorkerSession(WORKER, options, python=python, interpreter=interpreter)
