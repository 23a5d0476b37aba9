# SPDX-License-Identifier: Apache-2.0
"""Long texts as tokens: files, folders, token ids (`.npy`) and data sets (`hf:…`)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrconvert.checkpoint.tokenizer import Encode
from lrconvert.errors import InputError, UsageError
from lrconvert.evals.data_sets import PREFIX, Address, open_rows

MOST_ROWS = 10_000  # rows of a data set that are searched for long ones


@dataclass(frozen=True)
class Text:
    """A text: name and digest are recorded, documents are cut from the tokens.

    The digest is of the text in UTF-8, or of the .npy file; `data_set` says which row of which it is.
    """

    name: str
    sha256: str
    tokens: NDArray[np.int64]
    data_set: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """For recipes, journals and reports."""
        found = {"name": self.name, "sha256": self.sha256, "tokens": len(self.tokens)}
        return found if self.data_set is None else {**found, "data_set": self.data_set}


Source = Path | Address | Text


def sources_of(named: Sequence[str | Path | Text]) -> list[Source]:
    """Files, the .txt files of folders in order, addresses of data sets (`hf:…`), and texts that are read already.

    Raises `InputError` for an empty folder and for no text at all, `UsageError` for a malformed address.
    """
    found: list[Source] = []
    for name in named:
        if isinstance(name, Text):
            found.append(name)
            continue
        if str(name).startswith(PREFIX):
            found.append(Address.parse(str(name)))
            continue
        path = Path(name)
        inside = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path}: no .txt file in this folder")
        found += inside
    if not found:
        raise UsageError("no text to read", remedy="Give long texts with --text FILE")
    return found


def read_texts(
    sources: Sequence[Source], tokenizer: Callable[[], Encode], *, vocab: int | None = None, tokens: int = 1
) -> list[Text]:
    """The texts of every source; of a data set, the first rows with at least `tokens` tokens.

    `tokenizer` is called only if there is text: token ids need none. Raises `InputError` for a file that is no text or
    empty and for ids beyond the vocabulary (if that is known), `EnvironmentFailure` where a data set can't be reached.
    """
    ids = [isinstance(source, Text) or (isinstance(source, Path) and source.suffix == ".npy") for source in sources]
    encode = _no_tokenizer if all(ids) else tokenizer()
    found: list[Text] = []
    for source in sources:
        if isinstance(source, Text):
            found.append(source)
        elif isinstance(source, Address):
            found += _read_rows(source, encode, tokens)
        else:
            found.append(_read_ids(source, vocab) if source.suffix == ".npy" else _read_file(source, encode))
    return found


def _no_tokenizer(text: str) -> list[int]:
    raise AssertionError("token ids need no tokenizer")


def _read_file(path: Path, encode: Encode) -> Text:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8 ({error})") from error
    if not content.strip():
        raise InputError(f"{path}: no text in it")
    return _text(path.name, content, encode)


def _text(name: str, content: str, encode: Encode, data_set: dict[str, Any] | None = None) -> Text:
    tokens = np.asarray(encode(content), dtype=np.int64)
    return Text(name, hashlib.sha256(content.encode()).hexdigest(), tokens, data_set)


def _read_ids(path: Path, vocab: int | None) -> Text:
    try:
        content = path.read_bytes()
        ids = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)  # np.load takes archives too
    except Exception as error:  # numpy raises many things for a damaged head
        raise InputError(f"{path}: can't be read as token ids ({error})") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise InputError(f"{path}: {ids.dtype} of shape {list(ids.shape)}; a list of integer token ids is needed")
    if ids.min() < 0 or (vocab is not None and ids.max() >= vocab):
        raise InputError(f"{path}: token ids {ids.min()} … {ids.max()}; the model has {vocab}")
    return Text(path.name, hashlib.sha256(content).hexdigest(), ids.astype(np.int64))


def _read_rows(address: Address, encode: Encode, tokens: int) -> list[Text]:
    """The first long enough rows: as many as were asked for, or what there is of the default number."""
    origin, rows = open_rows(address)
    found: list[Text] = []
    longest = 0
    for number, content in _first(rows, MOST_ROWS):
        text = _text(f"{origin['name']}, {origin['split']} row {number}", content, encode, {**origin, "row": number})
        longest = max(longest, len(text.tokens))
        if len(text.tokens) >= tokens:
            found.append(text)
        if len(found) == address.rows:
            return found
    if not found or address.count is not None:
        raise InputError(
            f"{address}: {len(found)} of its first rows have {tokens} tokens or more, {address.rows} are needed; the "
            f"longest row read has {longest}",
            remedy="Use shorter lengths" + (f", or #{len(found)}" if found else ", or name a data set of books"),
        )
    return found


def _first(rows: Iterator[tuple[int, str]], most: int) -> Iterator[tuple[int, str]]:
    for number, content in rows:
        if number >= most:
            return
        yield number, content
