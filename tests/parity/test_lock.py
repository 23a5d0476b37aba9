# SPDX-License-Identifier: Apache-2.0
"""A lock of measured values: recorded once, then what drifts by more than noise fails and names the versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Result

from lrconvert.artifact.checks import Row
from lrconvert.errors import InputError, UsageError
from lrconvert.parity import Report
from lrconvert.parity.lock import Lock, check_lock, lock_rows
from lrconvert.parity.report import Rows

SETTINGS = {"profile": "full"}
PASS = Row("native", "far end", "pass", length=512, kl_mean=2e-9, kl_max=1e-8, bound=1e-6)
KNOWN = Row("native", "decode across 256", "known", length=256, kl_mean=0.04, kl_max=0.2)
FILES = Row("files", "9 files, sha256", "pass")


def report(*rows: Row, version: str = "5.23.0") -> Report:
    made = Report("a", "b", "c", rows=Rows(), runtimes={"native": {"class": "Llama", "transformers": version}})
    made.rows += rows
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A lock of the two values."""
    lock_rows(report(PASS, KNOWN, FILES), tmp_path / "v.lock", None, SETTINGS)
    return tmp_path / "v.lock"


def test_a_lock_is_written_once_and_reads_back(path: Path) -> None:
    """The same values pass, and the file stays as it is."""
    before = path.read_bytes()
    rows = lock_rows(report(PASS, KNOWN, FILES), path, check_lock(path, SETTINGS), SETTINGS)
    assert [(row.code, row.verdict) for row in rows] == [("lock", "pass")]
    assert path.read_bytes() == before
    assert [value.case for value in Lock.read(path).values] == ["far end", "decode across 256"]


CHANGES = {
    "noise": (replace(PASS, kl_mean=1.5e-8), None),  # within eight times
    "noise far below the bound": (replace(PASS, kl_mean=0.0), None),
    "a thousand times": (replace(PASS, kl_mean=5e-7), "mean KL was 2.0e-09, is 5.0e-07"),
    "a known value within noise": (replace(KNOWN, kl_mean=0.041), None),
    "a known value that grew": (replace(KNOWN, kl_mean=0.06), "KL was 0.04, is 0.06"),
    "a known value that fell": (replace(KNOWN, kl_mean=1e-9), "KL was 0.04, is 1e-09"),
    "another verdict": (replace(KNOWN, verdict="pass"), "was known, is pass"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_drifts_by_more_than_noise_fails(path: Path, change: str) -> None:
    new, expected = CHANGES[change]
    rows = [new if new.case == old.case else old for old in (PASS, KNOWN)]
    found = lock_rows(report(*rows, version="5.24.0"), path, Lock.read(path), SETTINGS)
    if expected is None:
        assert [row.verdict for row in found] == ["pass"]
    else:
        assert [row.verdict for row in found] == ["fail"]
        assert expected in found[0].reason
        assert found[0].reason.endswith("what changed since: native: transformers 5.23.0 → 5.24.0")


def test_a_case_that_is_gone_fails(path: Path) -> None:
    found = lock_rows(report(PASS), path, Lock.read(path), SETTINGS)
    assert "is not measured any more; no version changed since" in found[0].reason


def test_a_failed_verification_records_nothing(tmp_path: Path) -> None:
    rows = lock_rows(report(replace(PASS, verdict="fail")), tmp_path / "v.lock", None, SETTINGS)
    assert rows[0].verdict == "skipped" and not (tmp_path / "v.lock").exists()


def test_other_options_measure_other_values(path: Path) -> None:
    with pytest.raises(UsageError, match="profile full, now quick"):
        check_lock(path, {"profile": "quick"})


@pytest.mark.parametrize("damage", ["", "[]", '{"lock_version": 1}', "nan"])
def test_a_damaged_lock_is_bad_input(path: Path, damage: str) -> None:
    """A value that is no number too."""
    path.write_text(path.read_text().replace("2e-09", "NaN") if damage == "nan" else damage)
    with pytest.raises(InputError, match="not a lock"):
        Lock.read(path)
    path.write_text(json.dumps({"lock_version": 9, "settings": {}, "versions": {}, "values": []}))
    with pytest.raises(InputError, match="version 9"):
        Lock.read(path)


def test_the_command_records_then_compares(
    cli: Callable[..., Result], plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """verify --lock twice; then an edited lock, which fails with exit code 5."""
    folder, recipe = plain
    assert cli("hf", folder, "--recipe", recipe, "-o", tmp_path / "a").code == 0
    asked = ("verify", tmp_path / "a", "--profile", "quick", "--code", "custom", "--lock", tmp_path / "v.lock")
    assert "values recorded in v.lock" in cli(*asked).out
    again = cli(*asked)
    assert again.code == 0 and "values as in v.lock" in again.out
    lock = json.loads((tmp_path / "v.lock").read_text())
    lock["values"][0]["case"] = "another"
    lock["versions"]["torch"] = "1.0"
    (tmp_path / "v.lock").write_text(json.dumps(lock))
    drifted = cli(*asked)
    assert drifted.code == 5 and "torch 1.0 → " in drifted.out
    assert cli("verify", tmp_path / "a", "--files-only", "--lock", tmp_path / "v.lock").code == 2
