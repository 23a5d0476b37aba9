# SPDX-License-Identifier: Apache-2.0
"""What a runtime says of itself: its backends, what each can express, which prompts it accepts, how exact it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lrconvert.checkpoint import Model, open_checkpoint
from lrconvert.checkpoint.base import read_json
from lrconvert.engines.capability import Capability
from lrconvert.errors import LrconvertError, UsageError, require
from lrconvert.machine import check_memory, size
from lrconvert.precision import ITEM_BYTES, short_name
from lrconvert.runtimes.base import Interpreter, Session
from lrconvert.runtimes.tolerances import Tolerance, tolerance_for


@dataclass(frozen=True)
class OpenOptions:
    """How to open a session. A runtime reads what concerns it.

    `device`: cpu, cuda, cuda:1 …; `dtype`: what is computed in, where the artifact leaves that open; `python`: the
    interpreter that runs the worker; `interpreter`: one that runs already, shared by several sessions; `library`: where
    libllama lies; `kv`: the type of llama.cpp's cache; `longest`: tokens of the longest prompt to expect; `trust_code`:
    whether code that a folder brings may run although it is not lrconvert's.
    """

    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    python: str | None = None
    interpreter: Interpreter | None = None
    library: str | None = None
    kv: str = "f32"
    longest: int | None = None
    trust_code: bool = False


@dataclass(frozen=True)
class Accepts:
    """Which prompts a backend accepts.

    `positions`: tokens at any positions, at consecutive ones wherever they start, or whole prompts only, one at a time
    ("none": no tokens spread over a length, no batch). `reserved`: tokens of the window that a prompt may not take.
    `padded`: rows of a batch may differ in length. `cached_keys`: decoding can go on with keys that were cached for
    another tier (its sessions answer "cached"). `shifts`: the oldest tokens of a full context can be forgotten.
    `decodes_anywhere`: the prompt that is decoded from may begin at any position (`start` of `generate`).
    """

    positions: Literal["any", "consecutive", "none"] = "any"
    reserved: int = 0
    padded: bool = True
    cached_keys: bool = False
    shifts: bool = True
    decodes_anywhere: bool = False


ANYTHING = Accepts()


# PyTorch's names of compute types whose every result is rounded, by the names that tolerances have for them.
NARROW = {"bfloat16": "bfloat16", "BF16": "bfloat16", "float16": "float16", "F16": "float16"}


@dataclass(frozen=True)
class Rounding:
    """What a program rounds besides the results of float32 products: angles, keys and values in a cache of "f32" or
    "f16", and what it multiplies weights with: to 8 bits in blocks of `activations` channels, 0 where it doesn't.
    `results`: the type of all that it computes, "float32" or a narrower one of PyTorch's."""

    angles: str
    cache: str = "f32"
    activations: int = 0
    results: str = "float32"

    @property
    def narrow(self) -> bool:
        """Whether all that it computes has fewer bits than float32."""
        return self.results != "float32"

    def __str__(self) -> str:
        parts = [self.results] if self.angles == "float64" or self.results != "float32" else []
        parts += [] if self.angles == "float64" else ["float32 angles"]
        parts += [f"a cache of {self.cache}"] if self.cache != "f32" else []
        parts += [f"activations of 8 bits in blocks of {self.activations}"] if self.activations else []
        return " and ".join(parts)


