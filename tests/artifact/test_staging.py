# SPDX-License-Identifier: Apache-2.0
"""Staging and publishing: the old artifact or the new one, never half of one, and nothing else touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, recipe_for
from support.forks import ForkedCommands, Process
from support.pico import write_pico
from support.staging import BAKED, RUN_AS_USER, RUN_WITH_SMALL_FILES, content, linux_only

from lrconvert.artifact import staging as output_module
from lrconvert.artifact.manifest import MANIFEST, FileRecord, Manifest
from lrconvert.artifact.staging import Staging, check_output
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import EnvironmentFailure, InputError, UsageError
from lrconvert.recipe import write_recipe
from lrconvert.writing import replace_file


def manifest(**changes: object) -> Manifest:
    values = {
        "target": "hf",
        "source": {"model": "m"},
        "recipe": {"name": "r"},
        "options": {},
        "losses": [],
        "bake": BAKED,
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def publish(output: Path, text: str = "new", *, force: bool = False) -> None:
    """An artifact of two files, one in a folder."""
    with Staging(output, force=force) as staging:
        staging.write_bytes("a.txt", text.encode())
        staging.write_bytes("sub/b.txt", b"b")
        staging.publish(manifest())


# --- publishing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parent", ["", "new/parents"])
def test_an_artifact_appears_whole_with_its_manifest(tmp_path: Path, parent: str) -> None:
    """Files, sizes and digests are in the manifest; nothing is left beside the output."""
    output = tmp_path / parent / "out"
    publish(output)
    assert set(content(tmp_path)) == {
        (Path(parent) / "out" / name).as_posix() for name in ("a.txt", "sub/b.txt", MANIFEST)
    }
    files = Manifest.read(output).files
    assert files == {
        "a.txt": FileRecord(3, hashlib.sha256(b"new").hexdigest()),
        "sub/b.txt": FileRecord(1, hashlib.sha256(b"b").hexdigest()),
    }


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order of writing: no time, no machine, no order in the manifest."""
    publish(tmp_path / "one")
    with Staging(tmp_path / "two") as staging:
        staging.write_bytes("sub/b.txt", b"b")
        staging.write_bytes("a.txt", b"new")
        staging.publish(manifest())
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_an_artifact_as_a_whole(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the old one are gone, with and without the platform's exchange."""
    output = tmp_path / "out"
    with Staging(output) as staging:
        staging.write_bytes("old/only.txt", b"old")
        staging.publish(manifest())
    if not exchange:
        monkeypatch.setattr(output_module, "_exchange", lambda new, old: False)
    publish(output, force=True)
    assert set(content(tmp_path)) == {"out/a.txt", "out/sub/b.txt", f"out/{MANIFEST}"}


@linux_only
def test_the_exchange_is_one_step(tmp_path: Path) -> None:
    """Both folders exist before and after: there is no moment without an artifact."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert output_module._exchange(tmp_path / "new", tmp_path / "old")
    assert set(content(tmp_path)) == {"new/old", "old/new"}
    assert not output_module._exchange(tmp_path / "new", tmp_path / "gone")


def test_without_an_exchange_a_failed_rename_brings_the_old_artifact_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    publish(output, "old")
    before = content(tmp_path)
    monkeypatch.setattr(output_module, "_exchange", lambda new, old: False)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith("-staging"):
            raise OSError(errno.EIO, "input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(EnvironmentFailure, match="input/output error"):
        publish(output, force=True)
    assert content(tmp_path) == before


# --- what is not replaced --------------------------------------------------------------------------------


def an_artifact_with(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def prepare(output: Path) -> None:
        publish(output, "old")
        make(output / name)

    return prepare


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda output: output.write_text("mine"), "not written by lrconvert"),
    "a folder of something else": (
        lambda output: (output.mkdir(), (output / "mine").write_text("mine")),
        "not written by lrconvert",
    ),
    "a link to an empty folder": (
        lambda output: ((output.parent / "target").mkdir(), output.symlink_to("target")),
        "not written by lrconvert",
    ),
    "a link to an artifact": (
        lambda output: (publish(output.parent / "target"), output.symlink_to("target")),
        "not written by lrconvert",
    ),
    "a link to nowhere": (lambda output: output.symlink_to("gone"), "not written by lrconvert"),
    "a file of the user's": (an_artifact_with("notes.txt", lambda path: path.write_text("mine")), "notes.txt"),
    "a hidden file": (an_artifact_with(".notes", lambda path: path.write_text("mine")), ".notes"),
    "a file in a folder of the user's": (
        an_artifact_with("mine/notes.txt", lambda path: (path.parent.mkdir(), path.write_text("mine"))),
        "mine/notes.txt",
    ),
    "a link to a folder": (an_artifact_with("data", lambda path: path.symlink_to("/usr")), "data"),
    "a link to nothing": (an_artifact_with("data", lambda path: path.symlink_to("gone")), "data"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_force_replaces_only_what_lrconvert_wrote(tmp_path: Path, name: str) -> None:
    """Exit code 2, everything as it was; without --force the message says --force."""
    prepare, needle = FOREIGN[name]
    output = tmp_path / "out"
    prepare(output)
    before, listing = content(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="--force") as caught:
        publish(output)
    assert str(caught.value).startswith(f"{output} exists")
    with pytest.raises(UsageError, match=needle):
        publish(output, force=True)
    assert (content(tmp_path), sorted(tmp_path.rglob("*"))) == (before, listing)


def test_an_empty_folder_is_no_output(tmp_path: Path) -> None:
    """People make it beforehand; it is taken without --force."""
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out")
    assert set(content(tmp_path)) == {"out/a.txt", "out/sub/b.txt", f"out/{MANIFEST}"}


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """The output is looked at again at the last moment."""
    with pytest.raises(UsageError, match="exists"), Staging(tmp_path / "out") as staging:
        staging.write_bytes("a.txt", b"a")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        staging.publish(manifest())
    assert content(tmp_path) == {"out/mine": b"mine"}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", "[" * 100000, "{}", '{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {"x": 1}}}',
     '{"files": {}, "colour": 1}'],
)  # fmt: skip
def test_a_damaged_manifest_is_bad_input_and_stays(tmp_path: Path, text: str) -> None:
    """One line that names the file, and --force replaces nothing on its word."""
    publish(tmp_path / "out", "old")
    (tmp_path / "out" / MANIFEST).write_text(text)
    before = content(tmp_path)
    with pytest.raises(InputError, match=f"{MANIFEST}: not a manifest"):
        publish(tmp_path / "out", force=True)
    assert content(tmp_path) == before


def test_the_manifest_survives_its_file(tmp_path: Path) -> None:
    """Read gives back what was written, digests that nobody has made yet included."""
    made = manifest(
        losses=["a"], notes=["é"], files={"w": FileRecord(5, None, linked=True)}, parity={"summary": "good"}
    )
    (tmp_path / MANIFEST).write_text(made.to_json())
    assert Manifest.read(tmp_path) == made
    with pytest.raises(InputError, match=r"no lrconvert\.json, so not an lrconvert artifact"):
        Manifest.read(tmp_path / "elsewhere")


def test_a_small_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    other = tmp_path / "g"
    os.link(path, other)
    replace_file(path, "néw")
    assert (path.read_text(), other.read_text(), len(list(tmp_path.iterdir()))) == ("néw", "old", 2)


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), InputError("bad tensor")])
@pytest.mark.parametrize("old", [False, True])
def test_an_exception_leaves_nothing_and_passes_on(tmp_path: Path, error: BaseException, old: bool) -> None:
    output = tmp_path / "new" / "out"
    if old:
        publish(output, "old")
    before = content(tmp_path)
    with pytest.raises(type(error)), Staging(output, force=old) as staging:
        staging.write_bytes("sub/a.txt", b"a")
        raise error
    assert content(tmp_path) == before
    assert (tmp_path / "new").exists() == old


def test_an_error_of_the_disk_is_the_environment(tmp_path: Path) -> None:
    """Its own words, the file, and that nothing was written; exit code 6."""
    expected = pytest.raises(EnvironmentFailure, match="No space left on device; nothing was written")
    with expected as caught, Staging(tmp_path / "out") as staging:
        staging.write_bytes("a.txt", b"a")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.txt")
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_a_staging_folder_that_can_not_be_made_leaves_no_lock(tmp_path: Path) -> None:
    """A file of somebody's in its place: exit code 6, and the file stays."""
    blocker = tmp_path / ".out.lrconvert-staging"
    blocker.write_text("mine")
    with pytest.raises(EnvironmentFailure):
        publish(tmp_path / "out")
    assert content(tmp_path) == {blocker.name: b"mine"}


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "file/out", "file/out/deeper"])
def test_a_name_that_no_folder_can_have_is_the_environment(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentFailure):
        publish(tmp_path / name)
    assert content(tmp_path) == {"file": b"mine"}


