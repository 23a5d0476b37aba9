# SPDX-License-Identifier: Apache-2.0
"""Published tokenizers in a GGUF: what llama.cpp makes of more than 200 awkward texts, against the tokenizers library.

The tokenizers are downloaded: `pytest -m network -n 0 tests/targets/gguf/test_published_tokenizers.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.awkward import AWKWARD
from support.pico import WINDOW, write_pico
from support.published import DIGESTS, FILES, published_tokenizer

from lrconvert.artifact.bake import bake
from lrconvert.artifact.checks import Row
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.gguf_header import read_header
from lrconvert.parity.tokens import tokenisation
from lrconvert.recipe import derive_recipe
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.llama_cpp import open_session
from lrconvert.targets import gguf

NFC, SPECIAL, MARKS = "normalises text to NFC", "takes some texts for special tokens", "no class for combining marks"


@dataclass(frozen=True)
class Found:
    """The name that is written, and how many texts llama.cpp is known to answer otherwise, with every reason."""

    pre: str
    known: int = 0
    reasons: tuple[str, ...] = ()


PUBLISHED: Mapping[str, Found] = {
    "deepseek_v3": Found("deepseek-v3"),
    "gemma3": Found("default"),
    "gpt4o": Found("gpt-4o", 13, (MARKS,)),
    "gptoss": Found("granite-embed-multi-97m"),
    "llama2": Found("default"),
    "llama3_1": Found("llama-bpe"),
    "qwen3": Found("qwen2", 9, (NFC, SPECIAL)),
}


def test_every_download_has_an_expectation() -> None:
    assert PUBLISHED.keys() == DIGESTS.keys()
    assert len(set(AWKWARD.values())) == len(AWKWARD) >= 200


@pytest.mark.network
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_tokenizer(name: str, interpreter: Interpreter, tmp_path: Path) -> None:
    """In a whole file, from a folder: equal, or known for the reasons that are named here, in as many texts."""
    rows = {row.verdict: row for row in _rows(name, None, interpreter, tmp_path)}
    expected = PUBLISHED[name]
    assert rows.keys() == ({"pass", "known"} if expected.known else {"pass"}), rows
    if expected.known:
        assert rows["known"].case.startswith(f"{expected.known} of ")
        assert all(reason in rows["known"].reason for reason in expected.reasons)
        assert rows["known"].reason.count("llama.cpp") == len(expected.reasons)


@pytest.mark.network
@pytest.mark.parametrize(("name", "pre"), [("gpt4o", "granite-embed-multi-97m"), ("gptoss", "gpt-4o")])
def test_the_other_name(name: str, pre: str, interpreter: Interpreter, tmp_path: Path) -> None:
    """A name that can be asked for: with marks for newer versions of llama.cpp, without for older ones."""
    rows = {row.verdict for row in _rows(name, pre, interpreter, tmp_path)}
    assert rows == ({"pass"} if name == "gpt4o" else {"pass", "known"})


@pytest.mark.network
def test_a_wrong_name_fails(interpreter: Interpreter, tmp_path: Path) -> None:
    """The texts can tell: DeepSeek's vocabulary under another name of theirs."""
    assert "fail" in {row.verdict for row in _rows("deepseek_v3", "deepseek-llm", interpreter, tmp_path)}


def _rows(name: str, pre: str | None, interpreter: Interpreter, tmp_path: Path) -> list[Row]:
    tokenizer = published_tokenizer(name)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]
    folder = write_pico(tmp_path / "model", vocab_size=max(ids) + 1, hidden_size=32, num_hidden_layers=1)
    for file in FILES:
        shutil.copy(tokenizer / file, folder)
    model = open_model(folder)
    output = tmp_path / "model.gguf"
    recipe = derive_recipe(
        "yarn", 2, family="llama", rotary_dim=16, theta=10000.0, original_window=WINDOW, uniform=True
    )
    bake(gguf.plan(model, recipe, output, gguf.Options(type="bf16", tokenizer_pre=pre)))
    assert read_header(output).metadata["tokenizer.ggml.pre"] == (pre or PUBLISHED[name].pre)
    with open_session(output, threads=1, interpreter=interpreter) as session:
        return tokenisation(model.checkpoint.side_files(), session, list(AWKWARD.values()))
