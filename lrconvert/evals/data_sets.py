# SPDX-License-Identifier: Apache-2.0
"""Texts of data sets, from the Hub or from a folder, streamed by the library `datasets`: `hf:NAME…`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.errors import EnvironmentFailure, InputError, LrconvertError, UsageError, require

PREFIX = "hf:"
ROWS = 4  # long enough rows that are taken where no number is named: as many as `--windows` has
TEXT = "text"  # the column that is taken where none is named
SPELLING = "hf:NAME[@REVISION][:[CONFIG:]SPLIT][?column=COLUMN][#ROWS]"
_ADDRESS = re.compile(
    r"hf:(?P<name>[^:@?#]+)(@(?P<revision>[^:?#]+))?((:(?P<config>[^:?#]+))?:(?P<split>[^:?#]+))?"
    r"(\?column=(?P<column>[^#]+))?(#(?P<count>[1-9]\d{0,5}))?"
)


@dataclass(frozen=True)
class Address:
    """Rows of a data set, as the command line names them (`SPELLING`).

    >>> Address.parse("hf:emozilla/pg19-test:test#2")
    Address(name='emozilla/pg19-test', revision=None, config=None, split='test', column=None, count=2)
    """

    name: str  # on the Hub, or the path of a folder
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises `UsageError` for what is no address."""
        matched = _ADDRESS.fullmatch(text)
        if matched is None:
            raise UsageError(f"{text!r} does not name a data set", remedy=f"Write {SPELLING}")
        values = matched.groupdict()
        return cls(**{**values, "count": int(values["count"]) if values["count"] else None})

    @property
    def rows(self) -> int:
        return self.count or ROWS

    @property
    def local(self) -> bool:
        """A folder on this machine. What begins like a path is no name on the Hub, whether it is there or not."""
        return self.name.startswith((".", "/", "~")) or Path(self.name).exists()

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f":{self.split}" if self.split else "")


def open_rows(address: Address) -> tuple[dict[str, Any], Iterator[tuple[int, str]]]:
    """Where the rows come from (name, config, split, revision and column, as a report has them), and each one's
    number and text.

    Raises `InputError` for a data set, split or column that is not there, `EnvironmentFailure` without network or
    library.
    """
    datasets = require("datasets", "texts", f"{address}")
    with _explained(address):
        revision = None if address.local else _commit(address)
        path = str(Path(address.name).expanduser()) if address.local else address.name
        if address.local and not Path(path).is_dir():  # the library would ask the Hub for its last part
            raise InputError(f"{address}: no such folder")
        splits = datasets.load_dataset(path, address.config, revision=address.revision or revision, streaming=True)
        split = _split(address, list(splits))
        rows = iter(splits[split])
        first = next(rows, None)
    if first is None:
        raise InputError(f"{address}: has no rows")
    column = _column(address, first)
    origin = {
        "name": Path(path).resolve().name if address.local else address.name,  # reports travel: no path of a machine
        "config": address.config,
        "split": split,
        "revision": revision,
        "column": column,
    }
    return origin, _texts(address, column, first, rows)


def _commit(address: Address) -> str | None:
    """The commit that the data set's name means now: named in reports, and what is loaded where no other is named."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(address.name, revision=address.revision).sha


def _split(address: Address, splits: list[str]) -> str:
    wanted = address.split or ("test" if "test" in splits else splits[0] if len(splits) == 1 else None)
    if wanted is None:
        raise InputError(f"{address}: has the splits {', '.join(splits)}", remedy=f"Name one: {address}:{splits[0]}")
    if wanted not in splits:
        raise InputError(f"{address}: no split {wanted!r}; there are {', '.join(splits)}")
    return wanted


def _column(address: Address, row: dict[str, Any]) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    wanted = address.column or (TEXT if TEXT in strings else strings[0] if len(strings) == 1 else None)
    if wanted in strings:
        return wanted
    listed = f"columns with text: {', '.join(strings) or 'none'}"
    if wanted is not None:
        raise InputError(f"{address}: no text in column {wanted!r}; {listed}")
    remedy = f"Name one: {address}?column={strings[0]}" if strings else "Name another data set"
    raise InputError(f"{address}: no column {TEXT!r}; {listed}", remedy=remedy)


def _texts(
    address: Address, column: str, first: dict[str, Any], rows: Iterator[dict[str, Any]]
) -> Iterator[tuple[int, str]]:
    row: dict[str, Any] | None = first
    number = 0
    while row is not None:
        if isinstance(row.get(column), str):
            yield number, row[column]
        number += 1
        with _explained(address):
            row = next(rows, None)


@contextlib.contextmanager
def _explained(address: Address) -> Iterator[None]:
    """Turns what `datasets` and the Hub raise into our errors."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases are those of the Hub's HTTP library, whichever that is.
    known: tuple[Any, ...] = (RuntimeError, ValueError, OSError, *HfHubHTTPError.__bases__)
    try:
        yield
    except known as error:
        raise _explanation(address, error) from error


def _explanation(address: Address, error: BaseException) -> LrconvertError:
    from huggingface_hub import errors

    line = " ".join(str(error).split())[:300].rstrip(".")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{address}: has no revision {address.revision!r} on the Hub")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return InputError(
            f"{address}: no data set on the Hub that you can read",
            remedy="For a gated one log in first: `hf auth login`",
        )
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in str(error):
        return InputError(
            f"{address} needs its own loading script, which lrconvert never runs",
            remedy=f"The Hub may have it as plain files: {PREFIX}{address.name}@refs/convert/parquet",
        )
    # A file that is missing is an answer, unless it is one that would have been downloaded.
    missing = isinstance(error, FileNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError)
    if address.local or missing or isinstance(error, ValueError | RuntimeError):
        return InputError(f"{address}: {line}")  # also a config that is not there, damaged files
    return EnvironmentFailure(
        f"{address} can't be reached ({type(error).__name__}: {line})",
        remedy="Check the network and HF_HUB_OFFLINE, or give local texts",
    )
