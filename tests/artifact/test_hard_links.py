# SPDX-License-Identifier: Apache-2.0
"""Hard links share bytes with the source: what is edited in place is edited in both, and `verify` notices."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import recipe_for
from support.pico import write_pico
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import open_model
from lrconvert.data import DATA
from lrconvert.parity import Options, Report
from lrconvert.targets import hf

QUICK = Options(threads=1, backends=())  # what is read off the files, no runtime


def baked(folder: Path, link: bool = True) -> Path:
    model = open_model(write_pico(folder / "m"))
    bake(hf.plan(model, recipe_for(model, even=True), folder / "a"), link=link)
    return folder / "a" / "model.safetensors"


def edit_in_place(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x01\x02\x03\x04")
    later = time.time_ns() + 10**9  # a file system's clock may tick slowly
    os.utime(weights, ns=(later, later))


def reasons(report: Report) -> list[str]:
    return [row.reason for row in report.failed if row.code == "files"]


@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("edited", ["a", "m"])
def test_an_edit_of_either_is_noticed(tmp_path: Path, verified: bool, edited: str) -> None:
    """Before a digest is known by the time of the edit, afterwards by the digest."""
    weights = baked(tmp_path)
    if verified:
        assert reasons(verify(weights.parent, options=QUICK)) == []
    edit_in_place(tmp_path / edited / weights.name)
    (reason,) = reasons(verify(weights.parent, options=QUICK))
    assert "has changed since it was" in reason and "hard link" in reason
    (reason,) = reasons(verify(weights.parent, options=QUICK))  # the digest of the edit was not taken over
    assert "has changed since it was" in reason


def test_times_of_copies_mean_nothing(tmp_path: Path) -> None:
    weights = baked(tmp_path)
    shutil.copytree(weights.parent, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / weights.name)
    assert reasons(verify(tmp_path / "copy", options=QUICK)) == []


def test_a_copy_is_no_link(tmp_path: Path) -> None:
    weights = baked(tmp_path, link=False)
    edit_in_place(tmp_path / "m" / weights.name)
    assert reasons(verify(weights.parent, options=QUICK)) == []  # its own bytes are what they were
    edit_in_place(weights)
    assert reasons(verify(weights.parent, options=QUICK)) == ["model.safetensors has changed since it was written"]


def test_the_installed_package_s_weights_are_never_linked(tmp_path: Path) -> None:
    """By whatever bakes the embedded model; an explicit --link is the user's word."""
    model = open_model("demo")
    assert model.checkpoint.path.is_relative_to(DATA)
    manifest = bake(hf.plan(model, recipe_for(model), tmp_path / "a"))
    assert not any(record.linked for record in manifest.files.values())
    assert not (tmp_path / "a" / "model.safetensors").samefile(DATA / "demo" / "model.safetensors")
