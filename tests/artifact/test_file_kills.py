# SPDX-License-Identifier: Apache-2.0
"""kill -9 at every moment of publishing files: the old artifact, the new one, or nothing that loads; then it mends."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, recipe_for
from support.gguf_files import WINDOW, bake, command
from support.pico import write_pico
from support.staging import MANIFEST, ONE, Files, content, hidden, linux_only, publish_files

from lrconvert.artifact.manifest import Manifest, manifest_path
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.errors import EnvironmentFailure, InputError, UsageError

Cli = Callable[..., Result]


# Starts a conversion in a copy of every folder and kills it before its n-th access to the file system, for all n.
KILLER = """
import itertools, os, pickle, shutil, signal, sys
from pathlib import Path
from lrconvert.artifact.file_staging import FileStaging
from lrconvert.artifact.manifest import Manifest
from lrconvert.artifact.record import BakeRecord
os.fsync = lambda handle: None
counted = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
starts, target, files, most = pickle.load(sys.stdin.buffer)
import pydantic  # as reading the old manifest does: not among the accesses that count
manifest = Manifest("gguf", {"model": "new"}, {"name": "r"}, {}, [], BakeRecord(window=64))
if any((start / "m.lrconvert.json").exists() for start in starts):
    Manifest.read(next(start for start in starts if (start / "m.lrconvert.json").exists()) / "m.gguf")
names = itertools.count()
for start in starts:
    for last in range(most):
        work = target / f"{next(names):05}"
        shutil.copytree(start, work, symlinks=True)
        child = os.fork()
        if not child:
            calls = itertools.count()
            def hook(event, arguments):
                if event in counted and next(calls) == last:
                    os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            with FileStaging(work / "m.gguf", list(files), force=True) as staging:
                for name, data in files.items():
                    staging.write_bytes(name, data)
                staging.publish(manifest)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
"""


def killed(starts: list[Path], target: Path, files: Files, most: int = 1000) -> list[Path]:
    """The folders that conversions leave which are killed at every moment, or at the first `most`; of every start the
    last was not killed."""
    target.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLER],
        input=pickle.dumps((starts, target, files, most)),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return sorted(target.iterdir())


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Files]:
    """The files of a real GGUF in so many parts, of weights that belong to the label."""
    made: dict[tuple[str, int], Files] = {}

    def get(label: str, count: int) -> Files:
        if (label, count) not in made:
            folder = tmp_path_factory.mktemp(label)
            source = write_pico(
                folder / "model", seed={"old": 1, "new": 2}[label], num_hidden_layers=1, max_position_embeddings=WINDOW
            )
            model = open_model(source)
            limit = {1: None, 2: 100_000, 3: 75_000}[count]
            first = bake(model, recipe_for(model, even=True), folder / "m.gguf", split=limit)
            files = sorted(folder.glob("m*.gguf"))
            assert files[0] == first and len(files) == count
            made[label, count] = {path.name: path.read_bytes() for path in files}
        return made[label, count]

    return get


def loads(folder: Path) -> set[bytes]:
    """The weights of everything in the folder that opens, whatever file is named: a digest of each."""
    found = set()
    for path in folder.glob("*.gguf"):
        try:
            checkpoint = GgufCheckpoint(path)
        except (InputError, OSError):
            continue
        weights = [checkpoint.read(name).tobytes()[:64] for name in sorted(checkpoint.tensors)]
        found.add(b"".join(weights))
    return found


def visible(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


STEPS = [(0, 1), (0, 3), (1, 1), (1, 3), (3, 1), (3, 3), (3, 2)]


@linux_only
@pytest.mark.parametrize(("before", "after"), STEPS, ids=lambda count: str(count))
def test_a_conversion_killed_at_any_moment_leaves_nothing_mixed_and_the_next_one_finishes(
    tmp_path: Path, artifacts: Callable[[str, int], Files], before: int, after: int
) -> None:
    """By kill -9 before every access to the file system. Real GGUF files in up to three parts: what opens afterwards
    is all old or all new. The next conversion finds the one or the other whole, or finishes it; it can replace it,
    and leaves no trace of what happened."""
    start = tmp_path / "start"
    start.mkdir()
    if before:
        publish_files(start / "m.gguf", artifacts("old", before), label="old")
    old, new = visible(start), artifacts("new", after)
    states = killed([start], tmp_path / "killed", new)
    whole = visible(states[-1])
    assert len(states) > 15 and not hidden(states[-1]) and {**new, MANIFEST: whole[MANIFEST]} == whole
    weights = [loads(start), loads(states[-1])]
    assert len(weights[1]) == 1 and weights[0] != weights[1]
    history = []
    for state in states:
        found = loads(state)
        assert found in (*weights, set()), state
        history.append(2 if found == weights[1] else 1 if found == weights[0] else 0)
        check_recovery(state, old, whole, new)
    kinds = [kind for kind, _ in itertools.groupby(history)]
    assert kinds in ([1, 2], [1, 0, 2], [0, 2]), history  # and never back


def check_recovery(state: Path, old: Files, whole: Files, new: Files) -> None:
    """The next conversion to a folder in this state, without and with --force."""
    try:
        publish_files(state / "m.gguf", new, label="new")
    except UsageError as error:
        assert "exists" in str(error)
        assert visible(state) in (old, whole)
    else:
        assert not old
    assert visible(state) in (old, whole)
    publish_files(state / "m.gguf", new, force=True, label="new")
    assert visible(state) == whole and not hidden(state)


@linux_only
def test_a_kill_while_an_earlier_one_is_being_mended_is_mended_as_well(
    tmp_path: Path, artifacts: Callable[[str, int], Files]
) -> None:
    """The first moments, those of mending, of a conversion in states that a killed one leaves while files move."""
    start = tmp_path / "start"
    publish_files(start / "m.gguf", artifacts("old", 3), label="old")
    old, new = visible(start), artifacts("new", 2)
    states = killed([start], tmp_path / "once", new)
    moving = [state for state in states if ".m.gguf.lrconvert-publishing" in hidden(state)]
    assert len(moving) > 5
    whole, weights = visible(states[-1]), (loads(start), loads(states[-1]), set())
    for state in killed(moving[::3], tmp_path / "twice", new, most=18):
        assert loads(state) in weights
        check_recovery(state, old, whole, new)


@pytest.fixture
def half(tmp_path: Path, plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Path:
    """An artifact of which a part and not the manifest is in its place, as a kill leaves it."""
    real, calls = Path.replace, itertools.count()

    def stop(self: Path, target: Path) -> Path:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        assert cli(*command(*plain, tmp_path / "m.gguf", "--modelfile")).code == 130
    assert (tmp_path / "m.Modelfile").exists() and not (tmp_path / "m.gguf").exists()
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("force", [False, True])
def test_the_command_finishes_too(half: Path, plain: tuple[Path, Path], cli: Cli, force: bool) -> None:
    """What is half there is not taken for somebody else's: finished, and then refused or replaced."""
    result = cli(*command(*plain, half, "--modelfile", *(["--force"] if force else [])))
    assert result.code == (0 if force else 2), result.err
    assert set(Manifest.read(half).files) == {"m.gguf", "m.Modelfile"} and not hidden(half.parent)


