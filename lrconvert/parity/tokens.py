# SPDX-License-Identifier: Apache-2.0
"""Does llama.cpp turn text into the same tokens as the model's own tokenizer? A wrong `tokenizer.ggml.pre` is silent.

Each known difference of llama.cpp has a reason *and* is computed: tokenizer.json is edited to what llama.cpp can do,
and a text counts as known only where llama.cpp answers exactly that. So a known difference hides no other one.
tokenizer.json tells which differences apply.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from lrconvert.artifact.checks import Row
from lrconvert.checkpoint import Checkpoint, read_json
from lrconvert.checkpoint.base import MAX_TOKENIZER_BYTES
from lrconvert.checkpoint.gguf_tokenizer import MAX_PIECE, PRE_TOKENIZERS, SPACE, SPECIAL_TEXTS, PreTokenizer
from lrconvert.errors import InputError, LrconvertError
from lrconvert.parity.opened import Opened
from lrconvert.runtimes.answers import AnswersTokens

TOKENIZER = "tokenizer"

STRINGS = (
    "",
    " ",
    "   ",
    "\n",
    "\t",
    " \n \n\n  \n\t\t \r\n x",
    "Hello, world!",
    " Hello",
    "hello  world   x    y",
    "end with space ",
    "end with newline\n",
    "\n\n\nthree lines\n\n\n\nfour\r\n\r\n",
    "\ttab\t\ttabs \t mixed",
    "1234567890 3.14159 1,000,000 1st v1.2.3 0x1F 2026-11-25 12:34",
    "1\n2\n\n34  5   67\t\t89 \n\n\n0",
    "½ ²³ ٣٤ 一二三 Ⅻ １２３",
    "I'm you're we'll don't it's he'd I've",
    "I'M YOU'RE WE'LL DON'T IT'S HE'D I'VE 'S ''ll rock'n'roll",
    "“quoted” ‘single’ it’s — dash… «guillemets»",
    "🚀😶\u200d🌫️✅🦙🦙",
    "👩\u200d👩\u200d👧 🏳️\u200d🌈 👍🏽 🇩🇪🇫🇷",
    "中文字符，日本語のテキスト。",
    "한국어 텍스트 ไทยภาษา",
    "naïve Ångström Žluťoučký İstanbul straße",
    "e\u0301te\u0301 A\u030a o\u0308 \u1112\u1161\u11ab",
    "हिन्दी தமிழ் বাংলা កាន់តែ",
    "Привет МИР иВан Ελληνικά ΑΒγδ",
    "مرحبا بالعالم שלום עולם",
    "\u202bright\u202c to \u200fleft",
    "zero\u200bwidth\u200cjoin\u200der\ufeff",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f",
    "def f(x):\n    return x**2  # no\n\tif (a!=b) && c||d: {}[];",
    "<div class=\"a\">&amp;</div> $x^2$ \\frac{1}{2} `code`",
    "        for i in range(10):\n            print(i)\n",
    "       return",
    "snake_case camelCase XMLHttpRequest iPhone SCREAMING_CASE",
    "!!!???...---===~~~```\"\"\"'''",
    "https://example.com/a/b?c=d&e=f#g foo@bar.com C:\\dir\\file.txt",
    "a" * 300,
    "Supercalifragilisticexpialidocious" * 8,
    " " * 100 + "x",
    "ab" * 60 + "\n" * 40 + "1" * 70,
    "\x00\x01\x1f\x7f",
    "\U0010ffff\ue000\ufffd",
    "<0x41> <|nothing|> </nope>\n[NONE] <<|",
    "<b>x</s>> <EOT> [EOS]",
    "▁visible ▁▁ space",
)  # fmt: skip
OWN = 3  # of the model's added tokens, put into texts: the first, the last, one that is not special
SHOWN = 60  # characters of a text in a message, and a tenth of that in tokens

Json = dict[str, Any]


def tokenisation_of(model: Checkpoint, session: AnswersTokens) -> list[Row]:
    """`tokenisation` with the tokenizer of a checkpoint, which may be one that can't be had: a GGUF's is rebuilt, and
    names of pre-tokenizers that aren't known are refused."""
    try:
        side_files = model.side_files()
    except LrconvertError as error:
        return [Row(TOKENIZER, "strings", "skipped", reason=f"no tokenizer to compare with: {error.message}")]
    return tokenisation(side_files, session)


def token_rows(opened: Opened) -> list[Row]:
    """`tokenisation_of` the model that an artifact was made from."""
    session: AnswersTokens = opened.answering("tokens")
    return tokenisation_of(opened.reference.model.checkpoint, session)


