# SPDX-License-Identifier: Apache-2.0
"""Every file of a manifest: there, as long as it was, the same bytes.

Large files are read in a thread, while the runtime loads and answers: hashing releases the interpreter's lock, and both
read the same files.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lrconvert.artifact.checks import Row
from lrconvert.artifact.manifest import EDITABLE, MANIFEST, Manifest
from lrconvert.checkpoint.links import is_own
from lrconvert.checkpoint.source import sha256_of
from lrconvert.progress import BYTES, Progress, Step, silent

ASIDE_BYTES = 64 * 2**20  # smaller ones are hashed before a runtime has started


class _StoppedError(Exception):
    """Nobody wants the digests any more."""


class Integrity:
    """The check of a folder's files against its manifest, which gets the digests that it lacks and those of files that
    people may edit. `rows` waits for it."""

    def __init__(self, folder: Path, manifest: Manifest, progress: Progress) -> None:
        """Begins at once, in a thread where there are more than `ASIDE_BYTES`. Its progress is told while it is waited
        for: until then the runtime's is."""
        self._folder, self._manifest, self._progress = folder, manifest, progress
        self._total = sum(record.size for record in manifest.files.values())
        self._name, self._done = "", 0
        self._told, self._stopped = progress, False
        self._found: Future[list[Row]] = Future()
        if self._total > ASIDE_BYTES:
            self._told, pool = silent, ThreadPoolExecutor(1)
            self._found = pool.submit(self._check)
            pool.shutdown(wait=False)
        else:
            self._found.set_result(self._check())

    @property
    def done(self) -> bool:
        return self._found.done()

    def rows(self) -> list[Row]:
        """What was found. Waits for it."""
        self._told = self._progress
        return self._found.result()

    def stop(self) -> None:
        """Read no further."""
        self._stopped = True

    def _read(self, count: int) -> None:
        if self._stopped:
            raise _StoppedError
        self._done += count
        self._told(Step("checksums", self._name, self._done, self._total, BYTES))

    def _check(self) -> list[Row]:
        rows, folder = [], self._folder
        for name, record in sorted(self._manifest.files.items()):
            path, self._name = folder / name, name
            if not is_own(folder, path):
                rows.append(Row("files", name, "fail", reason=f"{name} is a link that leads out of the folder"))
            elif not path.is_file():
                rows.append(Row("files", name, "fail", reason=f"{name} is missing"))
            elif record.sha256 is None and _edited(path, folder):
                reason = f"{name} has changed since it was linked, and the source that it is a hard link of with it"
                rows.append(Row("files", name, "fail", reason=reason))
            elif name in EDITABLE:
                record.size, record.sha256 = path.stat().st_size, sha256_of(path, self._read)
            elif path.stat().st_size != record.size:
                reason = f"{name} has {path.stat().st_size} bytes; the manifest says {record.size}"
                rows.append(Row("files", name, "fail", reason=reason))
            elif (digest := sha256_of(path, self._read)) != (record.sha256 or digest):
                reason = f"{name} has changed since it was written{_shared(path)}"
                rows.append(Row("files", name, "fail", reason=reason))
            else:
                record.sha256 = digest
        if not rows:
            rows.append(Row("files", _counted(len(self._manifest.files)), "pass"))
        return rows


def _edited(path: Path, folder: Path) -> bool:
    """Whether a hard link that nobody has read yet was edited in place: no digest says so, but the manifest was written
    after it was linked. Copies of the folder are no links, and their times mean nothing."""
    status = path.stat()
    return status.st_nlink > 1 and status.st_mtime_ns > (folder / MANIFEST).stat().st_mtime_ns


def _shared(path: Path) -> str:
    return ", and so has every other hard link to it" if path.stat().st_nlink > 1 else ""


def _counted(files: int) -> str:
    return f"{files} file{'' if files == 1 else 's'}, sha256"