def test_a_file_that_came_after_the_kill_is_not_replaced(half: Path, plain: tuple[Path, Path], cli: Cli) -> None:
    """Somebody put a file of theirs where the artifact was about to be: exit code 2, and it stays. Once it is gone
    the artifact takes its place."""
    half.write_bytes(b"mine")
    result = cli(*command(*plain, half, "--force"))
    assert result.code == 2 and "not written by lrconvert" in result.err
    assert half.read_bytes() == b"mine"
    half.unlink()
    assert cli(*command(*plain, half)).code == 2 and half.exists() and manifest_path(half).exists()


ORDERS = {
    "nothing": None,
    "no JSON": b"{",
    "no list": b'{"a": 1}',
    "numbers": b"[1]",
    "another folder": b'["../x"]',
    "another file": b'["thesis.txt"]',
    "the manifest": b'["m.lrconvert.json"]',
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_publishing_folder_that_no_conversion_left_moves_nothing(tmp_path: Path, name: str) -> None:
    """A folder of that name in a folder that others may write: exit code 3 with its name. One without an order is
    what a kill leaves of a folder whose files are all in place: it goes."""
    work = tmp_path / "work"
    folder = work / ".m.gguf.lrconvert-publishing"
    folder.mkdir(parents=True)
    for path in (tmp_path / "x", work / "thesis.txt"):
        path.write_bytes(b"mine")
    if (text := ORDERS[name]) is None:
        publish_files(work / "m.gguf", ONE)
        assert (work / "m.gguf").read_bytes() == b"one" and not hidden(work)
        return
    (folder / ".order.json").write_bytes(text)
    (folder / "thesis.txt").write_bytes(b"theirs")
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"\.m\.gguf\.lrconvert-publishing"):
        publish_files(work / "m.gguf", ONE, force=True)
    assert content(tmp_path) == before


def test_a_publishing_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """What it names belongs to somebody: exit code 6, nothing moves."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / ".order.json").write_text('["m.gguf"]')
    (tmp_path / "theirs" / "m.gguf").write_bytes(b"theirs")
    (tmp_path / ".m.gguf.lrconvert-publishing").symlink_to("theirs")
    before = content(tmp_path)
    with pytest.raises(EnvironmentFailure):
        publish_files(tmp_path / "m.gguf", ONE)
    assert content(tmp_path) == before
