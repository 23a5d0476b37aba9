# SPDX-License-Identifier: Apache-2.0
"""Processes that need not import what takes seconds to import.

Importing torch and transformers costs some six seconds of CPU, and tests start hundreds of processes that do. Here they
are forked from one that has made the imports and done nothing else: as fresh as a process that starts, and nothing that
one of them does reaches another. What must hold for a process that really starts (which modules it imports, whether it
finds them, what it reads from its environment while it does) is tested on one that does, by `subprocess`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from support import fork_client

from lrconvert.runtimes import base, transformers

CAN_FORK = sys.platform.startswith("linux")  # elsewhere libraries do not survive it
SERVER = Path(__file__).with_name("fork_server.py")
ROOT = SERVER.parents[2]
FOLDER = "LRCONVERT_TEST_FORKS"  # names the folder of the servers' sockets, one for each test run
# What a worker of transformers imports before it opens an artifact, whatever that is; then, what a search imports.
TRANSFORMERS = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "transformers.dynamic_module_utils",
    "torch.distributed.fsdp",
    "sklearn.gaussian_process",
)
# What a command imports, as far as none of it looks at the environment.
COMMANDS = (
    "asyncio",
    "httpx",
    "httpx2",
    "rich.console",
    "rich.table",
    "safetensors.numpy",
    "torch",
    "tqdm.auto",
    "yaml",
    "lrconvert.cli.hf",
    "lrconvert.cli.inspect",
    "lrconvert.cli.push",
    "lrconvert.hub.publish",
    "lrconvert.targets.hf",
)


class Process:
    """A process that a `ForkServer` forked: the part of `subprocess.Popen` that is used."""

    def __init__(
        self,
        pid: int,
        status: IO[str],
        stdin: IO[str] | None = None,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr
        self.returncode: int | None = None
        self._status = status

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; the negative number of a signal."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """What it still writes to stdout and stderr, until it has ended."""
        assert self.stdout is not None and self.stderr is not None
        with ThreadPoolExecutor(1) as reader, self.stdout, self.stderr:
            error = reader.submit(self.stderr.read)
            return self.stdout.read(), error.result()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


_STARTED: list[subprocess.Popen[bytes]] = []  # servers of this process


def wait_for_servers() -> None:
    """Until those have ended that were started here; other processes of the test run may still use them."""
    for server in _STARTED:
        server.wait(timeout=600)


class ForkServer:
    """Started at the first request, by whichever process of the test run makes it; then it serves them all."""

    def __init__(self, command: Iterable[str], modules: Iterable[str], environment: Mapping[str, str]) -> None:
        asked = [*command, str(SERVER), *modules]
        name = hashlib.sha256(repr((asked, _read_early(environment))).encode()).hexdigest()[:16]
        self.path = Path(os.environ[FOLDER], name)
        self._command, self._environment = asked, environment
        self._connection: socket.socket | None = None

    def connect(self) -> socket.socket:
        """A connection to the server, which is started where there is none."""
        if self._connection is None:
            import fcntl  # not on Windows

            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    self._connection = fork_client.connect(str(self.path))
                except OSError:
                    self._start()
                    self._connection = fork_client.connect(str(self.path))
        return self._connection

    def _start(self) -> None:
        self.path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self.path))
            listener.listen()
            start = self._command.index(str(SERVER)) + 1
            server = subprocess.Popen(
                [*self._command[:start], str(listener.fileno()), *self._command[start:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=[listener.fileno()],
            )
        _STARTED.append(server)

    def start(self, stdin: int, stdout: int, stderr: int, **request: Any) -> tuple[int, IO[str]]:
        """The id of a process with these streams, and where its exit status will come."""
        return fork_client.start(self.connect(), (stdin, stdout, stderr), **request)

    def close(self) -> None:
        """The server ends with the last of those that it serves."""
        if self._connection is not None:
            self._connection.close()


# What a library may read while it is imported: where one of these differs, there is a server of its own. Of the names
# that begin so, the last ones say where the Hub is and who asks it: what looks at them while it is imported is in no
# list above, and a session is offline.
_READ_EARLY = ("CUDA", "HF_", "HUGGINGFACE_", "LD_", "MKL_", "OMP_", "PYTHON", "PYTORCH_", "TORCH", "TRANSFORMERS_")
_READ_LATE = {"HF_MODULES_CACHE", "HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_HUB_DISABLE_XET"}


def _read_early(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(
        (name, value) for name, value in environment.items() if name.startswith(_READ_EARLY) and name not in _READ_LATE
    )


# --- sessions ---------------------------------------------------------------------------------------------


class ForkedSessions:
    """In the place of the module `subprocess` in lrconvert.runtimes.base: transformers' workers are forked."""

    def __init__(self) -> None:
        self._servers: dict[tuple[Any, ...], ForkServer] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, command: list[str], **options: Any) -> Any:  # noqa: N802
        python, *rest = command
        if not CAN_FORK or rest != ["-I", str(transformers.WORKER)]:
            return subprocess.Popen(command, **options)
        environment = options["env"]
        server = self._server(python, environment)
        their_in, our_in = os.pipe()
        our_out, their_out = os.pipe()
        pid, status = server.start(
            their_in,
            their_out,
            options["stderr"].fileno(),
            script=rest[-1],
            environment=environment,
            folder=str(options["cwd"]),
        )
        os.close(their_in)
        os.close(their_out)
        return Process(pid, status, os.fdopen(our_in, "w"), os.fdopen(our_out))

    def prepare(self) -> None:
        """Start what sessions are forked from, for commands in other processes: it would end with the first of them."""
        if CAN_FORK:
            self._server(sys.executable, base.worker_environment(os.environ, Path(tempfile.gettempdir()))).connect()

    def run(
        self, python: str, code: str, *arguments: object, path: Iterable[Path], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """`python -c CODE ARGUMENTS…`, forked from what sessions with that interpreter are; `path`: where it imports
        from, besides what is installed."""
        if not CAN_FORK:
            there = {"PYTHONPATH": os.pathsep.join(map(str, path))}
            command = [python, "-c", code, *map(str, arguments)]
            return subprocess.run(command, capture_output=True, text=True, env={**environment, **there}, check=False)
        server = self._server(python, base.worker_environment(os.environ, Path(tempfile.gettempdir())))
        process = _started(server, code, arguments, environment, [str(each) for each in path])
        out, error = process.communicate()
        return subprocess.CompletedProcess([code, *map(str, arguments)], process.wait(), out, error)

    def _server(self, python: str, environment: Mapping[str, str]) -> ForkServer:
        key = (python, *_read_early(environment))
        if key not in self._servers:
            self._servers[key] = ForkServer([python, "-I"], TRANSFORMERS, environment)
        return self._servers[key]

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


# --- commands ---------------------------------------------------------------------------------------------


def _started(
    server: ForkServer, code: str, arguments: Iterable[object], environment: Mapping[str, str], path: list[str]
) -> Process:
    """Code in a process of a server, whose output can be read as it comes."""
    out, their_out = os.pipe()
    error, their_error = os.pipe()
    with Path(os.devnull).open() as nothing:
        pid, status = server.start(
            nothing.fileno(),
            their_out,
            their_error,
            code=code,
            arguments=[str(argument) for argument in arguments],
            environment=dict(environment),
            path=path,
        )
    os.close(their_out)
    os.close(their_error)
    return Process(pid, status, stdout=os.fdopen(out), stderr=os.fdopen(error))


MAIN = "from lrconvert.cli import main; main()"
# The same, where sessions of transformers are forked too.
MAIN_FORKING = f"""
import sys
sys.path.append({str(SERVER.parents[1])!r})
from support.forks import ForkedSessions
from lrconvert.runtimes import base
base.subprocess = ForkedSessions()
{MAIN}
"""


class ForkedCommands:
    """`python -c CODE ARGUMENTS…` in processes of their own, with modules imported: those that any command may need, or
    those of transformers, for commands that train."""

    def __init__(self, *, training: bool = False) -> None:
        command = [sys.executable, "-I"] if training else [sys.executable]
        self._path = ["", str(ROOT)] if training else []
        self._server = ForkServer(command, TRANSFORMERS if training else COMMANDS, dict(os.environ))

    def start(self, code: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Process:
        """The process, whose output can be read as it comes."""
        return _started(self._server, code, arguments, os.environ if environment is None else environment, self._path)

    def run(
        self, code: str, *arguments: object, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run(…, capture_output=True, text=True)`, which it is where nothing can be forked."""
        if not CAN_FORK:
            command = [sys.executable, "-c", code, *map(str, arguments)]
            return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        process = self.start(code, *arguments, environment=environment)
        out, error = process.communicate()
        return subprocess.CompletedProcess([code, *map(str, arguments)], process.wait(), out, error)

    def program(self, path: Path, code: str) -> Path:
        """An executable file that runs `code` in such a process: for a shell, or for a program that starts others."""
        if not CAN_FORK:
            path.write_text(f"#!{sys.executable}\n{code}\n")
        else:
            self._server.connect()
            call = shlex.join([sys.executable, "-I", "-S", fork_client.__file__, str(self._server.path)])
            extra = f"import sys; sys.path[:0] = {self._path!r}\n"
            path.write_text(f'#!/bin/sh\nexec {call} {shlex.quote(extra + code)} "$@"\n')
        path.chmod(0o755)
        return path

    def close(self) -> None:
        self._server.close()
