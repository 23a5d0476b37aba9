# SPDX-License-Identifier: Apache-2.0
"""The name by which llama.cpp knows a way to split text: found in the structure of tokenizer.json, or asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from support.cases import case
from support.vocabularies import LEGACY, LLAMA3, byte_level, changed, files_of, rows_of, split, spm
from tokenizers import Tokenizer, pre_tokenizers

from lrconvert.checkpoint import gguf_tokenizer
from lrconvert.errors import UnsupportedError, UsageError
from lrconvert.targets.gguf import pre_tokenizers as names
from lrconvert.targets.gguf.vocabulary import vocabulary

Styles = Mapping[str, Tokenizer]


def test_an_unknown_structure_is_refused(styles: Styles, differing: Callable[..., set[str]]) -> None:
    """The message shows it, and names the way out, which works."""
    tokenizer = Tokenizer.from_str(styles["gpt-2"].to_str())
    tokenizer.pre_tokenizer = split(r"\d|\D+")
    with pytest.raises(UnsupportedError) as caught:
        vocabulary(files_of(tokenizer), rows_of(tokenizer))
    for part in ("tokenizer.json", r"\\d|\\D+", "llama-bpe", "--tokenizer-pre NAME"):
        assert part in str(caught.value)
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer), pre="deepseek-llm")
    assert written.metadata["tokenizer.ggml.pre"] == "deepseek-llm"
    assert any("pre-tokenizer without a known name" in note for note in written.notes)
    assert differing(tokenizer, written, {"x": "x"}) == set()  # it loads


def test_another_name_of_the_same(styles: Styles) -> None:
    """Several names of llama.cpp mean one way to split: each is written as asked, without a note."""
    tokenizer = styles["llama-bpe"]
    for pre in ("llama-bpe", "llama3", "falcon3"):
        written = vocabulary(files_of(tokenizer, {"eos_token": "<|eot_id|>"}), rows_of(tokenizer), pre=pre)
        assert (written.metadata["tokenizer.ggml.pre"], written.notes) == (pre, ())


def test_a_name_that_llama_cpp_does_not_know(styles: Styles) -> None:
    """Refused, with those that there are."""
    refused = r"--tokenizer-pre .*: llama.cpp has no such pre-tokenizer.*llama-bpe"
    for pre in ("", "nonsense", "whitespace", "LLAMA-BPE"):
        with case(pre), pytest.raises(UsageError, match=refused):
            vocabulary(files_of(styles["gpt-2"]), rows_of(styles["gpt-2"]), pre=pre)


def test_where_a_name_does_not_apply() -> None:
    """To SentencePiece and to a model without a tokenizer."""
    tokenizer = spm(LEGACY)
    with pytest.raises(UsageError, match="this vocabulary is SentencePiece"):
        vocabulary(files_of(tokenizer), rows_of(tokenizer), pre="llama-bpe")
    with pytest.raises(UsageError, match="the model has no tokenizer"):
        vocabulary({}, {"vocab_size": 8}, pre="llama-bpe")


def test_names_are_known_to_both_sides() -> None:
    """What is written can be read; every row of the reader's table is a name of llama.cpp."""
    assert set(names.CANONICAL) <= set(gguf_tokenizer.PRE_TOKENIZERS) <= names.LLAMA_CPP_NAMES
    for name, row in gguf_tokenizer.PRE_TOKENIZERS.items():
        canonical = names.name_of(row)
        assert canonical in names.CANONICAL, name
        assert gguf_tokenizer.PRE_TOKENIZERS[canonical] == row or name == "default", name


SPELLINGS = {
    "line ends written out": split(LLAMA3.replace(r"\r", "\r").replace(r"\n", "\n")),
    "cases written out": split(
        LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
    ),
    "matches removed from what they split": split(LLAMA3, behavior="removed", invert=True),
    "a sequence in a sequence": pre_tokenizers.Sequence([split(LLAMA3)]),
}


def test_spellings_of_the_same() -> None:
    """One way to split is known however a program wrote it."""
    for spelling, pre in SPELLINGS.items():
        tokenizer = byte_level(pre, whole_words=True)
        found = vocabulary(files_of(tokenizer), rows_of(tokenizer)).metadata["tokenizer.ggml.pre"]
        assert found == "llama-bpe", spelling


def steps(value: dict[str, Any]) -> list[Any]:
    return value["pre_tokenizer"]["pretokenizers"]


CLOSE: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "a space in front": lambda value: steps(value)[1].update(add_prefix_space=True),
    "matches removed": lambda value: steps(value)[0].update(behavior="Removed"),
    "inverted": lambda value: steps(value)[0].update(invert=True),
    "digits alone": lambda value: steps(value).insert(0, {"type": "Digits", "individual_digits": True}),
    "punctuation alone": lambda value: steps(value).insert(0, {"type": "Punctuation", "behavior": "Isolated"}),
    "in the other order": lambda value: steps(value).reverse(),
    "NFKC": lambda value: value.update(normalizer={"type": "NFKC"}),
    "lower case": lambda value: value.update(normalizer={"type": "Lowercase"}),
}


def test_structures_that_are_close(styles: Styles) -> None:
    """What would split text in another way has no name."""
    for name, change in CLOSE.items():
        with case(name), pytest.raises(UnsupportedError, match="--tokenizer-pre NAME"):
            vocabulary(changed(styles["llama-bpe"], change), rows_of(styles["llama-bpe"]))
