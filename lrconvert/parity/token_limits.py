# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp can't do of a tokenizer.json: reasons, and the edits that leave what it can."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from lrconvert.checkpoint.gguf_tokenizer import MAX_PIECE, PRE_TOKENIZERS, SPACE, SPECIAL_TEXTS, PreTokenizer
from lrconvert.parity.token_texts import STRINGS

Json = dict[str, Any]


@dataclass(frozen=True)
class Limit:
    """A part of tokenizer.json that no GGUF can express. `change` edits it to what llama.cpp computes."""

    reason: str
    applies: Callable[[Json], bool]
    change: Callable[[Json], None]
    instead: str | None = None  # the reason of the limit that another name of llama.cpp has this one in place of


def _steps(part: Any, inner: str) -> list[Json]:
    """The steps of a normalizer or pre-tokenizer, sequences unrolled."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for item in part.get(inner) or [] for step in _steps(item, inner)]


def _splitting(content: Json) -> list[Json]:
    return _steps(content.get("pre_tokenizer"), "pretokenizers")


def is_byte_level(content: Json) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _splitting(content))


def _composes(content: Json) -> bool:
    kinds = [step.get("type") for step in _steps(content.get("normalizer"), "normalizers")]
    return is_byte_level(content) and kinds == ["NFC"]


def _compose_not(content: Json) -> None:
    content["normalizer"] = None


# The letters of tekken and gpt-4o by case, marks among them, with the ASCII letters that llama.cpp leaves out.
_CASES = {r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]": "a-z", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]": "A-Z"}


def _expressions(content: Json) -> Iterator[Json]:
    """The patterns of splits that have classes of letters by case."""
    for step in _splitting(content):
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and any(letters in str(pattern.get("Regex")) for letters in _CASES):
            yield pattern


def _knows_cases(content: Json) -> bool:
    return any(_expressions(content))


def _forget_cases(content: Json, letters: str = r"\p{L}") -> None:
    for pattern in _expressions(content):
        for known, others in _CASES.items():
            pattern["Regex"] = pattern["Regex"].replace(known, rf"[[{letters}]&&[^{others}]]")


def _splits_as_gpt4o(content: Json) -> bool:
    pieces = _pieces(Tokenizer.from_str(json.dumps(content)).pre_tokenizer) if _knows_cases(content) else None
    return pieces == _pieces(_pre_tokenizer(PRE_TOKENIZERS["gpt-4o"]))


def _whole_words_without_a_name(content: Json) -> bool:
    """Whether no name of llama.cpp both splits text so and treats whole words so."""
    if not is_byte_level(content):
        return False
    pieces = _pieces(Tokenizer.from_str(json.dumps(content)).pre_tokenizer)
    alike = [row for row in PRE_TOKENIZERS.values() if _pieces(_pre_tokenizer(row)) == pieces]
    wanted = content["model"].get("ignore_merges") is True
    return bool(alike) and all(row.whole_words != wanted for row in alike)


def _pre_tokenizer(row: PreTokenizer) -> Any:
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if row.digits else []
    steps += [pre_tokenizers.Split(Regex(expression), "isolated") for expression in row.splits]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=row.gpt2_words)])


def _pieces(pre_tokenizer: Any) -> list[list[str]]:
    return [[piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] for text in STRINGS]


def _other_whole_words(content: Json) -> None:
    content["model"]["ignore_merges"] = content["model"].get("ignore_merges") is not True


def _metaspace(content: Json) -> str | None:
    """Where a SentencePiece vocabulary puts a space, if a pre-tokenizer does it."""
    steps = _splitting(content)
    if [step.get("type") for step in steps] != ["Metaspace"]:
        return None
    return steps[0].get("prepend_scheme", "always" if steps[0].get("add_prefix_space", True) else "never")


def _prefix_everywhere(content: Json) -> None:
    """The layout of Llama 2's first tokenizer.json, which is how llama.cpp puts spaces."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    content["pre_tokenizer"] = None


def _normalised_tokens(content: Json) -> bool:
    added = content.get("added_tokens") or []
    return not is_byte_level(content) and any(token.get("normalized") for token in added)


