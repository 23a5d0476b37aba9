# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: a model or an artifact, opened in its runtime, with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from lrconvert.checkpoint import locate, open_checkpoint
from lrconvert.errors import InputError, UsageError, require
from lrconvert.parity.codes import Options, codes_of, kind_of
from lrconvert.runtimes.base import Session

Encode = Callable[[str], list[int]]
Say = Callable[[str], None]


@contextmanager
def opened(
    reference: str,
    *,
    code: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    library: str | None = None,
    progress: AbstractContextManager[Say],
) -> Iterator[tuple[Session, Encode, Say]]:
    """A session, its tokenizer, and what reports progress. A folder runs its own code where it has some.

    Raises `UsageError` for a `code` that the artifact does not have, `InputError` for one without tokenizer.
    """
    artifact = locate(reference)
    for module in ("torch", "transformers") if kind_of(artifact) == "hf" else ():
        require(module, "hf", "an evaluation in transformers")
    options = Options(device=device, dtype=dtype, threads=threads, library=library)
    able = [found for found in codes_of(artifact, options) if code in (None, found.name)]
    if not able:
        raise UsageError(f"{reference} has no {code} code")
    with progress as say:
        say("loading")
        encode = tokenizer_of(artifact)
        with able[-1].open(artifact, options) as session:
            yield session, encode, say


def tokenizer_of(artifact: Path) -> Encode:
    """Text to ids, without special tokens."""
    tokenizer = read_tokenizer(artifact)
    return lambda piece: tokenizer.encode(piece, add_special_tokens=False).ids


def read_tokenizer(artifact: Path) -> Any:
    """The artifact's tokenizer, as the library `tokenizers` has it; it reads texts of any length.

    Raises `InputError` where there is none, or a damaged one.
    """
    tokenizers = require("tokenizers", "hf", "an evaluation on text")
    source: Any = open_checkpoint(artifact, tolerant=True).side_files().get("tokenizer.json")
    if source is None:
        raise InputError(f"{artifact}: no tokenizer.json, so no text can be read")
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source.decode()
        json.loads(text)
        found = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # what the library raises for a damaged file
        raise InputError(f"{artifact}: tokenizer.json can't be used ({str(error)!r:.200})") from error
    found.no_truncation()  # a file may ask for both, of every text
    found.no_padding()
    return found
