# SPDX-License-Identifier: Apache-2.0
"""Damaged tokenizer files: the error names the file and the place; what has no say in a GGUF changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.cases import case
from support.vocabularies import LLAMA3, byte_level, changed, files_of, rows_of, split
from tokenizers import Tokenizer, pre_tokenizers

from lrconvert.errors import InputError, UnsupportedError
from lrconvert.targets.gguf.vocabulary import vocabulary

Styles = Mapping[str, Tokenizer]


def put(*path: str | int) -> Callable[[Any], Callable[[dict[str, Any]], object]]:
    """A change that puts a value at a path of tokenizer.json."""

    def with_value(new: Any) -> Callable[[dict[str, Any]], object]:
        def change(value: Any) -> None:
            for key in path[:-1]:
                value = value[key]
            value[path[-1]] = new

        return change

    return with_value


# --- tokenizer.json ---------------------------------------------------------------------------------------

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
    (put("model", "vocab", "\ud800")(950), "half a surrogate pair"),
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
        "post_processor adds token 9999, which does not exist",
    ),
]


def test_damaged_tokenizer_json(styles: Styles) -> None:
    """The error names the file and the place, whatever is wrong."""
    tokenizer = styles["gpt-2"]
    for change, expected in DAMAGE:
        with case(expected), pytest.raises(InputError, match=rf"tokenizer\.json: .*{expected}"):
            vocabulary(changed(tokenizer, change), rows_of(tokenizer, 100))


ODD: tuple[Any, ...] = (0, True, "x", [], [[]], {}, {"type": "Sequence"}, {"type": 5}, [{"type": "ByteLevel"}])


def test_parts_without_a_say_change_nothing(styles: Styles) -> None:
    """How text is cut to a length, decoded and surrounded in ways that are none: the vocabulary is the same."""
    expected = vocabulary(changed(styles["gpt-2"], lambda value: None), rows_of(styles["gpt-2"])).metadata
    for part in ("post_processor", "decoder", "truncation", "version"):
        for value in ODD:
            written = vocabulary(changed(styles["gpt-2"], put(part)(value)), rows_of(styles["gpt-2"]))
            assert written.metadata == expected, (part, value)


def test_no_pre_tokenizer_but_its_own_is_taken_for_one(styles: Styles) -> None:
    """Whatever else is in its place is no byte-level BPE."""
    for value in ODD:
        refused = pytest.raises(UnsupportedError, match=r"tokenizer\.json: BPE that is neither byte-level nor")
        with case(value), refused:
            vocabulary(changed(styles["gpt-2"], put("pre_tokenizer")(value)), rows_of(styles["gpt-2"]))


def test_no_normalizer_is_passed_over(styles: Styles) -> None:
    """An empty value is none, as null is; anything else would change text before it is split."""
    expected = vocabulary(changed(styles["gpt-2"], lambda value: None), rows_of(styles["gpt-2"])).metadata
    for value in ODD:
        files = changed(styles["gpt-2"], put("normalizer")(value))
        with case(value):
            if not value:
                assert vocabulary(files, rows_of(styles["gpt-2"])).metadata == expected
                continue
            with pytest.raises(UnsupportedError, match=r"tokenizer\.json: .*no llama\.cpp name for .*\"normalizer\""):
                vocabulary(files, rows_of(styles["gpt-2"]))


# --- files ------------------------------------------------------------------------------------------------

FILES: list[tuple[str, bytes, str]] = [
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
]


def test_damaged_files(styles: Styles, tmp_path: Path) -> None:
    """Bytes and files alike."""
    files = files_of(styles["gpt-2"])
    del files["tokenizer_config.json"]
    for name, data, expected in FILES:
        (tmp_path / name).write_bytes(data)
        for source in (data, tmp_path / name):
            named = rf"{re.escape(name)}: .*{re.escape(expected)}"
            with case(name, data[:60], type(source).__name__), pytest.raises(InputError, match=named):
                vocabulary({**files, name: source}, rows_of(styles["gpt-2"]))


def test_a_vocabulary_size_that_is_none() -> None:
    """config.json has to say how many rows the embedding has."""
    for size in (None, 0, -1, 2**40, "8", True):
        with case(size), pytest.raises(InputError, match=r"config\.json: vocab_size is"):
            vocabulary({}, {"vocab_size": size})


# --- size -------------------------------------------------------------------------------------------------


def test_a_large_vocabulary(tmp_path: Path) -> None:
    """65,000 tokens with their merges, from a file; one beyond the limit is not read."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left in letters for right in letters][:65_000]
    texts = [*letters, *(left + right for left, right in pairs)]
    value = json.loads(byte_level(split(LLAMA3)).to_str())
    value["model"] |= {"vocab": {text: index for index, text in enumerate(texts)}, "merges": pairs}
    value["added_tokens"] = []
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(value))
    metadata = vocabulary({"tokenizer.json": path}, {"vocab_size": 65_536}).metadata
    assert metadata["tokenizer.ggml.tokens"][: len(texts)] == texts
    assert metadata["tokenizer.ggml.merges"] == [f"{left} {right}" for left, right in pairs]
    with path.open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(InputError, match=r"tokenizer\.json: 1073741824 bytes; at most"):
        vocabulary({"tokenizer.json": path}, {"vocab_size": 65_536})
