# SPDX-License-Identifier: Apache-2.0
"""Recording a verification in the manifest of the artifact that was verified, and of no other.

    evidence = Evidence.of(artifact, manifest)    before its files are read
    evidence.record(report, digests, engine)      after the last check

A verification takes minutes. Meanwhile another conversion may have put a new artifact in the place of the one that was
opened, and another `verify` may have written its own report: the first must not get our report, the second must not
be lost. So the manifest is read again under the lock that conversions take, and only its report and its missing digests
change.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.artifact.manifest import EDITABLE, FILES, MANIFEST, FileRecord, Manifest, manifest_path
from lrconvert.artifact.staging import Staging
from lrconvert.errors import InputError, UsageError
from lrconvert.writing import replace_file

PATIENCE = 10  # seconds to wait for who holds the lock: another `verify` is done at once
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Evidence:
    """What an artifact was when its verification began: its manifest, and its files by size, time and place."""

    artifact: Path
    identity: str
    stamps: dict[str, Stamp]

    @classmethod
    def of(cls, artifact: Path, manifest: Manifest) -> Evidence:
        return cls(artifact, _identity(manifest), _stamps(manifest_path(artifact).parent, manifest))

    def changed(self) -> str | None:
        """What is no longer as it was when the verification began, in words; None where all of it is."""
        try:
            now = Manifest.read(self.artifact)
        except InputError as error:
            return error.message
        if _identity(now) != self.identity:
            return f"{manifest_path(self.artifact).name} is another artifact's now"
        stamps = _stamps(manifest_path(self.artifact).parent, now)
        names = sorted(name for name in {*stamps, *self.stamps} if stamps.get(name) != self.stamps.get(name))
        return f"{', '.join(names)} changed" if names else None

    def record(self, report: dict[str, Any] | None, files: dict[str, FileRecord], engine: str | None) -> str | None:
        """Write the report (None: the one that is there stays), and the digests in `files` that the manifest lacks.
        What `changed` says, where that kept anything from being written."""
        path = manifest_path(self.artifact)
        with contextlib.ExitStack() as stack:
            if not self._lock(stack):
                return "another lrconvert was writing to it"
            if (why := self.changed()) is not None:
                return why
            now = Manifest.read(self.artifact)
            for name, record in now.files.items():
                if (record.sha256 is None or name in EDITABLE) and name in files:
                    record.size, record.sha256 = files[name].size, files[name].sha256
            now.parity = now.parity if report is None else _recorded(now.parity, report, engine)
            written = path.stat()
            replace_file(path, now.to_json())
            if any(record.sha256 is None for record in now.files.values()):
                # What was edited after it was linked is known by that time alone, until a digest is there.
                os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))
        return None

    def _lock(self, stack: contextlib.ExitStack) -> bool:
        """Take the lock of conversions to this artifact; False where one of them keeps it. Where nobody can make it,
        nobody converts."""
        manifest = manifest_path(self.artifact)
        stem = manifest.name.removesuffix(f".{MANIFEST}")
        output = manifest.with_name(f"{stem}.gguf") if self.artifact.suffix in FILES else self.artifact.resolve()
        end = time.monotonic() + PATIENCE
        while not (taken := _taken(Staging(output), stack)) and time.monotonic() < end:
            time.sleep(0.05)
        return taken


def _taken(staging: Staging, stack: contextlib.ExitStack) -> bool:
    try:
        stack.enter_context(staging.locked())
    except UsageError:
        return False
    except OSError:  # nobody can write there
        return True
    return True


def _identity(manifest: Manifest) -> str:
    """What a verification leaves as it is."""
    kept = {key: value for key, value in vars(manifest).items() if key not in ("parity", "files", "bake")}
    return json.dumps([kept, vars(manifest.bake), sorted(manifest.files)], sort_keys=True)


def _stamps(folder: Path, manifest: Manifest) -> dict[str, Stamp]:
    """Of the files that nobody edits; those that are missing are left out."""
    found = {}
    for name in manifest.files:
        with contextlib.suppress(OSError):
            status = (folder / name).stat()
            if name not in EDITABLE:
                found[name] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def _recorded(earlier: dict[str, Any] | None, report: dict[str, Any], engine: str | None) -> dict[str, Any]:
    """What the manifest keeps: the report on the artifact's own codes, and the other engines' beside it."""
    engines = (earlier or {}).get("engines", {})
    if engine is None:
        return {**report, "engines": engines} if engines else report
    return {**(earlier or report), "engines": {**engines, engine: report}}
