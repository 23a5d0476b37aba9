# SPDX-License-Identifier: Apache-2.0
"""What a runtime is to lrconvert: a process of its own that returns logits.

A worker script runs in a fresh interpreter with nothing of lrconvert in it: it loads the artifact as a user's program
would. Parent and worker speak JSON lines; arrays travel as .npy files in a folder that goes away with the session.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from lrconvert.errors import EnvironmentFailure, InputError
from lrconvert.temporary import temporary_folder

LESS = "Free memory on the device, or ask for less: verify --profile quick, eval with shorter --lengths"


@dataclass(frozen=True)
class Scores:
    """Of the judged tokens of one row, in order: the loss of each in nats (float64), and whether it is the one that
    greedy decoding would have written there."""

    losses: np.ndarray
    preferred: np.ndarray


class Scoring(Protocol):
    """What evaluations need of a session."""

    info: dict[str, Any]  # versions, device, dtype, class: what answered
    answers: frozenset[str]  # what it answers beyond logits (`runtimes.answers`)

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        """How likely the last `judged[r]` tokens of row r are after the tokens before them (at least one)."""
        ...


class Session(Scoring, Protocol):
    """An artifact, loaded. Logits are float64 arrays here, regardless of the runtime's type."""

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


# What a worker gets of the environment: where programs and libraries are, how they compute, and no more. Prefixes end
# in an underscore.
_PASSED = (
    "COMSPEC", "CONDA_PREFIX", "LANG", "LANGUAGE", "LC_", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PATHEXT",
    "SYSTEMDRIVE", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "TZ", "VIRTUAL_ENV", "WINDIR",
    "CUBLAS_", "CUDA_", "CUDNN_", "DYLD_", "GGML_", "GOMP_", "HIP_", "HSA_", "KMP_", "METAL_", "MKL_", "MLX_", "NCCL_",
    "NUMEXPR_", "NVIDIA_", "OMP_", "OPENBLAS_", "ORT_", "PYTORCH_", "ROCM_", "ROCR_", "TORCH_", "VECLIB_", "VLLM_",
)  # fmt: skip
_SECRET = ("AUTH", "CREDENTIAL", "KEY", "PASS", "SECRET", "TOKEN")  # of no name that is passed
_OFFLINE = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def worker_environment(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """What a worker gets of `environment`: no token and no way to one, offline, `home` for whatever it stores."""

    def passed(name: str) -> bool:
        upper = name.upper()
        known = any(upper == each or (each.endswith("_") and upper.startswith(each)) for each in _PASSED)
        return known and not any(word in upper for word in _SECRET)

    own = ("HOME", "HF_HOME", "HF_MODULES_CACHE", "USERPROFILE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    places = dict.fromkeys(own, str(home)) | {"HF_MODULES_CACHE": str(home / "modules")}
    return {name: value for name, value in environment.items() if passed(name)} | _OFFLINE | places


class Interpreter:
    """A fresh Python process that runs a worker script, spoken to over pipes.

    A session starts one of its own. Several sessions may share one, one after the other: that saves the
    seconds that importing a runtime takes, where what they load is trusted not to disturb each other.
    """

    def __init__(self, script: Path, *, python: str | None = None) -> None:
        self._temporary = contextlib.ExitStack()
        self.folder = self._temporary.enter_context(temporary_folder())
        self._log = (self.folder / "log").open("w+")
        home = self.folder / "home"
        home.mkdir()
        python = python or sys.executable
        if Path(python).name != python:  # not a name on the PATH: relative to here, not to where the worker runs
            python = str(Path(python).absolute())  # not resolved: a virtual environment's python is a link
        self._process = subprocess.Popen(
            [python, "-I", str(script)],  # -I: nothing of ours on its path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=worker_environment(os.environ, home),
            cwd=home,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer. `EnvironmentFailure` when it died or lacks a module, a device or memory, `InputError`
        when the runtime raised."""
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
        if missing := answer.get("missing"):
            raise EnvironmentFailure(f"this check needs {missing}, which can't be imported", remedy=answer["remedy"])
        if reason := answer.get("no_device"):
            raise EnvironmentFailure(reason, remedy="Use --device cpu")
        if reason := answer.get("no_memory"):
            raise EnvironmentFailure(f"the runtime ran out of memory: {reason}", remedy=LESS)
        if error := answer.get("error"):
            raise InputError(f"the runtime refuses the artifact: {error}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self._process.wait()}"

    def array(self, name: str) -> np.ndarray:
        """An array that the worker left, as float64; its file goes away."""
        path = self.folder / name
        array = np.load(path, allow_pickle=False).astype(np.float64)
        path.unlink()
        return array

    def close(self) -> None:
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            with self._process.stdin as stdin:
                stdin.write('{"do": "end"}\n')  # a pipe that just closes means that this process is gone
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        self._temporary.close()


class WorkerSession(contextlib.AbstractContextManager["WorkerSession"]):
    """An artifact loaded by a worker: a `Session` over an `Interpreter`, its own unless one is given."""

    answers: frozenset[str] = frozenset()

    def __init__(
        self,
        script: Path,
        options: dict[str, Any],
        *,
        python: str | None = None,
        interpreter: Interpreter | None = None,
    ) -> None:
        self._interpreter = interpreter or Interpreter(script, python=python)
        self._owned = interpreter is None
        try:
            request = {"do": "open", "folder": str(self._interpreter.folder), **options}
            self.info: dict[str, Any] = self._interpreter.ask(request)
        except BaseException:
            self.close()
            raise

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        *,
        positions: Sequence[int] | None = None,
        keep: Sequence[int],
    ) -> list[np.ndarray]:
        request = {
            "do": "logits",
            "rows": [[int(token) for token in row] for row in rows],
            "positions": None if positions is None else [int(position) for position in positions],
            "keep": [int(index) for index in keep],
        }
        return list(self._interpreter.array(self._interpreter.ask(request)["logits"]))

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        return score_by_logits(self, rows, judged)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
        request = {"do": "generate", "prompt": [int(token) for token in prompt], "new_tokens": new_tokens}
        answer = self._interpreter.ask(request)
        return answer["tokens"], self._interpreter.array(answer["logits"])

    def close(self) -> None:
        if self._owned:
            self._interpreter.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def score_by_logits(session: Session, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
    """`Session.score` for what answers logits only, a row at a time."""
    found = []
    for row, count in zip(rows, judged, strict=True):
        # Logits at index i predict token i + 1.
        (logits,) = session.logits([row], keep=range(len(row) - count - 1, len(row) - 1))
        found.append(scores_of(logits, np.asarray(row[len(row) - count :], dtype=np.int64)))
    return found


def score_in_groups(
    prompt: Sequence[int],
    rows: Sequence[Sequence[int]],
    judged: Sequence[int],
    group_of: Callable[[int], int],
    logits: Callable[[int, list[list[int]], list[int]], np.ndarray],
) -> list[Scores]:
    """`AnswersBehind.score_behind` for a worker that reads a prompt once for every group of rows.

    `group_of` names the group of a prompt with its row by their tokens together, as a tier does. `logits` of (group,
    rows, judged) are those that predict the judged tokens, one row's behind the other's.

    Raises `ValueError` for a row without a token before the judged ones.
    """
    if wrong := [at for at, (row, count) in enumerate(zip(rows, judged, strict=True)) if not 0 < count < len(row)]:
        at = wrong[0]
        raise ValueError(
            f"row {at} has {len(rows[at])} tokens, of which {judged[at]} are judged: one must be before them"
        )
    groups: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault(group_of(len(prompt) + len(row)), []).append(at)
    found: dict[int, Scores] = {}
    for group, members in groups.items():
        plain, counts = [[int(token) for token in rows[at]] for at in members], [int(judged[at]) for at in members]
        parts = np.split(logits(group, plain, counts), np.cumsum(counts)[:-1])
        for at, row, part in zip(members, plain, parts, strict=True):
            found[at] = scores_of(part, np.asarray(row[len(row) - len(part) :], dtype=np.int64))
    return [found[at] for at in range(len(rows))]


def scores_of(logits: np.ndarray, targets: np.ndarray) -> Scores:
    """Of logits [n, v], each row of which predicts one of `targets` [n]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(targets)), targets]
    return Scores(losses, logits.argmax(axis=-1) == targets)
