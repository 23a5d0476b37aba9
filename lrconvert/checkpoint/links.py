# SPDX-License-Identifier: Apache-2.0
"""Which files belong to a folder: names and links that lead out of it are a stranger's way to the user's other files.

    is_inside("sub/name.json")         a name that stays in whatever folder it is in
    own_file(folder, "name.json")      the file, None where it is none or lies elsewhere

Links inside a folder are followed, and those of the Hub's cache, whose snapshots link to `../../blobs`. Hard links
can't be told from files: whoever made one could read what it names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from lrconvert.errors import InputError

MAX_NAME = 1024  # characters


def is_inside(name: str) -> bool:
    """Whether a relative name, with `/` between its parts, stays inside: no `..`, no drive, nothing unprintable."""
    pure = PurePosixPath(name)
    plain = 0 < len(name) <= MAX_NAME and name.isprintable() and not ("\\" in name or PureWindowsPath(name).drive)
    relative = pure.parts and not pure.is_absolute() and not {"..", "."} & set(pure.parts)
    return bool(plain and relative and pure.as_posix() == name)


def own_file(folder: Path, name: str) -> Path | None:
    """`folder / name` where that is a plain file of the folder, of no other kind and not a link that leads out."""
    path = folder / name
    try:
        return path if is_own(folder, path) and path.is_file() else None
    except OSError:  # a name that is too long for a file
        return None


def is_own(folder: Path, path: Path) -> bool:
    """Whether what `path` leads to lies in the folder, or, for a snapshot in the Hub's cache, among its blobs."""
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that no file can have
        return False
    return real.is_relative_to(root) or real.parent == _blobs(root)


def check_links(folder: Path, paths: Iterable[Path]) -> None:
    """`InputError` that names every one of `paths` that leads out of the folder."""
    if out := [str(path.relative_to(folder)) for path in paths if not is_own(folder, path)]:
        raise InputError(
            f"{folder}: {', '.join(out)} leads out of the folder, and what lies elsewhere is not copied from there",
            remedy="Put the file itself in the folder",
        )


def _blobs(root: Path) -> Path | None:
    """Where the Hub's cache keeps the files of a snapshot: models--OWNER--NAME/snapshots/COMMIT and …/blobs."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith(("models--", "datasets--")):
            return place.parent.parent / "blobs"
    return None
