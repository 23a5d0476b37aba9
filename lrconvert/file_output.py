# SPDX-License-Identifier: Apache-2.0
"""Writing artifacts that are files in somebody's folder: a GGUF or its parts, a Modelfile, the manifest beside them.

    with FileStaging(output, names, force=…) as staging:
        with staging.create(name) as file: …
        staging.publish(manifest)

Files can't be exchanged together in one step as folders can. They are complete and on disk in a staging folder
before the first of them moves; the folder's new name then says that they are being published, and the next
conversion to the same output finishes that where a kill came between. The first of `names` is the one that a
program opens. Where there are several it is taken away first and put in its place last, so that no program ever
loads a mixture of old and new parts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from lrconvert.errors import InputError, UsageError
from lrconvert.output import Manifest, Staging, disk_errors, manifest_path, sync

_ORDER = ".order.json"  # in the staging folder: the files' names, in the order of `names`


class FileStaging(Staging):
    """Files that become an artifact together, or vanish."""

    def __init__(self, output: Path, names: Sequence[str], *, force: bool = False) -> None:
        """`output` as the user named it, which names the manifest and the lock; `names` of the files to come."""
        super().__init__(output, force=force)
        self.names = tuple(names)
        self._manifest = manifest_path(self.output)
        self._publishing = self.output.with_name(f".{self.output.name}.lrconvert-publishing")

    def check(self) -> None:
        check_files(self.output, self.names, force=self.force)

    def __enter__(self) -> FileStaging:
        if self._publishing.is_dir():
            with disk_errors(self.output):
                self._finish()
        super().__enter__()
        return self

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and put all files in their places."""
        self._path(_ORDER).write_text(json.dumps(self.names), encoding="utf-8")
        self._write_manifest(manifest, self._manifest.name)
        shutil.rmtree(self._publishing, ignore_errors=True)
        self.folder.rename(self._publishing)
        sync(self.output.parent)
        self._finish()

    def _finish(self) -> None:
        """Move what lies in the publishing folder, whole, to where it belongs. May run again after a kill."""
        folder = self._publishing
        names = json.loads((folder / _ORDER).read_text(encoding="utf-8"))
        place = self.output.parent
        if len(names) > 1 and (folder / names[0]).exists():
            (place / names[0]).unlink(missing_ok=True)
        for old in _written(self._manifest) - set(names):
            (place / old).unlink(missing_ok=True)
        for name in (*reversed(names), self._manifest.name):
            if (folder / name).exists():
                (folder / name).replace(place / name)
        sync(place)
        shutil.rmtree(folder)


def check_files(output: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuse to write where files are already, and with `force` where lrconvert did not write them (exit code 2)."""
    with disk_errors(output):
        manifest = manifest_path(output)
        present = [name for name in (*names, manifest.name) if os.path.lexists(output.parent / name)]
        if not present:
            return
        listed = ", ".join(str(output.parent / name) for name in present[:4])
        if not force:
            raise UsageError(f"{listed} exists", remedy="Choose another name, or replace it with --force")
        foreign = set(present) - _written(manifest) - {manifest.name}
        if foreign:
            raise UsageError(
                f"{', '.join(sorted(foreign))} was not written by lrconvert ({manifest} does not name it)",
                remedy="--force replaces only artifacts; move it away yourself",
            )


def _written(manifest: Path) -> set[str]:
    """Names of the files that a manifest lists: plain names in its folder, nothing else is ever touched."""
    if not manifest.is_file():
        return set()
    artifact = manifest.with_name(manifest.name.removesuffix(".lrconvert.json") + ".gguf")
    names = set(Manifest.read(artifact).files)
    if odd := [name for name in names if Path(name).name != name]:
        raise InputError(f"{manifest}: names files outside its folder: {', '.join(sorted(odd))}")
    return names
