# SPDX-License-Identifier: Apache-2.0
"""How an artifact is verified: how its sessions are opened, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lrconvert.checkpoint.onnx_folder import GRAPH
from lrconvert.parity.cases import CPU, GPU, GPU_FLOAT32, Budget
from lrconvert.runtimes import runtime_for
from lrconvert.runtimes.backend import Backend, OpenOptions

Kind = Literal["hf", "gguf", "onnx"]  # of artifacts: a folder, a file, a folder with a graph

UNLIMITED = Budget(dense=2**31, decode=2**31)


@dataclass(frozen=True)
class Options(OpenOptions):
    """How to verify. `runtime`: a name of the registry, by default the target's own; `backends`: names of those to ask,
    None for all that the artifact has; `full`: nothing is spread over a length or skipped."""

    runtime: str | None = None
    backends: tuple[str, ...] | None = None
    full: bool = False

    @property
    def budget(self) -> Budget:
        if self.full:
            return UNLIMITED
        if self.device == "cpu":
            return CPU
        return GPU_FLOAT32 if self.dtype == "float32" else GPU


def kind_of(artifact: Path) -> Kind:
    """A GGUF file by its name, a folder by what lies in it."""
    if artifact.suffix == ".gguf" and not artifact.is_dir():
        return "gguf"
    return "onnx" if (artifact / GRAPH).is_file() and not any(artifact.glob("*.safetensors")) else "hf"


def own_runtime(kind: Kind) -> str:
    """The one whose report is the artifact's; those of others stand beside it."""
    return runtime_for(kind).name


def chosen_backends(artifact: Path, options: Options) -> list[Backend]:
    """The backends to ask. `UsageError` for a runtime that does not run such artifacts."""
    return runtime_for(kind_of(artifact), options.runtime).backends_of(artifact, options.backends)