@pytest.fixture
def model_and_recipe(tmp_path: Path) -> tuple[Path, Path]:
    folder = write_pico(tmp_path / "model")
    return folder, write_recipe(recipe_for(open_model(folder)), tmp_path / "recipe")


@linux_only
def test_a_folder_without_write_access_is_the_environment(
    tmp_path: Path, model_and_recipe: tuple[Path, Path], commands: ForkedCommands
) -> None:
    """Exit code 6 and one line, nothing written."""
    model, recipe = model_and_recipe
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    done = commands.run(RUN_AS_USER, "hf", model, "--recipe", recipe, "-o", closed / "out")
    assert done.returncode == 6, done.stderr
    assert "Permission denied; nothing was written to" in done.stderr.splitlines()[-1]
    assert list(closed.iterdir()) == []


@linux_only
@pytest.mark.parametrize("limit", [0, 500, 20000])
def test_a_full_disk_is_the_environment(
    tmp_path: Path, model_and_recipe: tuple[Path, Path], limit: int, commands: ForkedCommands
) -> None:
    """RLIMIT_FSIZE stands in for it, at the first byte, in the config and in the weights."""
    model, recipe = model_and_recipe
    before = content(tmp_path)
    arguments = ("hf", model, "--recipe", recipe, "-o", tmp_path / "new" / "out", "--copy")
    done = commands.run(RUN_WITH_SMALL_FILES, limit, *arguments)
    assert done.returncode == 6, done.stderr
    assert "File too large; nothing was written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert content(tmp_path) == before
    assert not (tmp_path / "new").exists()
    assert commands.run(RUN_WITH_SMALL_FILES, 10**9, *arguments).returncode == 0


