# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out while something computes is the machine's matter: exit code 6, and no verdict on an artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result, recipe_for

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model
from lrconvert.errors import EnvironmentFailure, InputError, UsageError
from lrconvert.machine import within_memory
from lrconvert.parity import Options
from lrconvert.parity.verify import verify
from lrconvert.reference import Reference
from lrconvert.runtimes import base
from lrconvert.runtimes.base import Interpreter, WorkerSession
from lrconvert.shortage import is_shortage, told
from lrconvert.targets import hf

Cli = Callable[..., Result]
ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 5.38 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1012.31 MiB is "
    "free. Including non-PyTorch memory, this process has 47.03 GiB memory in use."
)
# A worker that loads, and whose libraries then find no memory: what PyTorch says on a GPU, and on this machine.
WORKER = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("worker_loop", {str(Path(base.__file__).with_name("worker_loop.py"))!r})
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)
class Worker:
    info = {{"device": "cpu"}}
    def __init__(self, request): ...
    def logits(self, request):
        import torch
        if request["rows"] == [[1]]:
            raise ValueError("a bad token")
        if request["rows"] == [[2]]:
            return {{"logits": torch.empty(2**60)}}
        raise torch.OutOfMemoryError({ON_A_GPU!r})
    generate = logits
loop.serve(Worker, "")
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return script


def raised_by(function: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        function()
    return caught.value


def test_libraries_have_their_own_words_for_it() -> None:
    """NumPy's and PyTorch's real errors on a CPU; the texts of those that can't be had here."""
    real = [raised_by(lambda: np.empty(2**57)), raised_by(lambda: torch.empty(2**60))]
    texts = [ON_A_GPU, "Failed to allocate memory for requested buffer of size 4294967296", "std::bad_alloc"]
    for error in [*real, MemoryError(), torch.OutOfMemoryError(""), *map(RuntimeError, texts)]:
        assert is_shortage(error), error
        assert told(error)
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("memory"), ValueError()):
        assert not is_shortage(error), error
    assert told(RuntimeError(ON_A_GPU)) == ON_A_GPU.partition(". Including")[0]


def test_only_that_becomes_the_machines_matter() -> None:
    """Other errors stay what they are, and so do ours that speak of memory."""
    for error in (ValueError("a bug"), UsageError("candidate 3 was out of memory")):
        with pytest.raises(type(error)) as caught, within_memory("a search", remedy="Use less"):
            raise error
        assert caught.value is error
    said = r"^a search ran out of memory: MemoryError\. Use less$"
    with pytest.raises(EnvironmentFailure, match=said), within_memory("a search", remedy="Use less"):
        raise MemoryError


def test_a_runtime_without_memory_refuses_no_artifact(worker: Path) -> None:
    with WorkerSession(worker, {}) as session:
        with pytest.raises(InputError, match="the runtime refuses the artifact: ValueError: a bad token"):
            session.logits([[1]], keep=[0])
        with pytest.raises(EnvironmentFailure, match="the runtime ran out of memory: "):
            session.logits([[2]], keep=[0])
        with pytest.raises(EnvironmentFailure, match=r"ran out of memory: CUDA .* 5\.38 GiB\..* is free\. Free memory"):
            session.logits([[3]], keep=[0])


@pytest.mark.parametrize("who", ["the runtime", "the reference"])
def test_verify_gives_no_verdict_then(
    who: str, worker: Path, pico: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither `fail` nor a traceback, and the report in the manifest stays the one that was there."""
    artifact = tmp_path / "a"
    bake(hf.plan(pico("llama"), recipe_for(pico("llama")), artifact))
    files = {path: path.read_bytes() for path in artifact.iterdir()}
    if who == "the reference":

        def no_room(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError(ON_A_GPU)

        monkeypatch.setattr(Reference, "_attend", no_room)
        options = Options()
    else:
        options = Options(interpreter=Interpreter(worker))
    with pytest.raises(EnvironmentFailure, match=f"{who} ran out of memory: CUDA out of memory"):
        verify(artifact, hf.TARGET, options=options)
    assert {path: path.read_bytes() for path in artifact.iterdir()} == files
    if options.interpreter is not None:
        options.interpreter.close()


def test_a_command_that_runs_out_of_memory_has_no_bug(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        np.empty(2**57)

    monkeypatch.setattr("lrconvert.api.inspecting.inspect", no_room)
    done = cli("inspect", "demo")
    assert done.code == 6, done.err
    assert "memory ran out: Unable to allocate" in done.err and "bug" not in done.err
