# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a tokenizer.json or tokenizer.model as llama.cpp has it: ids, types, scores or merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrconvert.checkpoint.gguf_tokenizer import MAX_PIECE, NORMAL, USER_DEFINED
from lrconvert.checkpoint.padding import FLAG
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.targets.gguf import pre_tokenizers, sentencepiece
from lrconvert.targets.gguf.tokenizer_files import MAX_MODEL_BYTES, Added, TokenizerFiles

PAD = f"{FLAG} adds the rows that are missing"
UNUSED, BYTE = 5, 6  # tokenizer.ggml.token_type; the others are the reader's


@dataclass
class TokenTable:
    """A vocabulary before the ids of special tokens are known."""

    kind: str  # tokenizer.ggml.model
    pre: str
    vocab: dict[str, int]  # with the added tokens
    added: list[Added]
    types: dict[int, int] = field(default_factory=dict)  # of those that are not NORMAL
    scores: dict[str, float] | None = None
    made: frozenset[str] = frozenset()  # pieces that merges make; Gemma's runs of spaces are added tokens as well
    merges: list[str] | None = None
    adds_space: bool = False
    special: dict[str, int] = field(default_factory=dict)  # ids that the vocabulary itself names
    adds: dict[str, bool] = field(default_factory=dict)  # bos, eos: where no file says it
    notes: list[str] = field(default_factory=list)


# --- tokenizer.json ---------------------------------------------------------------------------------------


def from_tokenizer_json(files: TokenizerFiles, rows: int, pre: str | None) -> TokenTable:
    """`rows`: of the embedding. `pre`: the name asked for."""
    where, tokenizer = files.where("tokenizer.json"), files.tokenizer or {}
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise InputError(f"{where}: model is {model!r:.60}; an object is needed")
    _refuse_other_models(model, where)
    vocab = _vocab(model.get("vocab"), rows, where)
    merges = _merges(model.get("merges"), vocab, where)
    if not merges:
        raise UnsupportedError(f"{where}: a vocabulary without merges")
    added, notes = _added(files, vocab, rows)
    whole = {**vocab, **{token.content: token.id for token in added}}
    steps = pre_tokenizers.steps_of(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("type") == "ByteLevel" for step in steps):
        name, lost = pre_tokenizers.choose(tokenizer, where, pre)
        # Text has no plain space after the byte encoding: a merge with one is never used.
        joined = [f"{left} {right}" for left, right in merges if " " not in left + right]
        return TokenTable("gpt2", name, whole, added, merges=joined, notes=[*notes, *lost])
    if model.get("byte_fallback") is not True:
        raise UnsupportedError(
            f"{where}: BPE that is neither byte-level nor has byte_fallback; llama.cpp needs one of them"
        )
    table = TokenTable("llama", "default", whole, added, notes=notes)
    _as_sentencepiece(table, tokenizer, model, vocab, merges, where)
    return table


def _as_sentencepiece(
    table: TokenTable,
    tokenizer: Mapping[str, Any],
    model: Mapping[str, Any],
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    where: str,
) -> None:
    """Scores from the merges, and what llama.cpp does differently."""
    if missing := [token for token in sentencepiece.BYTES if token not in vocab]:
        raise UnsupportedError(f"{where}: byte_fallback without {missing[0]}: llama.cpp needs all 256 bytes")
    if (longest := max(map(len, vocab))) > MAX_PIECE:
        raise InputError(f"{where}: a piece of {longest} characters; at most {MAX_PIECE} are read")
    table.adds_space, lost = sentencepiece.space_prefix(tokenizer, where)
    table.notes += lost
    contents = [token.content for token in table.added]
    if odd := sentencepiece.differences(vocab, merges, contents):
        table.notes.append(
            f"llama.cpp joins any two parts whose text is a piece; {len(odd)} pieces can be made in ways that no merge "
            f"of tokenizer.json names ({odd[0]!r:.40}): some texts may differ"
        )
    normalised = [token.content for token in table.added if token.normalized]
    if table.adds_space and tokenizer.get("normalizer") and normalised:
        table.notes.append(
            f"{len(normalised)} added tokens are `normalized` ({normalised[0]!r:.40}): tokenizer.json finds them "
            "only after a space, llama.cpp anywhere"
        )
    table.types = {vocab[token]: BYTE for token in sentencepiece.BYTES}
    if isinstance(unk := model.get("unk_token"), str) and unk in table.vocab:
        table.special["unk"] = table.vocab[unk]
    table.scores = sentencepiece.scores_of(vocab, merges, contents)
    table.made = frozenset(left + right for left, right in merges)