def tokenisation(
    side_files: Mapping[str, Path | bytes], session: AnswersTokens, strings: Sequence[str] = STRINGS
) -> list[Row]:
    """Awkward texts, and some around the model's own added tokens, through llama.cpp and through its tokenizer.json.

    A row that passes for the texts that are equal, one that is `known` for those that llama.cpp can't do, and one
    that fails for all others.
    """
    source = side_files.get("tokenizer.json")
    if source is None:
        return [Row(TOKENIZER, "strings", "skipped", reason="the model has no tokenizer.json to compare with")]
    try:
        content = read_json(source, MAX_TOKENIZER_BYTES) if isinstance(source, Path) else json.loads(source)
        tokenizer = _loaded(content)
    except (InputError, ValueError, RecursionError) as error:
        return [Row(TOKENIZER, "strings", "skipped", reason=f"the model's tokenizer.json can't be used: {error}")]
    texts = [*strings, *_own_texts(content)]
    try:
        found = session.tokenise(texts)
    except InputError as error:
        return [Row(TOKENIZER, f"{len(texts)} strings", "fail", reason=error.message)]
    expected = _encoded(tokenizer, texts)
    differing = [index for index, ids in enumerate(found) if ids != expected[index]]
    if not differing:
        return [Row(TOKENIZER, f"{len(texts)} strings", "pass")]
    limits, able = _able(content, texts, found)
    known = [index for index in differing if found[index] == able[index]]
    failed = [index for index in differing if found[index] != able[index]]
    rows = []
    if same := len(texts) - len(differing):
        rows.append(Row(TOKENIZER, f"{same} of {len(texts)} strings", "pass"))
    if known:
        reason = f"{_reasons(content, limits, [texts[i] for i in known])} (the first: {_shown(texts[known[0]])})"
        rows.append(Row(TOKENIZER, f"{len(known)} of {len(texts)} strings", "known", reason=reason))
    if failed:
        first = failed[0]
        reason = f"{len(failed)} of {len(texts)} strings tokenize differently than with tokenizer.json; the first: "
        reason += f"{_shown(texts[first])}: {_apart(found[first], expected[first])}"
        if _is_byte_level(content):
            reason += "; tokenizer.ggml.pre says how llama.cpp splits text"
        rows.append(Row(TOKENIZER, f"{len(failed)} of {len(texts)} strings", "fail", reason=reason))
    return rows


def _loaded(content: Json, limits: Sequence[Limit] = ()) -> Tokenizer:
    """The tokenizer, or what llama.cpp's limits leave of it. `ValueError` for what the library refuses."""
    if limits:
        content = json.loads(json.dumps(content))
    for limit in limits:
        limit.change(content)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def _able(
    content: Json, texts: Sequence[str], found: Sequence[Sequence[int]]
) -> tuple[Sequence[Limit], list[list[int]]]:
    """The limits that apply, and what they leave. Names of one way to split have limits of their own (`Limit.instead`):
    those that `found` agrees with best are taken as a whole, so that texts can't choose one by one."""
    applying = [limit for limit in LIMITS if limit.applies(content)]
    choices = [[limit for limit in applying if limit.instead is None]]
    choices += [
        [limit for limit in applying if limit.reason != other.instead and (limit is other or limit.instead is None)]
        for other in applying
        if other.instead is not None
    ]
    made = [(chosen, _encoded(_loaded(content, chosen), texts)) for chosen in choices]
    return max(made, key=lambda one: sum(ids == able for ids, able in zip(found, one[1], strict=True)))


def _own_texts(content: Json) -> Iterator[str]:
    """Texts around some of the model's own added tokens."""
    added = content.get("added_tokens") or []
    chosen = [*added[:1], *added[-1:], *(token for token in added if token.get("special") is not True)]
    for token in list(dict.fromkeys(token["content"] for token in chosen))[:OWN]:
        yield token
        yield f"a{token}b {token} c\n{token}\n {token}{token}"


def _reasons(content: Json, limits: Sequence[Limit], texts: Sequence[str]) -> str:
    """The reasons of the limits that change one of the texts alone; of all limits where it takes several."""
    plain = _encoded(_loaded(content), texts)
    alone = [limit for limit in limits if _encoded(_loaded(content, [limit]), texts) != plain]
    return "; ".join(limit.reason for limit in alone or limits)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"


def _apart(found: Sequence[int], expected: Sequence[int]) -> str:
    """Both lists from the first difference on."""
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found, expected, strict=False)))
    end = start + SHOWN // 10
    parts = []
    for name, ids in (("llama.cpp", found), ("tokenizer.json", expected)):
        listed = ", ".join(map(str, ids[start:end])) + (", …" if len(ids) > end else "")
        parts.append(f"{name} [{listed}]")
    where = f"from token {start} on " if start else ""
    return f"{where}{', '.join(parts)}"


# --- what llama.cpp can't do ------------------------------------------------------------------------------


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


def _is_byte_level(content: Json) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _splitting(content))


def _composes(content: Json) -> bool:
    kinds = [step.get("type") for step in _steps(content.get("normalizer"), "normalizers")]
    return _is_byte_level(content) and kinds == ["NFC"]


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
    if not _is_byte_level(content):
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
    return not _is_byte_level(content) and any(token.get("normalized") for token in added)


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
    return not _is_byte_level(content) and _merges(content) != _every_pair(content)


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


__all__ = ["STRINGS", "token_rows", "tokenisation", "tokenisation_of"]
