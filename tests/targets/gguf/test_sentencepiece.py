# SPDX-License-Identifier: Apache-2.0
"""SentencePiece vocabularies in a GGUF, against the tokenizers library: from tokenizer.json and tokenizer.model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.vocabularies import (
    LEGACY,
    SPECIAL_TEXTS,
    SPM_CONFIG,
    SPM_SPECIALS,
    TEXTS,
    changed,
    files_of,
    ids,
    rows_of,
    spm,
    spm_pieces,
    token,
    tokenizer_of,
    write_gguf,
)
from tokenizers import AddedToken, normalizers, pre_tokenizers

from lrconvert.checkpoint import open_checkpoint
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.targets.gguf import sentencepiece
from lrconvert.targets.gguf.vocabulary import vocabulary

# --- SentencePiece ----------------------------------------------------------------------------------------

METASPACE = {
    scheme: pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False) for scheme in ("first", "always", "never")
}
SPACE_IN_FRONT = {"space", "spaces", "blank lines", "space in front"}
LAYOUTS: Mapping[str, tuple[Any, Any, set[str]]] = {
    "normalizer": (LEGACY, None, set()),
    "normalizer without a prefix": (normalizers.Replace(" ", "▁"), None, set()),
    "metaspace never": (None, METASPACE["never"], set()),
    # Known: it puts no second space before text that begins with one ...
    "metaspace always": (None, METASPACE["always"], {*SPACE_IN_FRONT, "special", "special in front"}),
    # ... and none behind a special token, where llama.cpp does.
    "metaspace first": (None, METASPACE["first"], {*SPACE_IN_FRONT, "special", "special in front"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sentencepiece_layouts(layout: str, differing: Callable[..., set[str]]) -> None:
    """Scores give the tokens that the merges give, whichever way tokenizer.json spells the spaces."""
    normalizer, pre, known = LAYOUTS[layout]
    tokenizer = spm(normalizer, pre)
    written = vocabulary(files_of(tokenizer, SPM_CONFIG), rows_of(tokenizer))
    metadata = written.metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert (metadata["tokenizer.ggml.add_bos_token"], ids(metadata)) == (True, {"bos": 1, "eos": 2, "unknown": 0})
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert differing(tokenizer, written, TEXTS | SPECIAL_TEXTS, add_special=True) == known
    assert bool(written.notes) == bool(known)


def test_scores_are_those_of_sentencepiece() -> None:
    """Its best piece has 0, the next -1, …; so has ours, from the order of the merges alone."""
    tokenizer = spm(LEGACY)
    scores = vocabulary(files_of(tokenizer), rows_of(tokenizer, 0)).metadata["tokenizer.ggml.scores"]
    first, pieces = len(SPM_SPECIALS) + 256, len(spm_pieces())
    assert scores[first : first + pieces] == [-float(rank) for rank in range(pieces)]
    assert set(scores[:first]) == {0.0}


def test_a_vocabulary_trained_as_merges(differing: Callable[..., set[str]]) -> None:
    """Known: where some pair that makes a piece is no merge, llama.cpp joins it all the same. That is said."""
    tokenizer = spm(LEGACY, every_pair=False)
    written = vocabulary(files_of(tokenizer, SPM_CONFIG), rows_of(tokenizer))
    assert any("pieces can be made in ways that no merge of tokenizer.json names" in note for note in written.notes)
    assert differing(tokenizer, written, {"joined": "       return", "plain": "the world"}) == {"joined"}


def test_runs_of_spaces_that_are_added_tokens(differing: Callable[..., set[str]], tmp_path: Path) -> None:
    """Gemma's: merges make them too, and their scores are those of the merges. Read back, the file gives the same."""
    tokenizer = spm(normalizers.Replace(" ", "▁"), runs=True)
    written = vocabulary(files_of(tokenizer, SPM_CONFIG), rows_of(tokenizer))
    texts = TEXTS | {"spaces in front": "   return the world", "many": " " * 30 + "the", "visible": "▁▁the ▁ end"}
    assert written.metadata["tokenizer.ggml.scores"][len(SPM_SPECIALS) + 256] == 0.0
    assert differing(tokenizer, written, texts) == set()
    path = write_gguf(tmp_path / "vocabulary.gguf", written.metadata)
    again = tokenizer_of(open_checkpoint(path).side_files())
    assert again.encode("   return").tokens == tokenizer.encode("   return").tokens == ["<s>", "▁▁▁", "return"]
    for name, text in texts.items():
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert again.encode(text, add_special_tokens=False).ids == expected, name


def test_special_tokens_that_take_in_space(differing: Callable[..., set[str]]) -> None:
    """Phi-3's: no key says so, but the name of the model does, in which case nothing differs."""
    tokenizer = spm(LEGACY, rstrip=True)
    written = vocabulary(files_of(tokenizer, SPM_CONFIG), rows_of(tokenizer))
    assert written.strips and written.notes == ()
    texts = TEXTS | SPECIAL_TEXTS | {"behind": "a</s>  \n b<|eot_id|>\n<|eot_id|> c<|endoftext|> d"}
    assert differing(tokenizer, written, texts, name="Phi-3-pico") == set()
    assert "behind" in differing(tokenizer, written, texts, name="pico")


def test_others_that_take_in_space() -> None:
    tokenizer = spm(LEGACY)
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
    assert not written.strips
    assert any("(lstrip, rstrip, single_word): llama.cpp doesn't know that" in note for note in written.notes)