def _refuse_other_models(model: Mapping[str, Any], where: str) -> None:
    kind = model.get("type", "BPE" if "merges" in model else "WordPiece")
    if kind != "BPE":
        raise UnsupportedError(
            f"{where}: a tokenizer of type {kind!r:.40}",
            remedy="Supported: byte-level BPE, and SentencePiece BPE with byte fallback",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise UnsupportedError(f"{where}: model.{key} is {model[key]!r:.40}, which llama.cpp doesn't know")


def _vocab(value: Any, rows: int, where: str) -> dict[str, int]:
    """The vocabulary, checked: every id a row of the embedding, and no two alike."""
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where}: model.vocab is {value!r:.60}; an object of tokens and ids is needed")
    seen: dict[int, str] = {}
    for token, index in value.items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise InputError(f"{where}: model.vocab[{token!r:.40}] is {index!r:.40}; an id is needed")
        if index >= rows:
            raise InputError(
                f"{where}: model.vocab[{token!r:.40}] is {index}, but the embedding has {rows} rows (vocab_size)",
                remedy=PAD,
            )
        if index in seen:
            raise InputError(f"{where}: model.vocab has {index} twice: {seen[index]!r:.40} and {token!r:.40}")
        seen[index] = token
    return value


def _merges(value: Any, vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """The merges, checked: of two tokens each, and what they make a token too. Of equal ones the last counts, as in
    the tokenizers library."""
    if not isinstance(value, list):
        raise InputError(f"{where}: model.merges is {value!r:.60}; a list is needed")
    places: dict[tuple[str, str], int] = {}
    for position, merge in enumerate(value):
        place = f"{where}: model.merges[{position}]"
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise InputError(f"{place} is {merge!r:.60}; two tokens are needed")
        left, right = parts
        for token in (left, right, left + right):
            if token not in vocab:
                raise InputError(f"{place} needs {token!r:.40}, which is not in the vocabulary")
        places[left, right] = position
    return sorted(places, key=lambda pair: places[pair])


# --- tokenizer.model --------------------------------------------------------------------------------------


def from_tokenizer_model(files: TokenizerFiles, rows: int) -> TokenTable:
    where = files.where("tokenizer.model")
    model = sentencepiece.parse(files.data("tokenizer.model", MAX_MODEL_BYTES), where)
    if len(model.pieces) > rows:
        raise InputError(
            f"{where}: {len(model.pieces)} pieces, but the embedding has {rows} rows (vocab_size)",
            remedy=PAD,
        )
    vocab = {piece: index for index, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise InputError(f"{where}: a piece appears twice")
    added, notes = _added(files, vocab, rows)
    replaced = {token.id for token in added}
    whole = {piece: index for piece, index in vocab.items() if index not in replaced}
    whole |= {token.content: token.id for token in added}
    lost = []
    if model.adds_space and USER_DEFINED in model.types:
        lost.append(f"llama.cpp puts a space after the pieces of {where} that are user-defined, SentencePiece doesn't")
    return TokenTable(
        "llama",
        "default",
        whole,
        added,
        types={index: kind for index, kind in enumerate(model.types) if kind != NORMAL},
        scores=dict(zip(model.pieces, model.scores, strict=True)),
        adds_space=model.adds_space,
        special=model.ids,
        adds={"bos": True, "eos": False},  # the defaults of transformers' LlamaTokenizer
        notes=[*notes, *model.notes, *lost],
    )


# --- added tokens -----------------------------------------------------------------------------------------


def _added(files: TokenizerFiles, vocab: Mapping[str, int], rows: int) -> tuple[list[Added], list[str]]:
    """The added tokens that have a row in the embedding. One of tokenizer.json that has none is an error; one that
    only tokenizer_config.json names (a padding token, often) is left out, with a note."""
    added, notes = files.added(vocab)
    listed = {entry["content"] for entry in (files.tokenizer or {}).get("added_tokens") or []}
    for token in added:
        if token.id >= rows and token.content in listed:
            raise InputError(
                f"{files.where('tokenizer.json')}: added token {token.content!r:.40} has id {token.id}, but the "
                f"embedding has {rows} rows (vocab_size)",
                remedy=PAD,
            )
        if token.id >= rows:
            notes.append(f"{token.content!r:.40} has no row in the embedding: left out")
    return [token for token in added if token.id < rows], notes
