# SPDX-License-Identifier: Apache-2.0
"""Artifacts that are files in somebody's folder: the old one, the new one, or for a moment none that loads; never a
mixture, and nothing else is touched."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result
from support.forks import ForkedCommands
from support.gguf_files import command
from support.staging import (
    MANIFEST,
    ONE,
    RUN_AS_USER,
    RUN_WITH_SMALL_FILES,
    Files,
    content,
    file_manifest,
    hidden,
    linux_only,
    publish_files,
)

from lrconvert.artifact.file_staging import FileStaging
from lrconvert.artifact.manifest import Manifest
from lrconvert.errors import EnvironmentFailure, InputError, UsageError

Cli = Callable[..., Result]


def parts(count: int, text: str) -> Files:
    return {f"m-{number:05}-of-{count:05}.gguf": f"{text} {number}".encode() for number in range(1, count + 1)}


# --- publishing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parent", ["", "new/parents"])
@pytest.mark.parametrize("files", [ONE, {**ONE, "m.Modelfile": b"FROM"}, parts(3, "new")], ids=["one", "two", "parts"])
def test_files_appear_with_their_manifest(tmp_path: Path, parent: str, files: Files) -> None:
    """All of them, with sizes and digests in the manifest; nothing is left beside them, and others stay."""
    (tmp_path / "mine").write_bytes(b"mine")
    output = tmp_path / parent / "m.gguf"
    publish_files(output, files)
    found = content(tmp_path)
    place = (Path(parent) / "x").parent
    assert set(found) == {"mine", *((place / name).as_posix() for name in (*files, MANIFEST))}
    assert {name: record.size for name, record in Manifest.read(output).files.items()} == {
        name: len(data) for name, data in files.items()
    }


@pytest.mark.parametrize("old", [ONE, parts(3, "old"), {**ONE, "m.Modelfile": b"FROM"}], ids=["one", "parts", "two"])
@pytest.mark.parametrize("new", [ONE, parts(3, "new"), parts(2, "new")], ids=["one", "three", "two"])
def test_force_replaces_the_old_artifact_and_what_is_left_of_it(tmp_path: Path, old: Files, new: Files) -> None:
    """Old parts that the old manifest names are gone, files that it does not name stay; without --force the message
    says --force and all is as it was."""
    output = tmp_path / "m.gguf"
    publish_files(output, old, label="old")
    for name in ("m-00001-of-00009.gguf", "m.txt", "other.gguf", "other.lrconvert.json"):
        (tmp_path / name).write_bytes(b"mine")
    before = content(tmp_path)
    with pytest.raises(UsageError, match=r"exists.*--force"):
        publish_files(output, new, label="new")
    assert content(tmp_path) == before
    publish_files(output, new, force=True, label="new")
    mine = {name: data for name, data in before.items() if data == b"mine"}
    after = content(tmp_path)
    assert json.loads(after.pop(MANIFEST))["source"]["model"] == "new"
    assert after == {**mine, **new}


# --- what is not replaced --------------------------------------------------------------------------------

FOREIGN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file without a manifest": (
        "m.gguf",
        lambda path: (path.write_bytes(b"mine"), (path.parent / MANIFEST).unlink()),
    ),
    "a part": ("m-00002-of-00002.gguf", lambda path: path.write_bytes(b"mine")),
    "a Modelfile": ("m.Modelfile", lambda path: path.write_bytes(b"mine")),
    "a link to nothing": ("m.Modelfile", lambda path: path.symlink_to("gone")),
    "a folder": ("m.Modelfile", lambda path: path.mkdir()),
    "a folder in a file's place": ("m.gguf", lambda path: (path.unlink(), path.mkdir(), (path / "a").touch())),
    "a folder in the manifest's": (MANIFEST, lambda path: (path.unlink(), path.mkdir())),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_the_manifest_does_not_name_is_never_replaced(tmp_path: Path, name: str) -> None:
    """Exit code 2 with its name, with --force too; everything stays."""
    place, make = FOREIGN[name]
    publish_files(tmp_path / "m.gguf", ONE)
    make(tmp_path / place)
    before, listing = content(tmp_path), sorted(tmp_path.rglob("*"))
    new = {**ONE, **parts(2, "new"), "m.Modelfile": b"FROM"}
    for force in (False, True):
        with pytest.raises(UsageError) as caught:
            publish_files(tmp_path / "m.gguf", new, force=force)
    assert place in str(caught.value) and "not written by lrconvert" in str(caught.value)
    assert (content(tmp_path), sorted(tmp_path.rglob("*"))) == (before, listing)


ODD = ["../x", "..", ".", "", "/etc/hostname", "sub/m.gguf", "m.\0", "m.\ud800", "thesis.txt", MANIFEST, "m", "mm.gguf"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_a_manifest_that_names_anything_else_is_bad_input(tmp_path: Path, name: str) -> None:
    """Somebody else's words decide what --force deletes: only what can be a file of this artifact. Exit code 3."""
    output = tmp_path / "sub" / "m.gguf"
    publish_files(output, ONE)
    for path in (tmp_path / "x", output.with_name("thesis.txt"), output.with_name("mm.gguf")):
        path.write_bytes(b"mine")
    written = json.loads((output.parent / MANIFEST).read_text())
    written["files"][name] = written["files"]["m.gguf"]
    (output.parent / MANIFEST).write_text(json.dumps(written))
    before = content(tmp_path)
    with pytest.raises(InputError, match=MANIFEST):
        publish_files(output, parts(2, "new"), force=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"files": {"m.gguf": 3}}', "[" * 10_000])
