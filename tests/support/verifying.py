# SPDX-License-Identifier: Apache-2.0
"""`parity.verify` for tests, which have options that the command line doesn't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from lrconvert import parity
from lrconvert.parity import Options, Report
from lrconvert.runtimes import llama_cpp, onnxruntime, transformers
from lrconvert.runtimes.base import Interpreter
from lrconvert.targets import target_of

WORKERS = {"hf": transformers.WORKER, "gguf": llama_cpp.WORKER, "onnx": onnxruntime.WORKER}


def verify(artifact: Path, **keywords: Any) -> Report:
    """As `parity.verify`, with the target that the artifact has."""
    return parity.verify(artifact, target_of(artifact), **keywords)


@contextmanager
def options_by_target() -> Iterator[Callable[[str], Options]]:
    """Options for a target; one interpreter serves all artifacts of it."""
    with ExitStack() as running:
        started: dict[str, Interpreter] = {}

        def get(target: str) -> Options:
            if target not in started:
                started[target] = running.enter_context(closing(Interpreter(WORKERS[target])))
            return Options(threads=1, interpreter=started[target])

        yield get