# --- two at once, and kills ------------------------------------------------------------------------------


def test_the_second_of_two_writers_refuses(tmp_path: Path) -> None:
    """At once, with exit code 2, and without harm to the first."""
    with Staging(tmp_path / "out") as staging:
        staging.write_bytes("a.txt", b"first")
        with pytest.raises(UsageError, match="is being written by another lrconvert"):
            publish(tmp_path / "out", "second")
        publish(tmp_path / "other")
        staging.publish(manifest())
    assert (tmp_path / "out" / "a.txt").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_a_lock_that_its_last_owner_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and lock the owner may finish and unlink the file: then it is taken anew."""
    import fcntl

    flock, taken = fcntl.flock, []

    def late(lock: object, how: int) -> None:
        if not taken:
            (tmp_path / ".out.lrconvert-lock").unlink()
        taken.append(lock)
        flock(lock, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with Staging(tmp_path / "out") as staging:
        assert len(taken) == 2
        with pytest.raises(UsageError, match="another lrconvert"):
            publish(tmp_path / "out")
        staging.publish(manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_never_truncates_what_a_link_names(tmp_path: Path) -> None:
    """In a folder that others may write, somebody's link may have the lock's name."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".out.lrconvert-lock").symlink_to("precious")
    publish(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"


def kill(process: Process) -> None:
    process.kill()
    process.communicate()


SLOW_CONVERSION = """
import sys, time
from pathlib import Path
from lrconvert.artifact.staging import Staging
with Staging(Path(sys.argv[1]), force=True) as staging:
    staging.write_bytes("a.txt", b"half")
    with staging.create("big") as file:
        file.write(b"x" * 10000)
        print("staged", flush=True)
        time.sleep(60)
"""


@linux_only
@pytest.mark.parametrize("old", [False, True])
def test_a_kill_while_staging_harms_nothing_and_the_next_run_cleans_up(
    tmp_path: Path, old: bool, commands: ForkedCommands
) -> None:
    """The output is what it was; while the process lives it refuses others, afterwards it doesn't."""
    output = tmp_path / "out"
    if old:
        publish(output, "old")
    before = content(output)
    process = commands.start(SLOW_CONVERSION, output)
    try:
        assert process.stdout is not None and process.stdout.readline() == "staged\n"
        with pytest.raises(UsageError, match="another lrconvert"):
            publish(output, force=True)
    finally:
        kill(process)
    assert content(output) == before
    assert len(list(tmp_path.iterdir())) == 2 + old  # the lock and the staging folder of a process that is gone
    publish(output, force=True)
    assert set(content(tmp_path)) == {"out/a.txt", "out/sub/b.txt", f"out/{MANIFEST}"}


@linux_only
def test_a_conversion_killed_at_any_moment_leaves_the_old_artifact_or_the_new(
    tmp_path: Path, model_and_recipe: tuple[Path, Path], commands: ForkedCommands
) -> None:
    """Twenty random moments of a run that replaces an artifact."""
    model, recipe = model_and_recipe
    output = tmp_path / "out"
    code = "import sys; from lrconvert.cli import run; print('go', flush=True); sys.exit(run(sys.argv[1:]))"
    arguments = ["hf", str(model), "--recipe", str(recipe), "-o", str(output), "--copy", "--force"]
    started = time.perf_counter()
    assert commands.run(code, *arguments).returncode == 0
    whole = time.perf_counter() - started
    complete = {name: hashlib.sha256(data).hexdigest() for name, data in content(output).items()}
    moments = random.Random(20)
    for _ in range(20):
        process = commands.start(code, *arguments)
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        time.sleep(whole * moments.random())
        kill(process)
        assert {name: hashlib.sha256(data).hexdigest() for name, data in content(output).items()} == complete
    assert commands.run(code, *arguments).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "recipe", "out"}


