# SPDX-License-Identifier: Apache-2.0
"""Which tokens of which documents count for a perplexity, and what they see: one table of protocols.

A protocol turns texts and a length into contexts: forward passes of their own, since a length chooses its tier. Where
contexts lie never depends on the model, so two models get the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.errors import InputError, UsageError

JUDGED = 1024  # tokens whose loss counts in the same-token protocol: the same ones at every length
EXCERPTS = 4


@dataclass(frozen=True)
class Context:
    """One forward pass over `tokens[start:end]` of a text, the last `judged` of which count; `excerpt` numbers the
    parts of the texts that a protocol takes (ends of contexts, documents)."""

    excerpt: int
    text: int
    start: int
    end: int
    judged: int


@dataclass(frozen=True)
class Plan:
    """What is measured: at which lengths (tokens), of how many excerpts of the texts, and by which protocol.

    By default the same last `judged` tokens count at the end of contexts of every length. `whole`: all tokens of
    documents cut at each length. `step`: contexts that move by this many tokens over documents of `document_tokens`
    (default: the longest length). Both: whole documents up to `step`, moving contexts beyond.

    Raises `UsageError` for options that don't go together.
    """

    lengths: tuple[int, ...]
    judged: int | None = None  # default: JUDGED
    excerpts: int = EXCERPTS
    whole: bool = False
    step: int | None = None
    document_tokens: int | None = None

    def __post_init__(self) -> None:
        shortest, longest = min(self.lengths), max(self.lengths)
        if shortest < 2:
            raise UsageError("a length of 1 has no token to predict", remedy="Use 2 or more")
        if self.judged is not None and (self.whole or self.step):
            raise UsageError("--judged can't be combined with --whole or --sliding-window: they count all tokens")
        if self.document_tokens is not None and self.step is None:
            raise UsageError("--document-tokens needs --sliding-window")
        if self.step is not None and not self.whole and self.step > shortest:
            raise UsageError(
                f"--sliding-window {self.step} is longer than the contexts of {shortest} tokens: tokens between two "
                "contexts would not count",
                remedy="Use a smaller one, or add --whole to read lengths up to it as whole documents",
            )
        if self.document_tokens is not None and self.document_tokens < longest:
            raise UsageError(
                f"--document-tokens {self.document_tokens} is less than the longest length, {longest}",
                remedy="Use at least the longest length",
            )

    @property
    def needed(self) -> int:
        """Tokens that a text must have to be of use."""
        return self.document_tokens or max(self.lengths)

    @property
    def counted(self) -> int:
        """Tokens of an excerpt that count in the same-token protocol."""
        return min(self.judged or JUDGED, min(self.lengths) - 1)

    def protocol(self, length: int) -> Protocol:
        if self.step is not None and (not self.whole or length > self.step):
            return PROTOCOLS["sliding window"]
        return PROTOCOLS["whole" if self.whole else "same tokens"]

    def contexts(self, texts: Sequence[int], length: int) -> list[Context]:
        """The passes at a length, for texts of these numbers of tokens. Raises `InputError` where all are too short."""
        return self.protocol(length).contexts(self, texts, length)

    def check(self, texts: Sequence[int]) -> None:
        """Raises `InputError` where no text is long enough: said before a model is loaded."""
        self.contexts(texts, max(self.lengths))

    @property
    def sentence(self) -> str:
        """What the figures are, for a report."""
        used = {self.protocol(length).name: self.protocol(length) for length in sorted(self.lengths)}
        values = {"counted": self.counted, "step": self.step, "needed": self.needed}
        first, *others = [protocol.sentence.format(**values) for protocol in used.values()]
        return f"up to {self.step} tokens: {first}; beyond: {others[0]}" if others else first


# --- protocols -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """`sentence` says in a report what a figure is; `contexts` are the passes at one length."""

    name: str
    sentence: str
    contexts: Callable[[Plan, Sequence[int], int], list[Context]]


def _same_tokens(plan: Plan, texts: Sequence[int], length: int) -> list[Context]:
    ends = excerpt_ends(texts, max(plan.lengths), plan.excerpts)
    return [Context(number, text, end - length, end, plan.counted) for number, (text, end) in enumerate(ends)]


def _whole(plan: Plan, texts: Sequence[int], length: int) -> list[Context]:
    starts = enumerate(document_starts(plan, texts))
    return [Context(number, text, start, start + length, length - 1) for number, (text, start) in starts]


def _sliding(plan: Plan, texts: Sequence[int], length: int) -> list[Context]:
    """Of a first context all tokens but the first count, of every later one those that it is the first to reach and
    that have something before them."""
    assert plan.step is not None
    made = []
    ends = [*range(length, plan.needed, plan.step), plan.needed]
    for number, (text, start) in enumerate(document_starts(plan, texts)):
        for end, before in zip(ends, [1, *ends], strict=False):
            judged = min(end - before, length - 1)  # a context that shares nothing with the last one has a first token
            made.append(Context(number, text, start + end - length, start + end, judged))
    return made


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "same tokens",
            "perplexity of the same last {counted} tokens of each excerpt, at the end of a context of every length: "
            "only the context differs between lengths",
            _same_tokens,
        ),
        Protocol(
            "whole",
            "perplexity of whole documents, cut at each length: every token but the first counts",
            _whole,
        ),
        Protocol(
            "sliding window",
            "perplexity of the first {needed} tokens of each document, in contexts of each length that move by {step} "
            "tokens: of the first context every token but the first counts, of each later one those that no context "
            "before it reached and that have a token before them (Press et al. 2021)",
            _sliding,
        ),
    )
}


# --- places ----------------------------------------------------------------------------------------------


def excerpt_ends(lengths: Sequence[int], longest: int, excerpts: int) -> list[tuple[int, int]]:
    """Text and end of each excerpt: as far apart as the texts allow, and no more of them than fit without sharing
    judged tokens."""
    return [
        (text, int(end))
        for text, size, share in _shares(lengths, longest, excerpts)
        for end in np.linspace(size, longest, min(share, 1 + (size - longest) // JUDGED)).astype(int)
    ]


def document_starts(plan: Plan, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Text and first token of each document: the text's own start, and where several are taken of one text, as far
    apart as it allows and without sharing tokens."""
    return [
        (text, int(start))
        for text, size, share in _shares(lengths, plan.needed, plan.excerpts)
        for start in np.linspace(0, size - plan.needed, min(share, size // plan.needed)).astype(int)
    ]


def _shares(lengths: Sequence[int], needed: int, excerpts: int) -> list[tuple[int, int, int]]:
    """Text, its tokens, and how many of the `excerpts` it gets; of texts that are long enough."""
    long_enough = [(index, length) for index, length in enumerate(lengths) if length >= needed]
    if not long_enough:
        raise InputError(
            f"the longest text has {max(lengths, default=0)} tokens; {needed} are needed",
            remedy="Give longer texts, or shorter --lengths",
        )
    each, more = divmod(excerpts, len(long_enough))
    return [(index, length, each + (place < more)) for place, (index, length) in enumerate(long_enough)]
