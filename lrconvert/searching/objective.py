# SPDX-License-Identifier: Apache-2.0
"""What a search minimises: losses of tokens in long documents, at one length or at several with weights.

- `perplexity`: the mean loss of all tokens of a text. A document's first n tokens are a document of n tokens under the
  same set, so shorter lengths cost nothing beside the longest.
- `needle`: only the answer's tokens of documents that hide a key and ask for it at the end (after LongRoPE2, arXiv
  2502.20082, section 3.2, whose documents are other ones). Every weighted length has documents of its own.
- `mixed`: the mean of both.

Losses come as one array a document: entry t is the loss of token t + 1, in nats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lrconvert.checkpoint.tokenizer import Encode
from lrconvert.errors import InputError
from lrconvert.evals.passkey import PasskeyFormat, build_document
from lrconvert.evals.texts import Text
from lrconvert.rope import Tier, compose
from lrconvert.searching.space import Candidate
from lrconvert.training.keys import KeyMaker
from lrconvert.training.rows import RowOptions, make_row

Kind = Literal["perplexity", "needle", "mixed"]
PARTS: dict[Kind, dict[str, float]] = {
    "perplexity": {"text": 1.0},
    "needle": {"needle": 1.0},
    "mixed": {"text": 0.5, "needle": 0.5},
}
NEEDLES = 4  # documents with a key at each weighted length: at 1/8, 3/8, 5/8, 7/8 of it
Losses = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens, and which losses count at which lengths: `spans` are (length, first, end), indices of losses.

    `positions` are those of the tokens where they jump; None: 0 … n − 1.
    """

    part: str  # "text" or "needle"
    tokens: NDArray[np.int64]
    spans: tuple[tuple[int, int, int], ...]
    positions: NDArray[np.int64] | None = None

    @property
    def judged(self) -> tuple[int, int]:
        """The range of losses that anything asks for."""
        return min(first for _, first, _ in self.spans), max(end for _, _, end in self.spans)


@dataclass(frozen=True, eq=False)
class Objective:
    """Documents and weights: loss = Σ over parts and lengths of their weights times the mean over documents.

    `own` is the set that the model has already: candidates are applied on top of it (`rope.compose`).
    """

    kind: Kind
    documents: tuple[Document, ...]
    weights: dict[int, float]  # by length, summing to 1
    own: Tier | None = None

    def rotation(self, candidate: Candidate, length: int) -> Tier:
        """What the model is rotated with to try a candidate, and what a recipe gets of it."""
        tier = candidate.tier(length)
        return tier if self.own is None else compose(self.own, tier)

    @property
    def length(self) -> int:
        """Tokens of the longest document."""
        return max(len(document.tokens) for document in self.documents)

    @property
    def tokens(self) -> int:
        """Tokens of one evaluation."""
        return sum(len(document.tokens) for document in self.documents)

    @property
    def sha256(self) -> str:
        """Of all tokens: texts, tokenizer, seed and passkey sentences are all in them."""
        found = hashlib.sha256()
        for document in self.documents:
            for values in (document.tokens, document.positions):
                if values is not None:
                    found.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
        return found.hexdigest()

    def _counts(self) -> dict[tuple[str, int], int]:
        """In how many documents a part is judged at a length."""
        counts: dict[tuple[str, int], int] = {}
        for document in self.documents:
            for length, _, _ in document.spans:
                counts[document.part, length] = counts.get((document.part, length), 0) + 1
        return counts

    def score(self, found: Sequence[Losses]) -> tuple[float, dict[str, float]]:
        """The objective, and the mean loss of each part at each length (`text@8192`), from the losses of every
        document; an entry that nothing asks for may be anything."""
        counts = self._counts()
        means = dict.fromkeys(counts, 0.0)
        for document, values in zip(self.documents, found, strict=True):
            for length, first, end in document.spans:
                means[document.part, length] += (
                    float(np.mean(values[first:end], dtype=np.float64)) / counts[document.part, length]
                )
        loss = sum(
            weight * share * means[part, length]
            for length, weight in self.weights.items()
            for part, share in PARTS[self.kind].items()
        )
        return loss, {f"{part}@{length}": value for (part, length), value in sorted(means.items())}

    def token_weights(self, index: int) -> NDArray[np.float64]:
        """d objective / d loss of every token of a document, shape [n − 1]."""
        document, counts = self.documents[index], self._counts()
        weights = np.zeros(len(document.tokens) - 1)
        for length, first, end in document.spans:
            share = self.weights.get(length, 0.0) * PARTS[self.kind][document.part]
            weights[first:end] += share / counts[document.part, length] / (end - first)
        return weights