# --- links -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [None, True, False])
def test_a_file_comes_along_as_a_link_or_a_copy(tmp_path: Path, link: bool | None) -> None:
    """A hard link unless copies are asked for; the blob, not the link, where the source is one."""
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "source").symlink_to("blob")
    with Staging(tmp_path / "out", link=link) as staging:
        staging.link_or_copy(tmp_path / "source", "w")
        staging.publish(manifest())
    made = tmp_path / "out" / "w"
    assert made.read_bytes() == b"weights" and not made.is_symlink()
    assert made.samefile(tmp_path / "blob") == (link is not False)
    record = Manifest.read(tmp_path / "out").files["w"]
    assert record.linked == (link is not False)
    assert record.sha256 == (sha256_of(made) if link is False else None)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS])
def test_where_links_do_not_work_a_copy_is_made(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file system, or one without links: silently a copy, an error only where --link insists."""
    (tmp_path / "source").write_bytes(b"weights")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", fail)
    with Staging(tmp_path / "out") as staging:
        staging.link_or_copy(tmp_path / "source", "w")
        staging.publish(manifest())
    assert (tmp_path / "out" / "w").read_bytes() == b"weights"
    assert Manifest.read(tmp_path / "out").files["w"].sha256 == hashlib.sha256(b"weights").hexdigest()
    refused = pytest.raises(UsageError, match=r"w: can't be hard linked.*--copy")
    with refused, Staging(tmp_path / "other", link=True) as staging:
        staging.link_or_copy(tmp_path / "source", "w")
    assert not (tmp_path / "other").exists()


def test_a_source_that_vanished_is_reported(tmp_path: Path) -> None:
    expected = pytest.raises(EnvironmentFailure, match=f"{tmp_path}/gone: No such file")
    with expected, Staging(tmp_path / "out") as staging:
        staging.link_or_copy(tmp_path / "gone", "w")
    assert list(tmp_path.iterdir()) == []


def test_a_check_costs_nothing_and_writes_nothing(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """`hf` refuses an output before it opens the model."""
    publish(tmp_path / "out")
    check_output(tmp_path / "free", force=False)
    result = cli("hf", "no/such/model/anywhere", "--recipe", "none", "-o", tmp_path / "out")
    assert result.code == 2
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["target"] == "hf"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
