# SPDX-License-Identifier: Apache-2.0
"""The code that can run an artifact: one table of what each can express, what it can be asked, how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lrconvert.artifact.target import Target
from lrconvert.checkpoint import read_json
from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint
from lrconvert.engines.capability import CUSTOM_HF, LLAMA_CPP, MLX, ONNX, VLLM, Capability, native_hf
from lrconvert.errors import UnsupportedError, UsageError
from lrconvert.families import Family
from lrconvert.parity.cases import ANYTHING, CPU, GPU, GPU_FLOAT32, Asking, Budget
from lrconvert.runtimes import llama_cpp, mlx, onnxruntime, transformers, vllm
from lrconvert.runtimes.base import Interpreter, WorkerSession
from lrconvert.runtimes.llama_library import find_library

Kind = Literal["hf", "gguf", "onnx"]  # of artifacts: a folder, a file, a folder with a graph

# Types whose products are so exact that a bound sees every mistake, where types vary within a kind of artifact.
EXACT: dict[Kind, tuple[str, ...]] = {"gguf": ("F32",), "onnx": ("F32", "F16", "BF16")}
ALL_LAYERS = 999
UNLIMITED = Budget(dense=2**31, decode=2**31)


@dataclass(frozen=True)
class Options:
    """How to verify. `codes` of the artifact to ask (None: all); `full`: nothing is spread or skipped;
    `python`: the runtime's interpreter; `interpreter`: one that runs already, shared by all codes; `runtime`: one
    of `RUNTIMES`, by default the first that runs such artifacts; `library`: where libllama lies; `kv`: the type of
    llama.cpp's cache."""

    device: str = "cpu"
    dtype: str = "float32"
    codes: tuple[str, ...] | None = None
    full: bool = False
    python: str | None = None
    threads: int | None = None
    interpreter: Interpreter | None = None
    runtime: str | None = None
    library: str | None = None
    kv: str = "f32"

    @property
    def budget(self) -> Budget:
        return (
            UNLIMITED if self.full else CPU if self.device == "cpu" else GPU_FLOAT32 if self.dtype == "float32" else GPU
        )


@dataclass(frozen=True)
class Code:
    """A piece of code that can run an artifact: what it can express, by family, what it can be asked and how."""

    name: str
    runtime: str
    capability: Callable[[Family], Capability]
    open: Callable[[Path, Options], WorkerSession]
    asking: Asking = ANYTHING
    runs: Kind = "hf"
    needs: str | None = None  # a key of config.json without which the artifact has no such code

    def coarse(self, dtype: str) -> bool:
        """Whether the noise of its products may hide a small mistake from a bound."""
        return dtype not in EXACT.get(self.runs, (dtype,))


def _transformers(custom: bool) -> Callable[[Path, Options], WorkerSession]:
    return lambda artifact, options: transformers.open_session(
        artifact,
        custom=custom,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        python=options.python,
        interpreter=options.interpreter,
    )


def _mlx(artifact: Path, options: Options) -> WorkerSession:
    return mlx.open_session(artifact, dtype=options.dtype, python=options.python, interpreter=options.interpreter)


def _vllm(artifact: Path, options: Options) -> WorkerSession:
    return vllm.open_session(
        artifact,
        dtype=options.dtype,
        threads=options.threads,
        python=options.python,
        interpreter=options.interpreter,
    )


def _llama_cpp(artifact: Path, options: Options) -> WorkerSession:
    return llama_cpp.open_session(
        artifact,
        library=find_library(options.library),
        threads=options.threads,
        gpu_layers=0 if options.device == "cpu" else ALL_LAYERS,
        kv=options.kv,
        # In one call: on a GPU a prompt in several is computed less exactly.
        n_batch=None if options.device == "cpu" else options.budget.dense,
        python=options.python,
        interpreter=options.interpreter,
    )


def _onnxruntime(artifact: Path, options: Options) -> WorkerSession:
    stored = OnnxCheckpoint(artifact)
    refuse_device(stored.computing, stored.attention, options.device)
    return onnxruntime.open_session(
        artifact,
        boundaries=[tier.max_length for tier in stored.tiers[:-1]],
        heads=stored.heads,
        fused=stored.attention == "gqa",
        device=options.device,
        dtype=", ".join(sorted(stored.kinds)),
        threads=options.threads,
        python=options.python,
        interpreter=options.interpreter,
    )


def refuse_device(kind: str, attention: str, device: str) -> None:
    """What a device has no kernels for. Raises `UnsupportedError`."""
    if device == "cpu" and kind == "BF16":
        raise UnsupportedError("ONNX Runtime has no bfloat16 products on a CPU", remedy="Verify it with --device cuda")
    if device != "cpu" and attention == "gqa" and kind not in ("F16", "BF16"):
        raise UnsupportedError(
            "GroupQueryAttention has no float32 kernel on CUDA: it would run on the CPU",
            remedy="Convert with --attention standard, or with --dtype f16",
        )


CODES = (
    Code("native", "transformers", native_hf, _transformers(custom=False)),
    Code("custom", "transformers", lambda family: CUSTOM_HF, _transformers(custom=True), needs="auto_map"),
    Code("mlx", "mlx", lambda family: MLX, _mlx, Asking("none")),
    # vLLM serves no prompt that leaves no room for one more token.
    Code("llama.cpp", "llama.cpp", lambda family: LLAMA_CPP, _llama_cpp, Asking("run"), runs="gguf"),
    Code("onnxruntime", "onnxruntime", lambda family: ONNX, _onnxruntime, Asking(caches=True), runs="onnx"),
    Code("vllm", "vllm", lambda family: VLLM, _vllm, Asking("none", reserved=1)),
)
RUNTIMES = tuple(dict.fromkeys(code.runtime for code in CODES))


def codes_of(artifact: Path, target: Target, options: Options) -> list[Code]:
    """The codes that are to be asked. Raises `UsageError` for a runtime that does not run such artifacts."""
    able = [code for code in CODES if code.runs == target.name]
    runtime = options.runtime or target.runtime
    if runtime not in {code.runtime for code in able}:
        names = ", ".join(dict.fromkeys(code.runtime for code in able))
        raise UsageError(f"{runtime} does not run {artifact}", remedy=f"What does: {names}")
    config = read_json(artifact / "config.json") if any(code.needs for code in able) else {}
    chosen = [code for code in able if code.runtime == runtime and (code.needs is None or code.needs in config)]
    return [code for code in chosen if options.codes is None or code.name in options.codes]
