# SPDX-License-Identifier: Apache-2.0
"""Writing artifacts: a staging folder beside the output, a manifest, an atomic publish.

    with Staging(output, force=…) as staging:
        staging.link_or_copy(source, name) / staging.copy(source, name)
        staging.write_bytes(name, data) / staging.create(name)
        staging.publish(manifest)

Whatever happens before `publish`, including `kill -9`, the output is what it was; the staging folder that
a kill leaves behind is removed by the next conversion to the same output. `publish` exchanges the folders
in one system call where the platform has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from lrconvert.artifact.hashing_file import HashingFile
from lrconvert.artifact.manifest import MANIFEST, FileRecord, Manifest
from lrconvert.checkpoint.source import COPY_BYTES
from lrconvert.errors import EnvironmentFailure, LrconvertError, UsageError
from lrconvert.writing import temporary_of


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that exists, and with `force` one that lrconvert did not write (exit code 2)."""
    with disk_errors(output):
        _check_output(output, force=force)


def _check_output(output: Path, *, force: bool) -> None:
    if not os.path.lexists(output) or (_is_folder(output) and not any(output.iterdir())):
        return
    if not force:
        raise UsageError(f"{output} exists", remedy="Choose another name, or replace it with --force")
    if not _is_folder(output) or not (output / MANIFEST).is_file():
        raise UsageError(
            f"{output} was not written by lrconvert (it has no {MANIFEST})",
            remedy="--force replaces only artifacts; move it away first",
        )
    known = {*Manifest.read(output).files, MANIFEST, temporary_of(output / MANIFEST).name}
    present = {str(path.relative_to(output)) for path in output.rglob("*") if not _is_folder(path)}
    if foreign := sorted(present - known):
        raise UsageError(
            f"{output} holds files that lrconvert did not write: {', '.join(foreign)}",
            remedy="Move them away first; --force replaces only what lrconvert wrote",
        )


def _is_folder(path: Path) -> bool:
    """A folder itself; the target of a link is not ours."""
    return path.is_dir() and not path.is_symlink()


class Staging(contextlib.AbstractContextManager["Staging"]):
    """A folder that becomes the artifact, or vanishes."""

    def __init__(self, output: Path, *, force: bool = False, link: bool | None = None) -> None:
        """`link`: True demands hard links, False forbids them, None takes them where they work."""
        self.output, self.force, self.link = output.absolute(), force, link
        self.folder = self.output.with_name(f".{self.output.name}.lrconvert-staging")
        self._lock_path = self.output.with_name(f".{self.output.name}.lrconvert-lock")
        self._lock: IO[str] | None = None
        self._new_parents: list[Path] = []
        self.files: dict[str, FileRecord] = {}

    def __enter__(self) -> Staging:
        self.check()
        with disk_errors(self.output):
            self._new_parents = [parent for parent in self.output.parents if not parent.exists()]
            self.output.parent.mkdir(parents=True, exist_ok=True)
            while not self._acquire():
                pass
            try:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir()
            except OSError:
                self._release()
                raise
        return self

    def check(self) -> None:
        """Refuse an output that may not be replaced."""
        check_output(self.output, force=self.force)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The output's name, for who changes an artifact in its place. `UsageError` where somebody writes it anew."""
        while not self._acquire():
            pass
        try:
            yield
        finally:
            self._release()

    def _acquire(self) -> bool:
        """Lock the output's name; False when the file was removed by its last owner while we took it."""
        lock = self._lock_path.open("a")  # never truncates what a link of this name may point to
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.close()
                raise UsageError(
                    f"{self.output} is being written by another lrconvert",
                    remedy="Wait for it, or choose another name",
                ) from error
        if not self._lock_path.exists() or not os.path.samestat(os.fstat(lock.fileno()), self._lock_path.stat()):
            lock.close()
            return False
        self._lock = lock
        return True

    def _release(self) -> None:
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        if not self.output.exists():
            for parent in self._new_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()
        if isinstance(error, OSError):
            raise _as_failure(error, self.output) from error

    def _path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_bytes(self, name: str, data: bytes) -> None:
        """A small file."""
        with self.create(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[HashingFile]:
        """A file to stream into; hashed on the way, on disk when the block ends."""
        with self._path(name).open("wb") as raw, HashingFile(raw) as file:
            yield file
            file.finish()
        self.files[name] = FileRecord(file.size, file.sha256.hexdigest())

    def link_or_copy(self, source: Path, name: str, done: Callable[[int], None] | None = None) -> None:
        """The same bytes under a new name: a hard link on one file system, else a copy. `done` counts them."""
        real = source.resolve(strict=True)  # a Hub cache holds links to blobs
        if self.link is not False:
            try:
                os.link(real, self._path(name))
                size = real.stat().st_size
                self.files[name] = FileRecord(size, None, linked=True)
                if done is not None:
                    done(size)
                return
            except OSError as error:
                if self.link:
                    raise UsageError(
                        f"{name}: can't be hard linked ({error.strerror})",
                        remedy="Omit --link, or use --copy",
                    ) from error
        self.copy(real, name, done)

    def copy(self, source: Path, name: str, done: Callable[[int], None] | None = None) -> None:
        """The same bytes in a file of its own. `done` counts them."""
        with source.open("rb") as reader, self.create(name) as writer:
            while part := reader.read(COPY_BYTES):
                writer.write(part)
                if done is not None:
                    done(len(part))

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and put the folder in the output's place, all at once."""
        self._write_manifest(manifest, MANIFEST)
        if not self.output.exists() or not _exchange(self.folder, self.output):
            _replace_in_steps(self.folder, self.output)
        sync(self.output.parent)

    def _write_manifest(self, manifest: Manifest, name: str) -> None:
        manifest.files = self.files
        path = self._path(name)
        path.write_text(manifest.to_json(), encoding="utf-8")
        for place in (path, self.folder):
            sync(place)
        self.check()  # another process may have written there meanwhile


def sync(path: Path) -> None:
    """What is written at `path` is on the disk when this returns."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, old: Path) -> bool:
    """Swap two folders in one step (Linux: renameat2 with RENAME_EXCHANGE); False where that is not available."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return rename is not None and rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0


def _replace_in_steps(new: Path, old: Path) -> None:
    """Without an exchange: the old artifact steps aside for a moment, and comes back if the rename fails."""
    aside = old.with_name(f".{old.name}.lrconvert-old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        if aside.exists():
            aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """What the file system refuses inside becomes an `EnvironmentFailure` about `output`."""
    try:
        yield
    except OSError as error:
        raise _as_failure(error, output) from error


def _as_failure(error: OSError, output: Path) -> LrconvertError:
    """A full disk, a folder without write access and the like: exit code 6, nothing left behind."""
    where = error.filename or output
    return EnvironmentFailure(f"{where}: {error.strerror or error}; nothing was written to {output}")
