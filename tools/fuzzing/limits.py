# SPDX-License-Identifier: Apache-2.0
"""What a reader may take and touch. Whatever goes beyond is raised as a `Trespass` where it happens.

Native code opens files without telling: a reader that hands it a name is seen by what it says, not here.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 10
MEMORY = 512 * 2**20  # beyond what the process has when it begins

_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn")
_NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto")
_CHANGES = {  # which of an event's arguments are names of what changes
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), (0,)),
    **{"os.rename": (0, 1), "os.link": (0, 1), "os.symlink": (1,), "shutil.rmtree": (0,)},
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Trespass(BaseException):
    """No `Exception`: nobody explains it away. `kind` is one of `KINDS`."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


KINDS = ("hang", "memory", "write outside", "read outside", "program", "network", "code")


class Watch:
    """Looks at every access of this process while it is on. It can't be taken away again, as Python has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve())
        own = (Path(__file__).parents[2], sys.prefix, sys.base_prefix, sys.exec_prefix)
        home = os.path.realpath(
            Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        )  # the Hub's client's
        self._readable = (
            self.folder,
            home,
            "/proc",
            "/dev/null",
            "/dev/urandom",
            "/sys",
            *(str(Path(place).resolve()) for place in own),
        )
        self.on = False
        self.seen: Trespass | None = None
        sys.addaudithook(self._look)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.seen, self.on = None, True
        try:
            yield
        finally:
            self.on = False
        if self.seen is not None:
            raise self.seen

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes):
                kind = "write outside" if isinstance(flags, int) and flags & _WRITES else "read outside"
                self._check(kind, path)
        elif event in _CHANGES:
            for index in _CHANGES[event]:
                if isinstance(arguments[index], str | bytes | os.PathLike):
                    self._check("write outside", arguments[index])
        elif event.startswith(_PROGRAMS):
            self._report("program", f"{event} {arguments!r:.200}")
        elif event in _NETWORK:
            self._report("network", f"{event} {arguments!r:.200}")
        elif event == "pickle.find_class" or (
            event == "exec" and self.folder in str(getattr(arguments[0], "co_filename", ""))
        ):
            self._report("code", f"{event} {arguments!r:.200}")

    def _check(self, kind: str, path: Any) -> None:
        self.on = False  # what is done here is not a reader's
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (OSError, ValueError):  # a name that no file can have
            return
        finally:
            self.on = True
        allowed = (self.folder, "/dev/null") if kind == "write outside" else self._readable
        if not any(real == place or real.startswith(f"{place}/") for place in allowed):
            self._report(kind, min(real, os.path.relpath(real, self.folder), key=len))

    def _report(self, kind: str, what: str) -> None:
        self.seen = self.seen or Trespass(kind, what)
        raise self.seen


def bound_memory(most: int = MEMORY) -> None:
    """This process gets no more memory than it has, and `most` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + most
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@contextlib.contextmanager
def at_most(seconds: float = SECONDS) -> Iterator[None]:
    """Raises where Python code takes longer. Native code is ended from outside (`hunting`)."""

    def late(number: int, frame: object) -> None:
        raise Trespass("hang", f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