@dataclass(frozen=True)
class Backend:
    """A piece of code of a runtime that computes the rotation.

    `check` raises `UnsupportedError` for an artifact that it can't run on a device, before anything is loaded.
    `refuses`: why code that an artifact brings for it is not run unless the user vouches for it (`trust_code`), None
    where there is none or it is ours; its `open` raises `UnsupportedError` then.
    `needs_key`: a key of config.json without which an artifact has no such code. `exact_types`: compute types whose
    rounding is so small that a bound sees every mistake; None: all. `tolerances`: rows by compute type and length, the
    first that fits counts; each bound is chosen against the mistakes that it has to catch. `angles`: how it makes them,
    "float64" or a name of `reference.rotation.ROUNDED`; `cached`: whether `OpenOptions.kv` is the type of its cache;
    `activations`: how many channels share a scale where an artifact's products round them to 8 bits; `narrow`: whether
    every result has the compute type. What these cost, a case may be off beyond its row. `memory`: the least bytes that
    loading takes, 0 where files are mapped.
    """

    name: str
    capability: Callable[[Model], Capability]
    open: Callable[[Path, OpenOptions], Session]
    tolerances: tuple[Tolerance, ...]
    accepts: Accepts = ANYTHING
    check: Callable[[Path, OpenOptions], None] = lambda artifact, options: None
    refuses: Callable[[Path], str | None] = lambda artifact: None
    needs_key: str | None = None
    exact_types: tuple[str, ...] | None = None
    angles: Literal["float64", "product", "powers"] = "float64"
    cached: bool = False
    activations: Callable[[Path, OpenOptions], int] = lambda artifact, options: 0
    narrow: bool = False
    memory: Callable[[Path, OpenOptions], int] = lambda artifact, options: 0

    def check_memory(self, artifact: Path, options: OpenOptions) -> None:
        """`EnvironmentFailure` for weights that don't fit the device's memory, before anything is loaded."""

        def fits(has: int) -> str:
            narrow = self.memory(artifact, replace(options, dtype="bfloat16"))
            return f"--dtype bf16 takes {size(narrow)}" if narrow <= has and options.dtype != "bfloat16" else ""

        what = f"{artifact.name} in {self.name} code"
        check_memory(self.memory(artifact, options), what, device=options.device, fits=fits)

    def is_exact(self, dtype: str) -> bool:
        """Whether rounding in this compute type hides no mistake from a bound."""
        return self.exact_types is None or dtype in self.exact_types

    def rounding(self, artifact: Path, options: OpenOptions, dtype: str) -> Rounding:
        """How its arithmetic rounds in this artifact, with these options, in a compute type."""
        cache = options.kv if self.cached else "f32"
        results = NARROW.get(dtype, "float32") if self.narrow else "float32"
        return Rounding(self.angles, cache, self.activations(artifact, options), results)

    def tolerance(self, dtype: str, length: int) -> Tolerance:
        """How far from the reference a case of `length` tokens may be. `KeyError` for a type without a row."""
        return tolerance_for(self.tolerances, dtype, length, name=self.name)


def computed_bytes(artifact: Path, options: OpenOptions) -> int:
    """Of a folder's weights in the type that they are computed in. 0 for what can't be read: opening it says why."""
    try:
        tensors = open_checkpoint(artifact, tolerant=True).tensors.values()
    except LrconvertError:
        return 0
    return sum(math.prod(info.shape) for info in tensors) * ITEM_BYTES.get(options.dtype, 4)


@dataclass(frozen=True)
class Runtime:
    """A program that runs artifacts.

    `runs`: names of targets; `needs`: modules that this environment must have, each with the extra that brings it
    (none for a program in an environment of its own, which `OpenOptions.python` names). `fixed`: the artifact says what
    is computed in and how long a sequence gets.
    """

    name: str
    runs: tuple[str, ...]
    backends: tuple[Backend, ...]
    needs: tuple[tuple[str, str], ...] = ()
    fixed: bool = False

    def ignored(self, dtype: str | None) -> list[str]:
        """What a user has to know of a `dtype` that was asked for and means nothing here."""
        if dtype is None or not self.fixed:
            return []
        return [f"--dtype {short_name(dtype)} means nothing here: {self.name} computes in the types of the artifact"]

    @property
    def uses_torch(self) -> bool:
        """Whether a device is one of PyTorch's, in this environment."""
        return any(module == "torch" for module, _ in self.needs)

    def require(self, purpose: str) -> None:
        """`EnvironmentFailure` where a module is missing."""
        for module, extra in self.needs:
            require(module, extra, purpose)

    def check(self, names: Iterable[str]) -> None:
        """`UsageError` where one of `names` is no backend of this runtime."""
        own = [backend.name for backend in self.backends]
        for name in names:
            if len(own) == 1:
                raise UsageError(f"--code chooses among a runtime's backends; --runtime {self.name} has only one")
            if name not in own:
                raise UsageError(f"--runtime {self.name} has no {name} code", remedy=f"It has: {', '.join(own)}")

    def backends_of(self, artifact: Path, names: Collection[str] | None = None) -> list[Backend]:
        """Those that an artifact has, of `names` unless that is None. `UsageError` for a name that isn't one,
        `InputError` for a config that can't be read where a backend depends on it."""
        self.check(names or ())
        config = read_json(artifact / "config.json") if any(backend.needs_key for backend in self.backends) else {}
        there = [backend for backend in self.backends if backend.needs_key is None or backend.needs_key in config]
        return [backend for backend in there if names is None or backend.name in names]
