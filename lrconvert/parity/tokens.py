# SPDX-License-Identifier: Apache-2.0
"""Does llama.cpp turn text into the same tokens as the model's own tokenizer? A wrong `tokenizer.ggml.pre` is silent.

Each known difference of llama.cpp has a reason *and* is computed: tokenizer.json is edited to what llama.cpp can do,
and a text counts as known only where llama.cpp answers exactly that. So a known difference hides no other one.
tokenizer.json tells which differences apply.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer

from lrconvert.artifact.checks import Row
from lrconvert.checkpoint import Checkpoint, read_json
from lrconvert.checkpoint.base import MAX_TOKENIZER_BYTES
from lrconvert.errors import InputError, LrconvertError
from lrconvert.parity.opened import Opened
from lrconvert.parity.token_limits import LIMITS, Json, Limit, is_byte_level
from lrconvert.parity.token_texts import STRINGS
from lrconvert.runtimes.answers import AnswersTokens

TOKENIZER = "tokenizer"

OWN = 3  # of the model's added tokens, put into texts: the first, the last, one that is not special
SHOWN = 60  # characters of a text in a message, and a tenth of that in tokens


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
        if is_byte_level(content):
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


__all__ = ["STRINGS", "token_rows", "tokenisation", "tokenisation_of"]
