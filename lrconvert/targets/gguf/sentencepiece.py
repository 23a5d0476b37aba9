# SPDX-License-Identifier: Apache-2.0
"""SentencePiece BPE as llama.cpp wants it: pieces, scores and types, from tokenizer.json's merges or tokenizer.model.

llama.cpp has no merges for these vocabularies. It joins the two neighbours whose joined text is a piece of the highest
score, the leftmost first, for as long as there are any (`llm_tokenizer_spm_session` in src/llama-vocab.cpp).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrconvert.checkpoint.gguf_tokenizer import SPACE
from lrconvert.checkpoint.protobuf import fields
from lrconvert.errors import InputError, UnsupportedError

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
BPE = 2  # TrainerSpec.ModelType
MAX_PIECES = 2**22


# --- tokenizer.json ---------------------------------------------------------------------------------------


def scores_of(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Iterable[str]) -> dict[str, float]:
    """A score for every piece but the added ones, from the order of the merges.

    The piece that is made first has the highest. For a vocabulary that was converted from SentencePiece these are
    its own scores again: transformers sorts the merges by the score of what they make.
    """
    merged = dict.fromkeys(left + right for left, right in merges)
    others = set(added) | merged.keys() | set(BYTES)
    rest = sorted((index, piece) for piece, index in vocab.items() if piece not in others)
    order = [*merged, *(piece for _, piece in rest)]
    return {piece: -float(rank) for rank, piece in enumerate(order)}


def differences(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Iterable[str]) -> list[str]:
    """Pieces that llama.cpp makes in another order than the merges, or from parts that no merge names.

    None for a vocabulary that was converted from SentencePiece, where every pair whose joined text is a piece is a
    merge. One that was trained as merges has only those it was trained with.
    """
    pairs: dict[str, set[int]] = {}
    torn, last = {}, None
    for left, right in merges:
        piece = left + right
        if piece in pairs and piece != last:
            torn[piece] = None  # another piece was made in between: one score can't say that
        pairs.setdefault(piece, set()).add(len(left))
        last = piece
    apart = set(added)
    for piece in vocab:
        if piece in apart or piece in torn:
            continue
        known = pairs.get(piece, ())
        for cut in range(1, len(piece)):
            # a single character is a symbol there even where it is no piece
            if cut not in known and _symbol(piece[:cut], vocab) and _symbol(piece[cut:], vocab):
                torn[piece] = None
                break
    return list(torn)


def _symbol(text: str, vocab: Mapping[str, int]) -> bool:
    return len(text) == 1 or text in vocab


def space_prefix(tokenizer: Mapping[str, Any], where: str) -> tuple[bool, list[str]]:
    """Whether a space is put before the text, and notes on where llama.cpp puts it differently.

    Two layouts have the same meaning for plain text: a normalizer that prepends the visible space and replaces
    spaces (converted by transformers up to 4.39, or `legacy`), and a Metaspace pre-tokenizer. Raises
    `UnsupportedError` for any other.
    """
    normalizer, pre = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    steps = _steps(normalizer)
    prepends = steps[:1] == [{"type": "Prepend", "prepend": SPACE}]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps[int(prepends) :] == [replaces] and _splits_nothing(pre):
        return prepends, []
    if not steps and isinstance(pre, dict) and pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE:
        scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
        if pre.get("split") is False and scheme in ("first", "always", "never"):
            return scheme != "never", _METASPACE[scheme]
    raise UnsupportedError(
        f"{where}: its normalizer and pre_tokenizer are not those of a SentencePiece model as llama.cpp computes it",
        remedy="Known: Prepend and Replace as normalizer, or a Metaspace pre-tokenizer that doesn't split",
    )


_METASPACE: Mapping[str, list[str]] = {
    "first": [
        "tokenizer.json puts a space before the text only, llama.cpp after every special token as well: text after "
        "a special token differs",
        "tokenizer.json puts no second space before text that begins with one, llama.cpp does",
    ],
    "always": ["tokenizer.json puts no second space before text that begins with one, llama.cpp does"],
    "never": [],
}


def _steps(normalizer: Any) -> list[Any]:
    if not isinstance(normalizer, dict):
        return []
    steps = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    return steps if isinstance(steps, list) else [None]


def _splits_nothing(pre: Any) -> bool:
    """None; or Gemma's split at plain spaces, of which the normalizer leaves none."""
    return pre is None or (
        isinstance(pre, dict) and pre.get("type") == "Split" and pre.get("pattern") == {"String": " "}
    )


