# SPDX-License-Identifier: Apache-2.0
"""The vLLM runtime, in an environment of its own; on its CPU build as well as on a GPU."""

from __future__ import annotations

from pathlib import Path

from lrconvert.engines.capability import VLLM
from lrconvert.runtimes.backend import Accepts, Backend, OpenOptions, Runtime
from lrconvert.runtimes.base import Interpreter, WorkerSession
from lrconvert.runtimes.tolerances import BF16_ENGINE, engine_tolerances

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


def _open(artifact: Path, options: OpenOptions) -> WorkerSession:
    return open_session(
        artifact,
        dtype=options.dtype,
        threads=options.threads,
        python=options.python,
        interpreter=options.interpreter,
    )


RUNTIME = Runtime(
    name="vllm",
    runs=("hf",),
    backends=(
        Backend(
            name="vllm",
            capability=lambda model: VLLM,
            open=_open,
            accepts=Accepts("none", reserved=1),  # it serves no prompt that leaves no room for one more token
            tolerances=engine_tolerances("4e-11 on pico models, 1.6e-9 on the embedded model at 4k", BF16_ENGINE),
            angles="product",
        ),
    ),
)
