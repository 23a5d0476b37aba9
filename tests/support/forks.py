# SPDX-License-Identifier: Apache-2.0
"""Processes that need not import what takes seconds to import.

Importing torch and transformers costs some six seconds of CPU, and tests start hundreds of processes that do. Here they
are forked from one that has made the imports and done nothing else: as fresh as a process that starts, and nothing that
one of them does reaches another. What must hold for a process that really starts (which modules it imports, whether it
finds them, what it reads from its environment while it does) is tested on one that does, by `subprocess`.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from lrconvert.runtimes import transformers

CAN_FORK = sys.platform.startswith("linux")  # elsewhere libraries do not survive it
SERVER = Path(__file__).with_name("fork_server.py")
# What a worker of transformers imports before it opens an artifact, whatever that is.
TRANSFORMERS = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "transformers.dynamic_module_utils",
)
# What a command imports, as far as none of it looks at the environment.
COMMANDS = (
    "asyncio",
    "httpx",
    "httpx2",
    "rich.console",
    "rich.table",
    "safetensors.numpy",
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


class ForkServer:
    """Started at the first request."""

    def __init__(self, command: Iterable[str], modules: Iterable[str], environment: Mapping[str, str]) -> None:
        self._connection, theirs = socket.socketpair()
        self._server = subprocess.Popen(
            [*command, str(SERVER), str(theirs.fileno()), *modules],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def start(self, stdin: int, stdout: int, stderr: int, **request: Any) -> tuple[int, IO[str]]:
        """The id of a process with these streams, and where its exit status will come."""
        read, report = os.pipe()
        descriptors = array.array("i", [stdin, stdout, stderr, report])
        message = json.dumps({"folder": str(Path.cwd()), "arguments": [], **request}).encode()
        self._connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        os.close(report)
        status = os.fdopen(read)
        return int(status.readline()), status

    def close(self) -> None:
        self._connection.close()
        self._server.wait(timeout=20)


# --- sessions ---------------------------------------------------------------------------------------------

# What a library may read while it is imported: where one of these differs, there is a server of its own.
_READ_EARLY = ("CUDA", "HF_", "HUGGINGFACE_", "LD_", "MKL_", "OMP_", "PYTHON", "PYTORCH_", "TORCH", "TRANSFORMERS_")


class ForkedSessions:
    """In the place of the module `subprocess` in lrconvert.runtimes.base: transformers' workers are forked."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, ...], ForkServer] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, command: list[str], **options: Any) -> Any:  # noqa: N802
        python, *rest = command
        if not CAN_FORK or rest != ["-I", str(transformers.WORKER)]:
            return subprocess.Popen(command, **options)
        environment = options["env"]
        early = sorted(
            f"{name}={value}"
            for name, value in environment.items()
            if name.startswith(_READ_EARLY) and name != "HF_MODULES_CACHE"
        )
        key = (python, *early)
        if key not in self._servers:
            self._servers[key] = ForkServer([python, "-I"], TRANSFORMERS, environment)
        their_in, our_in = os.pipe()
        our_out, their_out = os.pipe()
        pid, status = self._servers[key].start(
            their_in, their_out, options["stderr"].fileno(), script=rest[-1], environment=environment
        )
        os.close(their_in)
        os.close(their_out)
        return Process(pid, status, os.fdopen(our_in, "w"), os.fdopen(our_out))

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


# --- commands ---------------------------------------------------------------------------------------------


class ForkedCommands:
    """`python -c CODE ARGUMENTS…` in processes of their own, with `modules` imported."""

    def __init__(self, modules: Iterable[str] = COMMANDS) -> None:
        self._modules = modules
        self._server: ForkServer | None = None

    def start(self, code: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Process:
        """The process, whose output can be read as it comes."""
        if self._server is None:
            self._server = ForkServer([sys.executable], self._modules, dict(os.environ))
        out, their_out = os.pipe()
        error, their_error = os.pipe()
        with Path(os.devnull).open() as nothing:
            pid, status = self._server.start(
                nothing.fileno(),
                their_out,
                their_error,
                code=code,
                arguments=[str(argument) for argument in arguments],
                environment=dict(os.environ if environment is None else environment),
            )
        os.close(their_out)
        os.close(their_error)
        return Process(pid, status, stdout=os.fdopen(out), stderr=os.fdopen(error))

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

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
