# SPDX-License-Identifier: Apache-2.0
"""A verification is recorded in the artifact that was verified, and in no other; what stops it blocks nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import recipe_for
from support.verifying import verify

from lrconvert.artifact import recording
from lrconvert.artifact.bake import bake
from lrconvert.artifact.manifest import MANIFEST, Manifest, manifest_path
from lrconvert.artifact.recording import Evidence
from lrconvert.artifact.staging import Staging
from lrconvert.checkpoint import Model
from lrconvert.parity import Options
from lrconvert.targets import gguf, hf
from lrconvert.writing import temporary_of

QUICK = Options(threads=1, backends=())  # what is read off the files, no runtime
Make = Callable[..., Path]


@pytest.fixture
def make(pico: Callable[..., Model], tmp_path: Path) -> Make:
    """An artifact of `tiers`, in the place of an earlier one where there is one."""
    model = pico("llama")

    def made(name: str = "a", tiers: int = 2) -> Path:
        target = gguf if name.endswith(".gguf") else hf
        bake(target.plan(model, recipe_for(model, tiers=tiers, even=True), tmp_path / name), force=True)
        return tmp_path / name

    return made


@pytest.mark.parametrize("change", ["another artifact", "the same again", "a file", "gone"])
def test_a_verification_that_outlives_its_artifact_records_nothing(make: Make, change: str) -> None:
    """Put in its place while the first rows appear: the new manifest stays as it was written, and the row says so."""
    artifact, seen = make(), []

    def replace(row: object) -> None:
        if seen:
            return
        seen.append(row)
        if change == "gone":
            (artifact / MANIFEST).unlink()
        elif change == "a file":
            (artifact / "config.json").write_bytes((artifact / "config.json").read_bytes() + b" ")
        else:
            make(tiers=3 if change == "another artifact" else 2)
        seen.extend(path.read_bytes() for path in [artifact / MANIFEST] if path.exists())

    report = verify(artifact, options=QUICK, watch=replace)
    (row,) = (row for row in report.failed if row.case == "the artifact at the end")
    assert "nothing was recorded: verify again" in row.reason and not report.passed
    if change == "gone":
        assert not (artifact / MANIFEST).exists()
    else:
        assert (artifact / MANIFEST).read_bytes() == seen[1] and Manifest.read(artifact).parity is None


def test_two_at_once_keep_both_reports_and_all_digests(make: Make) -> None:
    artifact = make()
    manifest = Manifest.read(artifact)
    evidence, other = Evidence.of(artifact, manifest), Evidence.of(artifact, manifest)
    for record in manifest.files.values():
        record.sha256 = record.sha256 or "0" * 64
    assert evidence.record({"passed": True, "summary": "one"}, manifest.files, "vllm") is None
    assert other.record({"passed": True, "summary": "two"}, {}, None) is None
    found = Manifest.read(artifact)
    assert found.parity == {"passed": True, "summary": "two", "engines": {"vllm": {"passed": True, "summary": "one"}}}
    assert all(record.sha256 for record in found.files.values())


def test_the_card_may_be_edited_meanwhile(make: Make) -> None:
    artifact = make()
    report = verify(artifact, options=QUICK, watch=lambda row: (artifact / "README.md").write_text("mine"))
    assert report.failed == [] and Manifest.read(artifact).parity is not None


def test_nothing_is_recorded_while_a_conversion_writes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the lock that it holds; a GGUF's is named after the file."""
    monkeypatch.setattr(recording, "PATIENCE", 0)
    for artifact in (make(), make("m.gguf")):
        evidence = Evidence.of(artifact, Manifest.read(artifact))
        before = manifest_path(artifact).read_bytes()
        with Staging(artifact).locked():
            assert evidence.record({"passed": True}, {}, None) == "another lrconvert was writing to it"
        assert manifest_path(artifact).read_bytes() == before
        assert evidence.record({"passed": True}, {}, None) is None
        assert not list(artifact.parent.glob(".*lock"))


def test_a_full_disk_leaves_the_old_manifest_and_nothing_else(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make()
    before = {path: path.read_bytes() for path in artifact.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        verify(artifact, options=QUICK)
    assert {path: path.read_bytes() for path in artifact.iterdir()} == before
    assert not list(artifact.parent.glob(".*lock"))


def test_what_a_killed_verification_leaves_blocks_no_conversion(make: Make) -> None:
    for artifact in (make(), make("m.gguf")):
        temporary = temporary_of(manifest_path(artifact))
        temporary.write_text('{"half')
        make(artifact.name, tiers=2)
        assert not temporary.exists()
        assert json.loads(manifest_path(artifact).read_text())["parity"] is None