# --- tokenizer.model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SentencePiece:
    """What llama.cpp needs of a tokenizer.model. The numbers of the types are those of GGUF."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    ids: dict[str, int]  # unk, bos, eos, pad; only those that there are
    adds_space: bool
    notes: tuple[str, ...]


def parse(data: bytes, where: str) -> SentencePiece:
    """Read a tokenizer.model (sentencepiece_model.proto of google/sentencepiece).

    Written here because five fields of a stable format don't deserve a dependency with a compiled part. Raises
    `UnsupportedError` for another model than BPE with byte fallback, `InputError` for damage.
    """
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer, normalizer = b"", b""
    try:
        for field, value in fields(data):
            if field == 1 and isinstance(value, bytes):
                piece = dict(fields(value))
                pieces.append(_bytes(piece.get(1, b"")).decode())
                scores.append(struct.unpack("<f", _bytes(piece.get(2, b"\0\0\0\0")))[0])
                types.append(_int(piece.get(3, 1)))
                if len(pieces) > MAX_PIECES:
                    raise ValueError(f"more than {MAX_PIECES} pieces")
            elif field == 2:
                trainer = _bytes(value)
            elif field == 3:
                normalizer = _bytes(value)
        trained, normalised = dict(fields(trainer)), dict(fields(normalizer))
        if not pieces:
            raise ValueError("no pieces")
        if not all(map(math.isfinite, scores)):
            raise ValueError("a score is not a finite number")
        if bad := set(types) - set(range(1, 7)):
            raise ValueError(f"a piece has type {min(bad)}; 1 to 6 are known")
        _refuse_other_models(trained, normalised, types, where)
        numbers = {"unk": _id(trained, 40, 0), "bos": _id(trained, 41, 1), "eos": _id(trained, 42, 2)}
        numbers["pad"] = _id(trained, 43, -1)
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not a complete SentencePiece model ({error})") from error
    notes = []
    if _bytes(normalised.get(2, b"")):
        notes.append(f"{where} normalises text (a character map), llama.cpp doesn't: unusual characters may differ")
    if _int(normalised.get(4, 1)):
        notes.append(f"{where} removes extra spaces, llama.cpp doesn't")
    ids = {name: index for name, index in numbers.items() if 0 <= index < len(pieces)}
    return SentencePiece(pieces, scores, types, ids, bool(_int(normalised.get(3, 1))), tuple(notes))


def _refuse_other_models(
    trainer: Mapping[int, bytes | int], normalizer: Mapping[int, bytes | int], types: list[int], where: str
) -> None:
    kind = _int(trainer.get(3, 1))
    if kind != BPE:
        name = {1: "unigram", 3: "word", 4: "char"}.get(kind, str(kind))
        raise UnsupportedError(f"{where}: a SentencePiece model of type {name}", remedy="Supported: BPE")
    if not _int(trainer.get(35, 0)) or types.count(6) != 256:
        raise UnsupportedError(f"{where}: a SentencePiece model without byte fallback, which llama.cpp needs")
    if _int(trainer.get(24, 0)) or not _int(normalizer.get(5, 1)):
        raise UnsupportedError(f"{where}: spaces are not marked in front of words, as llama.cpp expects")


def _bytes(value: bytes | int) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text is needed")
    return value


def _int(value: bytes | int) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number is needed")
    return value


def _id(trainer: Mapping[int, bytes | int], field: int, default: int) -> int:
    value = _int(trainer.get(field, default))
    return value - 2**64 if value >= 2**63 else value  # int32: -1 is written as 64 bits
