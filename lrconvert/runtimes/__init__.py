# SPDX-License-Identifier: Apache-2.0
"""The runtimes: programs that load an artifact, as a user would, and answer logits.

One file and one row a runtime. A row here names a module of this package, imported when the runtime is used; the
module says in `RUNTIME` what it runs and how. `register` adds a runtime that lives elsewhere.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lrconvert.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from lrconvert.runtimes.backend import Runtime

# Name: the module under lrconvert.runtimes, or the runtime itself. The first that runs a target is its own.
RUNTIMES: dict[str, str | Runtime] = {
    "transformers": "transformers",
    "mlx": "mlx",
    "llama.cpp": "llama_cpp",
    "onnxruntime": "onnxruntime",
    "vllm": "vllm",
}


def get_runtime(name: str) -> Runtime:
    """The runtime of that name. `UsageError` where there is none."""
    if name not in RUNTIMES:
        raise UsageError(f"no runtime is named {name}", remedy=f"Runtimes: {', '.join(RUNTIMES)}")
    row = RUNTIMES[name]
    return import_module(f"{__name__}.{row}").RUNTIME if isinstance(row, str) else row


def register(runtime: Runtime) -> None:
    """Add a runtime to the registry, for this process. `ValueError` where its name is taken."""
    if runtime.name in RUNTIMES:
        raise ValueError(f"a runtime named {runtime.name} is already registered")
    RUNTIMES[runtime.name] = runtime


def runtimes_of(target: str) -> list[Runtime]:
    """Those that run artifacts of a target; the first is the target's own."""
    return [runtime for runtime in map(get_runtime, RUNTIMES) if target in runtime.runs]


def runtime_for(target: str, name: str | None = None) -> Runtime:
    """The runtime of that name, by default the target's own. `UsageError` where it does not run such artifacts,
    `UnsupportedError` where none does."""
    able = runtimes_of(target)
    if not able:
        raise UnsupportedError(f"no runtime runs {target} artifacts", remedy="Register one that does")
    found = able[0] if name is None else get_runtime(name)
    if found not in able:
        names = ", ".join(runtime.name for runtime in able)
        raise UsageError(f"{found.name} does not run {target} artifacts", remedy=f"Runtimes that do: {names}")
    return found


def backend_choices() -> list[str]:
    """Names of backends among which there is a choice: those of runtimes that have several."""
    runtimes = [get_runtime(name) for name in RUNTIMES]
    return [backend.name for runtime in runtimes if len(runtime.backends) > 1 for backend in runtime.backends]


__all__ = ["RUNTIMES", "backend_choices", "get_runtime", "register", "runtime_for", "runtimes_of"]
