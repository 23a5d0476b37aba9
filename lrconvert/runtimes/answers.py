# SPDX-License-Identifier: Apache-2.0
"""What some sessions answer beyond logits.

A session names its answers in `Session.answers`. Each stands for a protocol here, so that who asks needs to know no
runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from lrconvert.runtimes.base import Scores

Answer = Literal["contexts", "shift", "cached", "tokens", "rotary", "graph", "placements", "behind"]


@runtime_checkable
class AnswersContexts(Protocol):
    """ "contexts": a tier is chosen by the size of a context in tokens, and `context` asks for one."""

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        *,
        positions: Sequence[int] | None = None,
        keep: Sequence[int],
        context: int | None = None,
    ) -> list[np.ndarray]: ...

    def generate(
        self, prompt: Sequence[int], new_tokens: int, *, context: int | None = None
    ) -> tuple[list[int], np.ndarray]: ...


@runtime_checkable
class AnswersShift(Protocol):
    """ "shift": a full context can forget its oldest tokens."""

    def shifted(
        self, tokens: Sequence[int], drop: int, more: Sequence[int], *, context: int | None = None
    ) -> np.ndarray:
        """Logits after each token of `more`, [len(more), vocabulary], once `tokens` were read, the first `drop` of them
        forgotten and the others moved to the start."""
        ...


@runtime_checkable
class AnswersCached(Protocol):
    """ "cached": decoding can go on with keys that were cached for another tier."""

    def generate(
        self, prompt: Sequence[int], new_tokens: int, *, policy: Literal["exact", "cached"] = "exact"
    ) -> tuple[list[int], np.ndarray]: ...


@runtime_checkable
class AnswersTokens(Protocol):
    """ "tokens": the artifact's own tokenizer, as the runtime reads it."""

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]: ...


@runtime_checkable
class AnswersRotary(Protocol):
    """ "rotary": the rotary function alone."""

    def cos_sin(self, positions: Sequence[int], *, evaluator: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin at positions [n], [n, d/2] each; by the runtime, or by a second implementation."""
        ...


@runtime_checkable
class AnswersGraph(Protocol):
    """ "graph": the artifact is an ONNX graph, which a second implementation of the operators can run."""

    def evaluated(self, tokens: Sequence[int], keep: Sequence[int]) -> np.ndarray:
        """Logits at `keep`, [len(keep), vocabulary]."""
        ...


@runtime_checkable
class AnswersPlacements(Protocol):
    """ "placements": which operators ran on the CPU although a GPU was asked for."""

    def on_cpu(self) -> list[str]: ...


@runtime_checkable
class AnswersBehind(Protocol):
    """ "behind": a text is read once, and rows are scored behind it with its keys and values cached."""

    def score_behind(self, prompt: Sequence[int], rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        """As `Session.score` of the prompt with each row behind it."""
        ...


PROTOCOLS: dict[Answer, type] = {
    "contexts": AnswersContexts,
    "shift": AnswersShift,
    "cached": AnswersCached,
    "tokens": AnswersTokens,
    "rotary": AnswersRotary,
    "graph": AnswersGraph,
    "placements": AnswersPlacements,
    "behind": AnswersBehind,
}
