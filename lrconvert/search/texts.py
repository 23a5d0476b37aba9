# SPDX-License-Identifier: Apache-2.0
"""The texts of a search: files and folders, as text or as token ids that were made before (`.npy`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrconvert.errors import InputError
from lrconvert.search.objective import Encode, Text


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are meant: of a folder, its .txt files by name. Raises `InputError` where there are none."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(path.glob("*.txt"))
        if not inside:
            raise InputError(f"{path}: no .txt file in this folder")
        found += inside
    if not found:
        raise InputError("no text to search on", remedy="Give long texts with --text FILE")
    return found


def read_texts(paths: Sequence[Path], encode: Encode, vocab: int) -> list[Text]:
    """Every file's tokens; the digest is of the text in UTF-8, or of the .npy file.

    Raises `InputError` for what is no text, is empty, or has ids beyond the vocabulary.
    """
    return [_read_ids(path, vocab) if path.suffix == ".npy" else _read_text(path, encode) for path in text_files(paths)]


def _read_text(path: Path, encode: Encode) -> Text:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as text ({error})") from error
    if not content.strip():
        raise InputError(f"{path}: no text in it")
    tokens = np.asarray(encode(content), dtype=np.int64)
    return Text(path.name, hashlib.sha256(content.encode()).hexdigest(), tokens)


def _read_ids(path: Path, vocab: int) -> Text:
    try:
        ids = np.load(path, allow_pickle=False)
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as token ids ({error})") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise InputError(f"{path}: {ids.dtype} of shape {list(ids.shape)}; a list of integer token ids is needed")
    if ids.max() >= vocab or ids.min() < 0:
        raise InputError(f"{path}: token ids {ids.min()} … {ids.max()}; the model has {vocab}")
    return Text(path.name, hashlib.sha256(content).hexdigest(), ids.astype(np.int64))
