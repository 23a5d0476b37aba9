# SPDX-License-Identifier: Apache-2.0
"""Files are checked against the manifest beside the runtime; what they say stands where it began."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, recipe_for
from support.pico import write_pico

from lrconvert.artifact.checks import Row
from lrconvert.artifact.manifest import Manifest
from lrconvert.checkpoint import open_model
from lrconvert.parity import integrity
from lrconvert.parity.integrity import Integrity
from lrconvert.parity.report import Rows
from lrconvert.progress import Step, silent
from lrconvert.recipe import write_recipe

Cli = Callable[..., Result]


@pytest.fixture
def artifact(tmp_path: Path, cli: Cli) -> Path:
    model = write_pico(tmp_path / "model")
    recipe = write_recipe(recipe_for(open_model(model), even=True), tmp_path / "recipe")
    assert cli("hf", model, "--recipe", recipe, "-o", tmp_path / "artifact", "--copy").code == 0
    return tmp_path / "artifact"


def checked(artifact: Path) -> tuple[list[Row], Manifest]:
    manifest = Manifest.read(artifact)
    return Integrity(artifact, manifest, silent).rows(), manifest


@pytest.mark.parametrize("name", [None, "model.safetensors", "config.json"])
def test_a_thread_finds_what_is_found_without_one(
    name: str | None, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name is not None:
        data = bytearray((artifact / name).read_bytes())
        data[-2] ^= 1
        (artifact / name).write_bytes(bytes(data))
    alone, manifest = checked(artifact)
    monkeypatch.setattr(integrity, "ASIDE_BYTES", 0)
    aside, same = checked(artifact)
    assert aside == alone
    assert vars(same)["files"] == vars(manifest)["files"]
    assert [row.verdict for row in aside] == ["pass" if name is None else "fail"]


def test_verify_fails_on_a_changed_file_that_a_thread_reads(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setattr(integrity, "ASIDE_BYTES", 0)
    assert cli("verify", artifact, "--files-only").code == 0
    (artifact / "modeling_longrope.py").write_text("# nothing\n")
    said = cli("verify", artifact, "--files-only")
    assert said.code == 5
    assert "modeling_longrope.py" in said.out + said.err


class Slow:
    """A check that ends when it is told to."""

    def __init__(self) -> None:
        self.done, self.stopped = False, False

    def rows(self) -> list[Row]:
        self.done = True
        return [Row("files", "2 files, sha256", "pass")]

    def stop(self) -> None:
        self.stopped = True


def test_rows_are_shown_when_they_are_known_and_kept_where_they_began() -> None:
    shown: list[str] = []
    rows, slow = Rows(lambda row: shown.append(row.case)), Slow()
    rows.append(Row("engine", "first", "pass"))
    with rows.beside(slow):
        rows.append(Row("native", "below", "pass"))
        slow.done = True
        rows.append(Row("native", "at", "pass"))
    assert shown == ["first", "below", "2 files, sha256", "at"]
    assert [row.case for row in rows] == ["first", "2 files, sha256", "below", "at"]
    assert len(rows.seconds) == 4
    assert slow.stopped


def test_what_is_not_known_at_the_end_is_waited_for() -> None:
    rows, slow = Rows(), Slow()
    with rows.beside(slow):
        rows.append(Row("native", "below", "pass"))
    assert [row.case for row in rows] == ["2 files, sha256", "below"]


def test_an_error_elsewhere_stops_the_reading(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "ASIDE_BYTES", 0)
    steps: list[Step] = []
    before = threading.active_count()
    check = Integrity(artifact, Manifest.read(artifact), steps.append)
    with pytest.raises(KeyError), Rows().beside(check):
        raise KeyError
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name.startswith("ThreadPoolExecutor"):
            thread.join(5)
    assert threading.active_count() <= before
    assert steps == []  # nobody waited for it
