# SPDX-License-Identifier: Apache-2.0
"""A lock of a verification: the values that were measured, kept in a file, so that a later run sees one drift.

    rows = lock_rows(report, Path("verify.lock"), settings)

A bound says whether an artifact is right; a lock says whether it still is what it was. A new version of an engine may
make other noise, and stay within every bound, while it became worse by a thousand times. The first run that passes
writes the file. Later ones compare, and name the versions that changed. Only `known` values may not fall either: they
are what code gets wrong by itself, so that a smaller one means that it computes something else.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from lrconvert import __version__
from lrconvert.artifact.checks import Row
from lrconvert.errors import InputError, UsageError, first_problem
from lrconvert.parity.report import Report
from lrconvert.parity.tolerances import LOCK_FLOOR, LOCK_KNOWN, LOCK_LEAST, NOISE
from lrconvert.writing import replace_file

CODE = "lock"
LOCK_VERSION = 1
MAX_LOCK_BYTES = 16 * 2**20
_OWN = ("numpy", "torch")  # what the reference computes with
_STRICT: Any = {"strict": True, "allow_inf_nan": False, "extra": "forbid"}


@dataclass(frozen=True)
class Value:
    """What one case measured: mean and largest KL in nats."""

    __pydantic_config__: ClassVar = _STRICT

    code: str
    case: str
    verdict: str
    length: int | None
    kl_mean: Annotated[float, Ge(0)]
    kl_max: Annotated[float, Ge(0)] | None = None
    bound: Annotated[float, Ge(0)] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.code, self.case


@dataclass(frozen=True)
class Lock:
    """The file. `settings`: options that decide what is measured; `versions`: what measured it."""

    __pydantic_config__: ClassVar = _STRICT

    lock_version: int
    settings: dict[str, str]
    versions: dict[str, str]
    values: list[Value]

    @classmethod
    def of(cls, report: Report, settings: dict[str, str]) -> Lock:
        return cls(LOCK_VERSION, settings, versions_of(report), list(_values(report)))

    @classmethod
    def read(cls, path: Path) -> Lock:
        """`InputError` for a file that is no lock, or one of a later version."""
        from pydantic import TypeAdapter, ValidationError

        try:
            if path.stat().st_size > MAX_LOCK_BYTES:
                raise InputError(f"{path}: not a lock ({path.stat().st_size} bytes)")
            found = TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror or error})") from error
        except ValidationError as error:
            raise InputError(
                f"{path}: not a lock ({first_problem(error, 'the file')})", remedy="Remove it to record anew"
            ) from error
        if found.lock_version != LOCK_VERSION:
            raise InputError(f"{path}: lock version {found.lock_version}; this lrconvert reads {LOCK_VERSION}")
        return found

    def write(self, path: Path) -> None:
        replace_file(path, json.dumps(asdict(self), indent=1) + "\n")


def versions_of(report: Report) -> dict[str, str]:
    """Of everything that had a part in the values."""
    found = {"lrconvert": __version__, "python": platform.python_version(), "machine": platform.machine()}
    found |= {name: version(name) for name in _OWN if find_spec(name) is not None}
    for backend, info in report.runtimes.items():
        found |= {f"{backend}: {key}": str(value) for key, value in info.items()}
    return found


def _values(report: Report) -> Iterator[Value]:
    for row in report.rows:
        if row.kl_mean is not None and row.kl_mean == row.kl_mean:
            yield Value(row.code, row.case, row.verdict, row.length, row.kl_mean, row.kl_max, row.bound)


def check_lock(path: Path, settings: dict[str, str]) -> Lock | None:
    """The lock to compare with, None where the file is not there yet. Asked before anything is measured.

    Raises `UsageError` for one that was recorded with other options, whose values are others.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise UsageError(f"--lock {path}: no such folder")
        return None
    lock = Lock.read(path)
    if lock.settings != settings:
        keys = sorted({*lock.settings, *settings})
        other = [key for key in keys if lock.settings.get(key) != settings.get(key)]
        told = ", ".join(f"{key} {lock.settings.get(key)}, now {settings.get(key)}" for key in other)
        raise UsageError(
            f"--lock {path}: recorded with other options ({told})",
            remedy="Give the same options, or remove the file to record anew",
        )
    return lock


def lock_rows(report: Report, path: Path, lock: Lock | None, settings: dict[str, str]) -> list[Row]:
    """What drifted since the lock was recorded. Without one, records it, if the verification passed."""
    if lock is None:
        if not report.passed:
            return [Row(CODE, path.name, "skipped", reason=f"not recorded: the verification failed ({path.name})")]
        Lock.of(report, settings).write(path)
        return [Row(CODE, f"{len(list(_values(report)))} values recorded in {path.name}", "pass")]
    now = {value.key: value for value in _values(report)}
    drifted = [reason for old in lock.values if (reason := drift(old, now.get(old.key))) is not None]
    if not drifted:
        return [Row(CODE, f"{len(lock.values)} values as in {path.name}", "pass")]
    why = _changed(lock.versions, versions_of(report))
    return [Row(CODE, reason.partition(":")[0][:60], "fail", reason=f"{reason}; {why}") for reason in drifted]


def drift(old: Value, new: Value | None) -> str | None:
    """How a value left what noise explains, in words; None where it did not."""
    where = f"{old.code} code, {old.case}"
    if new is None:
        return f"{where}: is not measured any more"
    if new.verdict != old.verdict:
        return f"{where}: was {old.verdict}, is {new.verdict}"
    if old.bound is not None:
        most = NOISE * max(old.kl_mean, LOCK_FLOOR * old.bound)
        grown = new.kl_mean > most
        return f"{where}: mean KL was {old.kl_mean:.1e}, is {new.kl_mean:.1e}" if grown else None
    low, high = sorted((old.kl_mean, new.kl_mean))
    moved = high > LOCK_LEAST and high > LOCK_KNOWN * low
    return f"{where}: KL was {old.kl_mean:.3g}, is {new.kl_mean:.3g}" if moved else None


def _changed(then: dict[str, str], now: dict[str, str]) -> str:
    keys = sorted({*then, *now})
    told = [f"{key} {then.get(key, 'none')} → {now.get(key, 'none')}" for key in keys if then.get(key) != now.get(key)]
    if told:
        return f"what changed since: {', '.join(told)}"
    return "no version changed since: look at the artifact, the model and the machine"
