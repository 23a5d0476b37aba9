# SPDX-License-Identifier: Apache-2.0
"""How an artifact is verified: how its sessions are opened, and which cases they run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lrconvert.artifact.checks import Row
from lrconvert.checkpoint.folder_code import remedy
from lrconvert.errors import UnsupportedError
from lrconvert.families import ModelShape
from lrconvert.machine import gpu_memory
from lrconvert.parity.cases import CPU, GPU, GPU_FLOAT32, QUICK, Budget
from lrconvert.runtimes import runtime_for
from lrconvert.runtimes.backend import Backend, OpenOptions

Profile = Literal["quick", "full"]
PROFILES: tuple[Profile, ...] = ("quick", "full")
UNLIMITED = Budget(dense=2**31, decode=2**31, alone=2**31)
# Of a GPU's memory that the scores of a layer, or a cache, may take. Of an H200's 0.28 was taken by what passes there:
# 33,000 tokens of SmolLM2-135M's nine heads in float32.
ROOM = 0.3


@dataclass(frozen=True)
class Options(OpenOptions):
    """How to verify. `runtime`: a name of the registry, by default the target's own; `backends`: names of those to ask,
    None for all that the artifact has; `profile`: "quick" asks for one case on each side of every boundary and the far
    end, and looks for no likely mistakes; `full`: nothing is spread over a length or skipped; `files_only`: nothing is
    run, by a runtime or by the reference."""

    runtime: str | None = None
    backends: tuple[str, ...] | None = None
    profile: Profile = "full"
    full: bool = False
    files_only: bool = False
    records: bool = True  # the report and the digests go into the manifest
    most: int | None = None  # tokens of consecutive positions that the model has room for on the device

    @property
    def quick(self) -> bool:
        return self.profile == "quick"

    @property
    def budget(self) -> Budget:
        if self.full:
            return UNLIMITED
        if self.quick:
            return QUICK
        if self.device == "cpu":
            return CPU
        budget = GPU_FLOAT32 if self.dtype == "float32" else GPU
        return budget if self.most is None else budget.at_most(self.most)

    def fitted(self, shape: ModelShape) -> Options:
        """The same, with no more consecutive tokens than a model of this shape has room for on a GPU."""
        memory = gpu_memory(self.device) if self.device.startswith("cuda") else None
        return self if memory is None else replace(self, most=room(shape, int(ROOM * memory), self.dtype))


def room(shape: ModelShape, memory: int, dtype: str) -> int:
    """Tokens whose attention fits `memory` bytes: in float32 runtimes keep a layer's whole matrix of scores, in
    narrower types only keys and values, of all layers."""
    if dtype == "float32":
        return math.isqrt(memory // (4 * shape.heads))
    return memory // (2 * 2 * shape.layers * shape.kv_heads * shape.head_dim)


def chosen_backends(artifact: Path, target: str, options: Options) -> list[Backend]:
    """The backends to ask. `UsageError` for a runtime that does not run such artifacts."""
    return runtime_for(target, options.runtime).backends_of(artifact, options.backends)


def trusted_backends(artifact: Path, backends: list[Backend], options: OpenOptions) -> tuple[list[Backend], list[Row]]:
    """Those that run no code of strangers, and a `skipped` row for each of the others.

    `UnsupportedError` (exit code 4) where none is left.
    """
    reasons = _refusals(artifact, backends, options)
    asked = [backend for backend in backends if backend.name not in reasons]
    if backends and not asked:
        told = "; ".join(f"{name} code is not run: {reason}" for name, reason in reasons.items())
        raise UnsupportedError(f"{artifact}: {told}", remedy=remedy())
    return asked, _not_run(reasons)


def code_rows(artifact: Path, backends: list[Backend], options: OpenOptions) -> list[Row]:
    """A `skipped` row for each that would run code of strangers."""
    return _not_run(_refusals(artifact, backends, options))


def _refusals(artifact: Path, backends: list[Backend], options: OpenOptions) -> dict[str, str]:
    if options.trust_code:
        return {}
    return {backend.name: reason for backend in backends if (reason := backend.refuses(artifact)) is not None}


def _not_run(reasons: dict[str, str]) -> list[Row]:
    return [
        Row(name, "code of the folder", "skipped", reason=f"not run: {reason}. {remedy()}")
        for name, reason in reasons.items()
    ]
