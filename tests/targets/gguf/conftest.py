# SPDX-License-Identifier: Apache-2.0
"""Fixtures that put vocabularies and files into real llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.vocabularies import STYLES, write_gguf
from tokenizers import Tokenizer

from lrconvert.errors import EnvironmentFailure
from lrconvert.parity import Options
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.llama_cpp import WORKER, open_session
from lrconvert.runtimes.llama_library import find_library
from lrconvert.targets.gguf.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def library() -> Any:
    try:
        return find_library()
    except EnvironmentFailure as failure:
        pytest.skip(str(failure))


@pytest.fixture(scope="session")
def styles() -> dict[str, Tokenizer]:
    """A small byte-level BPE of every style."""
    return {name: style.tokenizer() for name, style in STYLES.items()}


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """One process of llama.cpp for all files that are known to load."""
    started = Interpreter(WORKER)
    yield started
    started.close()


@pytest.fixture
def differing(library: Any, interpreter: Interpreter, tmp_path: Path) -> Callable[..., set[str]]:
    """Names of the texts of which llama.cpp makes other tokens than `tokenizer` does."""

    def compare(
        tokenizer: Tokenizer,
        written: Vocabulary,
        texts: Mapping[str, str],
        *,
        add_special: bool = False,
        name: str = "pico",
    ) -> set[str]:
        path = write_gguf(tmp_path / "vocabulary.gguf", written.metadata, name)
        with open_session(path, library=library, threads=1, interpreter=interpreter) as session:
            found = session.tokenise(list(texts.values()), add_special=add_special)
        expected = [tokenizer.encode(text, add_special_tokens=add_special).ids for text in texts.values()]
        return {name for name, theirs, ours in zip(texts, expected, found, strict=True) if theirs != ours}

    return compare


@pytest.fixture(scope="session")
def options(interpreter: Interpreter) -> Options:
    """For `verify`: one interpreter for all files."""
    return Options(threads=1, interpreter=interpreter)
