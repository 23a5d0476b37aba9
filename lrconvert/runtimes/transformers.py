# SPDX-License-Identifier: Apache-2.0
"""The transformers runtime: native code, or the artifact's own with `trust_remote_code`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.checkpoint.folder_code import check_trusted, refuses_custom, refuses_native, stage
from lrconvert.engines.capability import CUSTOM_HF, native_hf
from lrconvert.runtimes.backend import Backend, OpenOptions, Runtime, computed_bytes
from lrconvert.runtimes.base import Interpreter, Scores, WorkerSession
from lrconvert.runtimes.tolerances import ANY, F16, Tolerance, float32_angles
from lrconvert.temporary import temporary_folder

WORKER = Path(__file__).with_name("transformers_worker.py")


class TransformersSession(WorkerSession):
    """A folder in transformers, which scores tokens by itself: logits stay in its process."""

    answers = frozenset({"behind"})
    staged: contextlib.ExitStack | None = None  # what it loaded, where that is not the folder itself

    def close(self) -> None:
        super().close()
        if self.staged is not None:
            self.staged.close()

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        return self._scores({"do": "score"}, rows, judged)

    def score_behind(self, prompt: Sequence[int], rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        return self._scores({"do": "behind", "prompt": [int(token) for token in prompt]}, rows, judged)

    def _scores(self, request: dict[str, Any], rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        plain = [[int(token) for token in row] for row in rows]
        answer = self._interpreter.ask({**request, "rows": plain, "judged": [int(count) for count in judged]})
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
    trust_code: bool = False,
) -> TransformersSession:
    """Load the artifact; `custom` runs the code in it, in the worker's process alone.

    Only our own code is run, from a folder that holds nothing else, unless `trust_code`: `UnsupportedError` for other
    code. `python` names another interpreter, to check the same artifact against another version of transformers;
    `interpreter` is one that already runs.
    """
    check_trusted(artifact, refuses_custom if custom else refuses_native, trust_code=trust_code)
    options = {"custom": custom, "device": device, "dtype": dtype, "threads": threads}
    with contextlib.ExitStack() as stack:  # what is staged goes away too where loading fails
        if custom and not trust_code:
            artifact = stage(artifact, stack.enter_context(temporary_folder()))
        options["artifact"] = str(artifact.resolve())
        session = TransformersSession(WORKER, options, python=python, interpreter=interpreter)
        session.staged = stack.pop_all()
    return session


def _open(custom: bool) -> Callable[[Path, OpenOptions], TransformersSession]:
    return lambda artifact, options: open_session(
        artifact,
        custom=custom,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        python=options.python,
        interpreter=options.interpreter,
        trust_code=options.trust_code,
    )


_FP64_ANGLES = "angles in float64: only float32 rounding of the arithmetic, at any position (measured up to 1.4e-10)"
_FP32_ANGLES = "6e-8 at 4k, 4e-3 at 1M on widened pico models, as predicted of float32 angles"
_BF16 = (
    "bfloat16 arithmetic, 8 bits of mantissa: 1e-4 on the embedded model, 5e-3 on SmolLM2-135M. It sees every "
    "mutant on the embedded model (a boundary off by one 1.4e-2), dropped start tokens only in the largest KL (0.19)"
)

CUSTOM_TOLERANCES = (
    Tolerance("float32", ANY, 1e-8, 1e-6, _FP64_ANGLES),
    Tolerance("bfloat16", ANY, 1e-2, 1e-1, _BF16),
    Tolerance("float16", ANY, 1e-3, 1e-2, F16),
)
NATIVE_TOLERANCES = (
    *float32_angles(_FP32_ANGLES),
    Tolerance("bfloat16", ANY, 1e-2, 5e-1, f"{_BF16}; 0.16 at most on a widened pico model"),
    Tolerance("float16", ANY, 1e-3, 5e-2, F16),
)

RUNTIME = Runtime(
    name="transformers",
    runs=("hf",),
    backends=(
        Backend(
            name="native",
            capability=lambda model: native_hf(model.family, model.shape),
            open=_open(custom=False),
            tolerances=NATIVE_TOLERANCES,
            refuses=refuses_native,
            angles="product",
            narrow=True,
            memory=computed_bytes,
        ),
        Backend(
            name="custom",
            capability=lambda model: CUSTOM_HF,
            open=_open(custom=True),
            tolerances=CUSTOM_TOLERANCES,
            refuses=refuses_custom,
            needs_key="auto_map",
            narrow=True,
            memory=computed_bytes,
        ),
    ),
    needs=(("torch", "hf"), ("transformers", "hf")),
)