def _find_anywhere(content: Json) -> None:
    for token in content["added_tokens"]:
        if token.get("normalized"):
            token["normalized"], token["content"] = False, token["content"].replace(SPACE, " ")


# In models of Phi-3's name, which have to have these and </s>, llama.cpp lets all others take in the space behind them.
_PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}


def _has_edges(content: Json) -> bool:
    """Added tokens that strip spaces or match whole words only. Phi-3's don't count: a file can express them."""
    added = content.get("added_tokens") or []
    if any(token.get("lstrip") or token.get("single_word") for token in added):
        return True
    taking, every = {token["content"] for token in added if token.get("rstrip")}, {token["content"] for token in added}
    has_its_tokens = all(token in every or token in content["model"]["vocab"] for token in {*_PHI3_KEEPS, "</s>"})
    return bool(taking) and not (has_its_tokens and taking == every - _PHI3_KEEPS)


def _without_edges(content: Json) -> None:
    for token in content["added_tokens"]:
        token |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)


def _has_unnamed_pairs(content: Json) -> bool:
    return not is_byte_level(content) and _merges(content) != _every_pair(content)


def _merges(content: Json) -> list[tuple[str, ...]]:
    merges = content["model"].get("merges") or []
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]


def _every_pair(content: Json) -> list[tuple[str, ...]]:
    """Merges that make a piece of any two parts, the piece that was made first before all others."""
    vocab, pairs = content["model"].get("vocab"), []
    for piece in dict.fromkeys("".join(merge) for merge in _merges(content)):
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece) if len(piece) <= MAX_PIECE else 1)]
        pairs += [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    return pairs


def _join_any_pair(content: Json) -> None:
    content["model"]["merges"] = [list(pair) for pair in _every_pair(content)]


def _ordinary(content: Json) -> list[str]:
    """Pieces that are special tokens for llama.cpp alone."""
    added = {token["content"] for token in content.get("added_tokens") or []}
    vocab = content["model"].get("vocab")
    return sorted((SPECIAL_TEXTS & vocab.keys()) - added) if isinstance(vocab, dict) else []


def _make_special(content: Json) -> None:
    made: list[Json] = list(content.get("added_tokens") or [])
    for text in _ordinary(content):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        made.append({"id": content["model"]["vocab"][text], "content": text, "special": True, **flags})
    content["added_tokens"] = sorted(made, key=lambda token: token["id"])


_MARKS = (
    "llama.cpp's expression for this pre-tokenizer has no class for combining marks, and knows small and capital "
    "letters in ASCII only"
)
LIMITS = (
    Limit("tokenizer.json normalises text to NFC, llama.cpp doesn't", _composes, _compose_not),
    Limit(_MARKS, _knows_cases, _forget_cases),
    Limit(
        "llama.cpp's expression for this pre-tokenizer knows small and capital letters in ASCII only",
        _splits_as_gpt4o,
        lambda content: _forget_cases(content, r"\p{L}\p{M}"),
        instead=_MARKS,
    ),
    Limit(
        "llama.cpp takes some texts for special tokens wherever they are pieces (</s>, <EOT>, …)",
        lambda content: bool(_ordinary(content)),
        _make_special,
    ),
    Limit(
        "llama.cpp has no name for this pre-tokenizer together with tokenizer.json's ignore_merges",
        _whole_words_without_a_name,
        _other_whole_words,
    ),
    Limit(
        "llama.cpp puts a space before text and after special tokens even where tokenizer.json's Metaspace puts none",
        lambda content: _metaspace(content) in ("first", "always"),
        _prefix_everywhere,
    ),
    Limit("llama.cpp finds `normalized` added tokens anywhere in a text", _normalised_tokens, _find_anywhere),
    Limit("llama.cpp ignores lstrip, rstrip and single_word of added tokens", _has_edges, _without_edges),
    Limit(
        "llama.cpp joins any two parts whose text is a piece, named by a merge or not",
        _has_unnamed_pairs,
        _join_any_pair,
    ),
)


__all__ = ["LIMITS", "Json", "Limit", "is_byte_level"]
