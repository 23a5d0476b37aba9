# SPDX-License-Identifier: Apache-2.0
"""`parity.verify` for tests, which have options that the command line doesn't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from conftest import own_name

from lrconvert import parity
from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model
from lrconvert.parity import Options, Report
from lrconvert.recipe import Recipe
from lrconvert.runtimes import llama_cpp, onnxruntime, transformers
from lrconvert.runtimes.base import Interpreter
from lrconvert.targets import gguf, hf, onnx, target_of

WORKERS = {"hf": transformers.WORKER, "gguf": llama_cpp.WORKER, "onnx": onnxruntime.WORKER}
# The backends that ask an artifact of each target.
CODES = {"hf": ("native", "custom"), "gguf": ("llama.cpp",), "onnx": ("onnxruntime",)}


def baked(target: str, model: Model, recipe: Recipe, folder: Path, **more: Any) -> Path:
    """An artifact of a target in a folder, under a name that nothing there has; a GGUF in f32 by default."""
    output = own_name(folder / "a")
    if target == "hf":
        bake(hf.plan(model, recipe, output, hf.Options(**more)))
    elif target == "onnx":
        bake(onnx.plan(model, recipe, output, onnx.Options(**more)))
    else:
        output = output.with_suffix(".gguf")
        bake(gguf.plan(model, recipe, output, gguf.Options(**{"type": "f32", **more})))
    return output


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
