# SPDX-License-Identifier: Apache-2.0
"""What a runtime is to lrconvert: something in a process of its own that answers logits.

A runtime is one file here with an `open_session`, and a worker script that runs in a fresh interpreter with
nothing of lrconvert in it: it loads the artifact as a user's program would. Parent and worker speak JSON
lines; arrays travel as .npy files in a folder that goes away with the session.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from lrconvert.errors import EnvironmentFailure, InputError


class Session(Protocol):
    """An artifact, loaded. Logits are float64 arrays here, whatever the runtime computed in."""

    info: dict[str, Any]  # versions, device, dtype, class: what answered

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        *,
        positions: Sequence[int] | None = None,
        keep: Sequence[int],
    ) -> list[np.ndarray]:
        """One forward pass over a batch, rows of unequal length padded on the left.

        `keep` are indices into every row (negative: from its end); one array [len(keep), vocabulary] a row.
        `positions` replace 0 … n−1, for a single row.
        """
        ...

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
        """Greedy decoding with the runtime's own cache: the new tokens and the logits that chose each."""
        ...

    def close(self) -> None: ...


class WorkerSession:
    """A worker script in an interpreter of its own, spoken to over pipes."""

    def __init__(self, script: Path, options: dict[str, Any], *, python: str | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lrconvert-runtime-")
        self._log = (Path(self._folder.name) / "log").open("w+")
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(Path(self._folder.name) / "modules"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        # -P where the interpreter knows it would be enough; -I also keeps PYTHONPATH and user site out.
        self._process = subprocess.Popen(
            [python or sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        try:
            self.info: dict[str, Any] = self._ask({"do": "open", "folder": self._folder.name, **options})
        except BaseException:
            self.close()
            raise

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EnvironmentFailure(f"the runtime's process ended: {self._last_words()}")
        answer = json.loads(line)
        if answer.get("missing"):
            raise EnvironmentFailure(
                f"this check needs {answer['missing']}, which can't be imported",
                remedy="pip install 'lrconvert[hf]'",
            )
        if answer.get("error"):
            raise InputError(f"the runtime refuses the artifact: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self._process.poll()}"

    def _array(self, answer: dict[str, Any], name: str) -> np.ndarray:
        path = Path(self._folder.name) / answer[name]
        array = np.load(path, allow_pickle=False).astype(np.float64)
        path.unlink()
        return array

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        *,
        positions: Sequence[int] | None = None,
        keep: Sequence[int],
    ) -> list[np.ndarray]:
        answer = self._ask({
            "do": "logits",
            "rows": [[int(token) for token in row] for row in rows],
            "positions": None if positions is None else [int(position) for position in positions],
            "keep": [int(index) for index in keep],
        })  # fmt: skip
        return list(self._array(answer, "logits"))

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
        answer = self._ask({
            "do": "generate", "prompt": [int(token) for token in prompt], "new_tokens": new_tokens
        })  # fmt: skip
        return answer["tokens"], self._array(answer, "logits")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> WorkerSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
