# SPDX-License-Identifier: Apache-2.0
"""Writing artifacts that are files in an existing folder: a GGUF or its parts, a Modelfile, the manifest beside them.

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

from lrconvert.artifact.manifest import MANIFEST, Manifest, manifest_path
from lrconvert.artifact.staging import Staging, disk_errors, sync
from lrconvert.errors import EnvironmentFailure, InputError, UsageError
from lrconvert.writing import temporary_of

_ORDER = ".order.json"  # in the staging folder: the files' names, in the order of `names`


class FileStaging(Staging):
    """Files that become an artifact together, or vanish."""

    def __init__(self, output: Path, names: Sequence[str], *, force: bool = False) -> None:
        """`output` as the user named it, which names the manifest and the lock; `names` of the files to come."""
        super().__init__(output, force=force)
        self.names = tuple(names)
        self._manifest = manifest_path(self.output)
        self._publishing = _publishing(self.output)

    def check(self) -> None:
        check_files(self.output, self.names, force=self.force)

    def __enter__(self) -> FileStaging:
        with disk_errors(self.output):
            self._resume()
        super().__enter__()
        return self

    def _resume(self) -> None:
        """Finish what a conversion that was killed left half published."""
        if not _is_folder(self._publishing):
            return
        while not self._acquire():
            pass
        try:
            if _is_folder(self._publishing):  # else its owner lives, and finished while we waited
                self._finish()
        finally:
            self._release()

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and put all files in their places."""
        order = self._path(_ORDER)
        order.write_text(json.dumps(self.names), encoding="utf-8")
        sync(order)
        self._write_manifest(manifest, self._manifest.name)
        self.folder.rename(self._publishing)
        try:
            sync(self.output.parent)
            self._finish()
        except OSError as error:
            raise EnvironmentFailure(
                f"{error.filename or self.output}: {error.strerror or error}; {self.output} is only partly published",
                remedy="Remove the cause and convert to it again, which completes it",
            ) from error

    def _finish(self) -> None:
        """Move what lies in the publishing folder, whole, to where it belongs. May run again after a kill."""
        folder, place = self._publishing, self.output.parent
        if (folder / _ORDER).exists():  # else all was in its place, and the folder half removed
            names = _read_order(self.output, folder / _ORDER)
            left = [name for name in names if (folder / name).exists()]
            _check_files(self.output, left, force=True)
            if len(names) > 1 and names[0] in left:
                (place / names[0]).unlink(missing_ok=True)
            for old in _written(self._manifest) - set(names):
                (place / old).unlink(missing_ok=True)
            for name in (*reversed(left), self._manifest.name):
                if (folder / name).exists():
                    (folder / name).replace(place / name)
            temporary_of(self._manifest).unlink(missing_ok=True)  # of a `verify` that was killed
            sync(place)
        shutil.rmtree(folder)


def check_files(output: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuse to write where files are already, and with `force` where lrconvert did not write them (exit code 2).

    Not while they are half published: `FileStaging` finishes that first, and then looks."""
    with disk_errors(output):
        if not _is_folder(_publishing(output)):
            _check_files(output, names, force=force)


def _check_files(output: Path, names: Iterable[str], *, force: bool) -> None:
    manifest, place = manifest_path(output), output.parent
    present = [name for name in (*names, manifest.name) if os.path.lexists(place / name)]
    if not present:
        return
    listed = ", ".join(str(place / name) for name in present[:4])
    if not force:
        raise UsageError(f"{listed} exists", remedy="Choose another name, or replace it with --force")
    written = _written(manifest)
    foreign = {name for name in present if name not in written} - {manifest.name}
    foreign |= {name for name in {*written, manifest.name} if _is_folder(place / name)}
    if foreign:
        raise UsageError(
            f"{', '.join(sorted(foreign))} was not written by lrconvert ({manifest} does not name it)",
            remedy="--force replaces only artifacts; move it away first",
        )


def replaced_files(output: Path, names: Iterable[str]) -> set[Path]:
    """Every file that publishing `names` replaces or removes."""
    with disk_errors(output):
        manifest = manifest_path(output)
        return {output.parent / name for name in {*names, manifest.name, *_written(manifest)}}


def _publishing(output: Path) -> Path:
    return output.with_name(f".{output.name}.lrconvert-publishing")


def _written(manifest: Path) -> set[str]:
    """Names of the files that a manifest lists: plain names in its folder, nothing else is ever touched."""
    if not manifest.is_file():
        return set()
    artifact = manifest.with_name(manifest.name.removesuffix(f".{MANIFEST}") + ".gguf")
    names = set(Manifest.read(artifact).files)
    if odd := [name for name in names if not _is_own(name, manifest)]:
        raise InputError(
            f"{manifest}: lists files that can't belong to its artifact: {', '.join(map(repr, sorted(odd)))}"
        )
    return names


def _read_order(output: Path, path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        names = None
    if isinstance(names, list) and all(_is_own(name, manifest_path(output)) for name in names):
        return names
    raise InputError(f"{path}: not left there by a conversion", remedy=f"Move {path.parent} away")


def _is_own(name: object, manifest: Path) -> bool:
    """Whether a file of the artifact may have this name: `m.gguf`, `m-00001-of-00002.gguf`, `m.Modelfile`."""
    stem = manifest.name.removesuffix(f".{MANIFEST}")
    plain = isinstance(name, str) and name.isprintable() and Path(name).name == name != manifest.name
    return plain and str(name).startswith((f"{stem}.", f"{stem}-"))


def _is_folder(path: Path) -> bool:
    """A folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()
