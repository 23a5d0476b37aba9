# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint or an artifact, of any format: text to ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrconvert.checkpoint import open_checkpoint
from lrconvert.errors import InputError, require

Encode = Callable[[str], list[int]]


def tokenizer_of(artifact: Path) -> Encode:
    """Text to ids, without special tokens."""
    tokenizer = read_tokenizer(artifact)
    return lambda piece: tokenizer.encode(piece, add_special_tokens=False).ids


def read_tokenizer(artifact: Path) -> Any:
    """The artifact's tokenizer, as the library `tokenizers` has it; it reads texts of any length.

    Raises `InputError` where there is none, or a damaged one.
    """
    tokenizers = require("tokenizers", "hf", "reading a text")
    source: Any = open_checkpoint(artifact, tolerant=True).side_files().get("tokenizer.json")
    if source is None:
        raise InputError(f"{artifact}: no tokenizer.json, so text can't be tokenized")
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source.decode()
        json.loads(text)
        found = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # what the library raises for a damaged file
        raise InputError(f"{artifact}: tokenizer.json can't be used ({str(error)!r:.200})") from error
    found.no_truncation()  # a file may ask for both, of every text
    found.no_padding()
    return found