def test_normalised_added_tokens() -> None:
    """Known: with Llama 2's normalizer such a token is found behind a space only."""
    tokenizer = spm(LEGACY)
    tokenizer.add_tokens([AddedToken("<n>", normalized=True)])
    assert tokenizer.encode("a<n>").tokens[-1] != "<n>"
    written = vocabulary(files_of(tokenizer), rows_of(tokenizer))
    assert any("1 added tokens are `normalized` ('<n>')" in note for note in written.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["model"].update(type="Unigram"), "a tokenizer of type 'Unigram'.*SentencePiece BPE"),
        (lambda value: value["model"].update(type="WordPiece"), "a tokenizer of type 'WordPiece'"),
        (lambda value: value["model"].update(byte_fallback=False), "neither byte-level nor has byte_fallback"),
        (lambda value: value["model"].update(dropout=0.1), "model.dropout is 0.1"),
        (lambda value: value["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
        (lambda value: value["model"]["vocab"].pop("<0x41>"), "byte_fallback without <0x41>"),
        (lambda value: value["model"].update(merges=[]), "without merges"),
        (lambda value: value.update(normalizer={"type": "NFKC"}), "not those of a SentencePiece model"),
        (lambda value: value.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁"}), "not those of"),
    ],
)
def test_what_is_not_supported(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"tokenizer.json.*{message}"):
        vocabulary(changed(spm(LEGACY), change), rows_of(spm(LEGACY)))


# --- tokenizer.model --------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def message(fields: Iterable[tuple[int, int | bytes | float]]) -> bytes:
    """A protocol-buffer message."""
    made = b""
    for number, value in fields:
        if isinstance(value, bytes):
            made += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, float):
            made += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            made += varint(number << 3) + varint(value)
    return made


def tokenizer_model(
    trainer: Mapping[int, int] | None = None, normalizer: Mapping[int, int | bytes] | None = None
) -> bytes:
    """The pieces of `spm` as SentencePiece stores them."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | dict.fromkeys(sentencepiece.BYTES, 6)
    pieces = [message([(1, piece.encode()), (2, 0.0), (3, kind)]) for piece, kind in kinds.items()]
    pieces += [message([(1, piece.encode()), (2, -float(rank))]) for rank, piece in enumerate(spm_pieces())]
    trained = message(({3: 2, 35: 1, 43: -1} | dict(trainer or {})).items())
    normalised = message(({1: b"identity", 3: 1, 4: 0} | dict(normalizer or {})).items())
    return message([*((1, piece) for piece in pieces), (2, trained), (3, normalised)])


def test_tokenizer_model(differing: Callable[..., set[str]]) -> None:
    """It says the same as the tokenizer.json that transformers makes of it."""
    tokenizer = spm(LEGACY)
    config = SPM_CONFIG | {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(content)): token(content, special=content != "<tool>")
            for content in ("<|endoftext|>", "<|eot_id|>", "<tool>")
        }
    }
    files = {"tokenizer.model": tokenizer_model(), "tokenizer_config.json": json.dumps(config).encode()}
    written = vocabulary(files, rows_of(tokenizer))
    assert written == vocabulary(files | files_of(tokenizer, SPM_CONFIG), rows_of(tokenizer))
    assert differing(tokenizer, written, TEXTS | SPECIAL_TEXTS, add_special=True) == set()


def test_tokenizer_model_alone() -> None:
    """bos, eos and unk are the model's own; bos is added, as Llama's class does."""
    metadata = vocabulary({"tokenizer.model": tokenizer_model()}, {"vocab_size": 600}).metadata
    assert ids(metadata) == {"bos": 1, "eos": 2, "unknown": 0}
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert metadata["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize(
    ("trainer", "normalizer", "expected"),
    [
        ({3: 1}, {}, "a SentencePiece model of type unigram. Supported: BPE"),
        ({3: 4}, {}, "of type char"),
        ({35: 0}, {}, "without byte fallback"),
        ({24: 1}, {}, "spaces are not marked in front of words"),
        ({}, {5: 0}, "spaces are not marked in front of words"),
    ],
)
def test_other_sentencepiece_models(trainer: dict[int, int], normalizer: dict[int, int], expected: str) -> None:
    with pytest.raises(UnsupportedError, match=f"tokenizer.model: .*{expected}"):
        vocabulary({"tokenizer.model": tokenizer_model(trainer, normalizer)}, {"vocab_size": 600})


@pytest.mark.parametrize(("normalizer", "note"), [({2: b"map"}, "normalises text"), ({4: 1}, "removes extra spaces")])
def test_what_sentencepiece_does_besides(normalizer: dict[int, int | bytes], note: str) -> None:
    written = vocabulary({"tokenizer.model": tokenizer_model({}, normalizer)}, {"vocab_size": 600})
    assert any(note in found for found in written.notes)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a\xff\xff\xff\xff\x0f",  # a piece longer than the file
        b"\x80" * 100,
        b"\x0b",  # a group, which nobody writes
        b"not a model at all",
        message([(1, message([(1, 5)]))]),
        message([(1, message([(1, b"\xff")]))]),
        message([(1, message([(1, b"a"), (2, float("nan"))]))]),
        message([(1, message([(1, b"a"), (3, 9)]))]),
        message([(1, 1)]),
        message([(2, 7)]),
        tokenizer_model()[:-3],
        tokenizer_model() + message([(1, message([(1, b"<s>"), (2, 0.0)]))]),
    ],
)
def test_damaged_tokenizer_models(data: bytes) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.model: "):
        vocabulary({"tokenizer.model": data}, {"vocab_size": 600})
