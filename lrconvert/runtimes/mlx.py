# SPDX-License-Identifier: Apache-2.0
"""The mlx-lm runtime, in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from lrconvert.checkpoint.folder_code import check_trusted, refuses_mlx
from lrconvert.engines.capability import MLX
from lrconvert.runtimes.backend import Accepts, Backend, OpenOptions, Runtime
from lrconvert.runtimes.base import Interpreter, WorkerSession
from lrconvert.runtimes.tolerances import BF16_ENGINE, engine_tolerances

WORKER = Path(__file__).with_name("mlx_worker.py")


def open_session(
    artifact: Path, *, dtype: str = "float32", python: str | None = None, interpreter: Interpreter | None = None
) -> WorkerSession:
    """Load the artifact. `python` names an interpreter that has mlx-lm; `interpreter` is one that already runs."""
    options = {"artifact": str(artifact.resolve()), "dtype": dtype}
    return WorkerSession(WORKER, options, python=python, interpreter=interpreter)


def _open(artifact: Path, options: OpenOptions) -> WorkerSession:
    check_trusted(artifact, refuses_mlx, trust_code=options.trust_code)
    return open_session(artifact, dtype=options.dtype, python=options.python, interpreter=options.interpreter)


RUNTIME = Runtime(
    name="mlx",
    runs=("hf",),
    backends=(
        Backend(
            name="mlx",
            capability=lambda model: MLX,
            open=_open,
            refuses=refuses_mlx,
            accepts=Accepts("none"),
            tolerances=engine_tolerances("9e-11 on pico models, 1.6e-9 on the embedded model at 4k", BF16_ENGINE),
            angles="product",
        ),
    ),
)
