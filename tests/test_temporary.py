# SPDX-License-Identifier: Apache-2.0
"""Temporary folders go away with who made them, also when that is killed; what is somebody else's stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lrconvert import temporary
from lrconvert.temporary import PREFIX, remove_abandoned, temporary_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")

OWNER = """
import sys
from lrconvert.temporary import temporary_folder
with temporary_folder() as folder:
    (folder / "a").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that nobody else uses."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_goes_away_at_its_end_and_is_for_its_user_alone(places: Path) -> None:
    with temporary_folder() as folder:
        (folder / "a" / "b").mkdir(parents=True)
        assert folder.parent == places and folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    with pytest.raises(RuntimeError), temporary_folder() as folder:
        raise RuntimeError
    assert list(places.iterdir()) == []


def test_what_a_living_process_uses_stays_and_what_a_killed_one_left_goes(places: Path) -> None:
    """With processes; the locks of one's own folders count too."""
    environment = {**os.environ, "TMPDIR": str(places)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        with temporary_folder() as outer, temporary_folder() as inner:
            assert {path.name for path in places.iterdir()} == {theirs.name, outer.name, inner.name}
            owner.send_signal(signal.SIGKILL)
            owner.wait()
            assert theirs.exists()
            with temporary_folder():
                assert not theirs.exists() and outer.exists() and inner.exists()


def test_only_ones_own_folders_of_that_name_are_removed(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a folder, one that others may enter, other names, a file; and what another user made."""
    kept = places / "kept"
    kept.mkdir(mode=0o700)
    (kept / "a").touch()
    (places / f"{PREFIX}abcdefg1").symlink_to(kept)
    (places / f"{PREFIX}abcdefg2").mkdir(mode=0o755)
    (places / f"{PREFIX}notes").mkdir(mode=0o700)
    (places / f"{PREFIX}abcdefg3").touch()
    there = sorted(places.rglob("*"))
    remove_abandoned(places)
    assert sorted(places.rglob("*")) == there
    theirs = places / f"{PREFIX}abcdefg4"
    theirs.mkdir(mode=0o700)
    (theirs / "link").symlink_to(kept)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
        remove_abandoned(places)
    assert theirs.exists()
    remove_abandoned(places)
    assert not theirs.exists() and (kept / "a").exists()
    remove_abandoned(places / "nowhere")


def test_a_new_folder_that_is_taken_for_abandoned_is_made_anew(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may look between the making of a folder and its lock."""
    taken: list[str] = []
    original = tempfile.mkdtemp

    def mkdtemp(**options: str) -> str:
        made = original(**options)
        if not taken:
            taken.append(made)
            remove_abandoned(places)
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with temporary_folder() as folder:
        assert str(folder) not in taken and not Path(taken[0]).exists() and folder.is_dir()


def test_without_locks_a_folder_is_removed_by_its_owner_alone(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refused(handle: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with temporary_folder() as folder:
        remove_abandoned(places)
        assert folder.is_dir()
    assert not folder.exists()
    monkeypatch.setattr(temporary.sys, "platform", "win32")
    with temporary_folder() as folder:
        assert folder.is_dir()