def reported_lengths(original_window: int, length: int, weighted: Sequence[int]) -> list[int]:
    """Where losses are recorded: the original window, its doublings, the document's own length, the weighted ones."""
    doublings = [original_window << power for power in range(40) if original_window << power < length]
    return sorted({*doublings, *weighted, length})


def text_documents(
    texts: Sequence[Text], length: int, count: int, lengths: Sequence[int], join: bool
) -> list[Document]:
    """`count` documents of `length` tokens, spread over the texts and within them without overlap; fewer where there
    is less text.

    Raises `InputError` when no text is long enough, unless `join` may make one of all.
    """
    sources = [text.tokens for text in texts if len(text.tokens) >= length]
    if not sources:
        longest, together = max((len(text.tokens) for text in texts), default=0), sum(len(t.tokens) for t in texts)
        if not join or together < length:
            raise InputError(
                f"the longest text has {longest} tokens, {length - longest} fewer than the {length} of the target"
                + (f"; all texts together have {together}" if len(texts) > 1 else ""),
                remedy=_way_out(join, together, length, longest),
            )
        sources = [np.concatenate([text.tokens for text in texts])]
    spans = tuple((reported, 0, reported - 1) for reported in lengths if reported <= length)
    shares = [count // len(sources) + (place < count % len(sources)) for place in range(len(sources))]
    made = []
    for tokens, share in zip(sources, shares, strict=True):
        share = min(share, len(tokens) // length)
        starts = np.linspace(0, len(tokens) - length, share).astype(int) if share > 1 else [0] * share
        made += [Document("text", tokens[start : start + length], spans) for start in starts]
    return made


def _way_out(join: bool, together: int, length: int, longest: int) -> str:
    if not join and together >= length and together > longest:
        return "Join the texts with --allow-concatenate, or give a longer one"
    return f"Give more text, or search for a --target of at most {max(longest, together)}"


def needle_documents(form: PasskeyFormat, encode: Encode, lengths: Sequence[int], seed: int) -> list[Document]:
    """`NEEDLES` documents with a key at every length; the same seed makes the same ones."""
    made = []
    for length in lengths:
        for index in range(NEEDLES):
            rng = np.random.default_rng([seed, length, index])
            depth = (2 * index + 1) / (2 * NEEDLES)
            prompt, answer = build_document(form, encode, length, depth, rng)
            tokens = np.asarray(prompt + answer, dtype=np.int64)
            span = (length, len(prompt) - 1, len(tokens) - 1)
            made.append(Document("needle", tokens, (span,)))
    return made


@dataclass(frozen=True)
class JumpingRows:
    """Rows of `length` tokens whose positions jump over the target: `count` of them instead of whole documents.

    Each costs a fraction of a whole document. How well they rank sets depends on what the model was trained on
    (docs/extend.md).
    """

    length: int
    count: int = 4
    jumps: tuple[int, int] = (1, 4)
    keys: int = 24


def jumping_documents(
    rows: JumpingRows, kind: Kind, texts: Sequence[Text], target: int, maker: KeyMaker | None, seed: int
) -> list[Document]:
    """Rows for every part of the objective: windows of text, and windows with labelled keys of which the answers count.

    Raises `InputError` for texts that are shorter than a row, and for rows without room for a key.
    """
    sources = [text.tokens for text in texts]
    made = []
    for part in PARTS[kind]:
        options = RowOptions(rows.length, target, rows.jumps, rows.keys if part == "needle" else 0)
        for index in range(rows.count):
            row = make_row(sources, options, maker, np.random.default_rng([seed, index, part == "needle"]))
            spans = [(0, rows.length - 1)] if part == "text" else _runs(row.answers)
            if not spans:
                raise InputError(f"a row of {rows.length} tokens has no room for a key", remedy="Use longer rows")
            made.append(Document(part, row.tokens, tuple((target, first, end) for first, end in spans), row.positions))
    return made


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(first, end) of every run of true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def build_objective(
    kind: Kind,
    weights: dict[int, float],
    *,
    original_window: int,
    texts: Sequence[Text],
    documents: int,
    join: bool = False,
    needles: Callable[[Sequence[int]], list[Document]],
) -> Objective:
    """The objective at the lengths of `weights` (any positive numbers); `needles` makes the retrieval documents.

    Raises `InputError` for texts that are too short.
    """
    total = sum(weights.values())
    scaled = {length: weight / total for length, weight in sorted(weights.items())}
    made: list[Document] = []
    if "text" in PARTS[kind]:
        longest = max(scaled)
        lengths = reported_lengths(original_window, longest, list(scaled))
        made += text_documents(texts, longest, documents, lengths, join)
    if "needle" in PARTS[kind]:
        made += needles(list(scaled))
    return Objective(kind, tuple(made), scaled)