def test_a_damaged_manifest_is_bad_input_and_stays(tmp_path: Path, text: str) -> None:
    """--force replaces nothing on its word."""
    publish_files(tmp_path / "m.gguf", ONE)
    (tmp_path / MANIFEST).write_text(text)
    before = content(tmp_path)
    with pytest.raises(InputError, match=f"{MANIFEST}: not a manifest"):
        publish_files(tmp_path / "m.gguf", ONE, force=True)
    assert content(tmp_path) == before


def test_a_link_in_a_files_place_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    """Somebody moved the weights to another disk and left a link: that is the artifact's name, not its file."""
    publish_files(tmp_path / "m.gguf", parts(2, "old"))
    first = tmp_path / "m-00001-of-00002.gguf"
    first.rename(tmp_path / "elsewhere")
    first.symlink_to("elsewhere")
    publish_files(tmp_path / "m.gguf", parts(2, "new"), force=True)
    assert not first.is_symlink() and first.read_bytes() == b"new 1"
    assert (tmp_path / "elsewhere").read_bytes() == b"old 1"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """The names are looked at again at the last moment."""
    with pytest.raises(UsageError, match="exists"), FileStaging(tmp_path / "m.gguf", ["m.gguf"]) as staging:
        staging.write_bytes("m.gguf", b"new")
        (tmp_path / "m.gguf").write_bytes(b"mine")
        staging.publish(file_manifest())
    assert content(tmp_path) == {"m.gguf": b"mine"}


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("old", [None, ONE])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: BaseException, old: Files | None) -> None:
    """A bug, Ctrl-C, a full disk, with an old artifact and without: no staging folder, no lock, no half a file."""
    if old:
        publish_files(tmp_path / "m.gguf", old)
    before = content(tmp_path)
    expected = EnvironmentFailure if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), FileStaging(tmp_path / "m.gguf", list(parts(2, "")), force=True) as staging:
        staging.write_bytes("m-00001-of-00002.gguf", b"new")
        raise error
    assert content(tmp_path) == before


@pytest.mark.parametrize("call", range(4))
def test_an_error_while_files_move_says_so_and_the_next_conversion_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """ "Nothing was written" would be a lie then; exit code 6."""
    output, files = tmp_path / "m.gguf", parts(3, "new")
    publish_files(output, parts(3, "old"))
    real, calls = Path.replace, itertools.count()

    def fail(self: Path, target: Path) -> Path:
        if next(calls) == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(EnvironmentFailure, match=r"is only partly published\. Remove the cause") as caught:
        publish_files(output, files, force=True)
    assert caught.value.exit_code == 6
    with pytest.raises(UsageError, match="exists"):
        publish_files(output, ONE)
    assert {name: data for name, data in content(tmp_path).items() if name != MANIFEST} == files


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder that nobody may write, with an artifact in it."""
    publish_files(tmp_path / "closed" / "m.gguf", ONE)
    (tmp_path / "closed").chmod(0o555)
    return tmp_path / "closed"


@linux_only
def test_a_folder_without_write_access_is_the_environment(
    tmp_path: Path, closed: Path, plain: tuple[Path, Path], commands: ForkedCommands
) -> None:
    """Exit code 6 and one line; old and new names alike, nothing changes."""
    before = content(closed)
    for name in ("m.gguf", "n.gguf"):
        done = commands.run(RUN_AS_USER, *command(*plain, closed / name, "--force"))
        assert done.returncode == 6, done.stderr
        assert "Permission denied; nothing was written to" in done.stderr.splitlines()[-1]
    assert content(closed) == before


@linux_only
@pytest.mark.parametrize("limit", [0, 500, 3000, 200_000])
def test_a_full_disk_is_the_environment(
    tmp_path: Path, limit: int, plain: tuple[Path, Path], commands: ForkedCommands
) -> None:
    """RLIMIT_FSIZE stands in for it: in the header, in the weights, in the second of two files. No folder, no lock, no
    half a file stays, and an old artifact does."""
    output = tmp_path / "new" / "m.gguf"
    arguments = command(*plain, output, "--modelfile")
    done = commands.run(RUN_WITH_SMALL_FILES, limit, *arguments)
    assert done.returncode == 6, done.stderr
    assert "File too large; nothing was written" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not output.parent.exists()
    publish_files(output, ONE)
    before = content(output.parent)
    assert commands.run(RUN_WITH_SMALL_FILES, limit, *arguments, "--force").returncode == 6
    assert content(output.parent) == before


# --- two at once -----------------------------------------------------------------------------------------


@linux_only
def test_the_second_of_two_writers_is_refused(tmp_path: Path) -> None:
    """At once, with exit code 2, without harm to the first; other names are free."""
    with FileStaging(tmp_path / "m.gguf", ["m.gguf"]) as staging:
        staging.write_bytes("m.gguf", b"first")
        with pytest.raises(UsageError, match="is being written by another lrconvert"):
            publish_files(tmp_path / "m.gguf", parts(2, "second"))
        publish_files(tmp_path / "n.gguf", {"n.gguf": b"n"})
        staging.publish(file_manifest())
    assert (tmp_path / "m.gguf").read_bytes() == b"first" and not hidden(tmp_path)


@linux_only
def test_nobody_finishes_what_its_owner_is_still_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While files move, a second conversion is refused too, and does not move them itself."""
    output, real, seen = tmp_path / "m.gguf", Path.replace, []
    publish_files(output, parts(3, "old"))

    def meanwhile(self: Path, target: Path) -> Path:
        with pytest.raises(UsageError, match="is being written by another lrconvert"):
            publish_files(output, ONE, force=True)
        seen.append(self.name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    publish_files(output, parts(3, "new"), force=True)
    assert seen == [*reversed(parts(3, "new")), MANIFEST] and not hidden(tmp_path)
