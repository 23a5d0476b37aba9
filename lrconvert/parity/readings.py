# SPDX-License-Identifier: Apache-2.0
"""Prompts that a session has read: what answers one case answers another one that asks the same.

Under causal attention a prompt that lacks the last token of another computes what that one computes, and a program that
chooses by the size of a context sees no difference between sizes that it rounds to one. So the lengths below and at a
boundary are one reading, and so is a short prompt in a long context for the case and for the search for mistakes. No
other prompts share one: a shorter prompt is a question of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from lrconvert.parity.cases import Case, kept

REMEMBERED = 2  # readings whose logits are held: 50 MB each for 49,152 words
Ask = Callable[[int, int, np.ndarray], np.ndarray]  # tokens, context and indices to logits [n, v]


class Readings:
    """The answers of one session to dense forward cases in contexts, which a program makes in sizes of `step`."""

    def __init__(self, step: int, cases: Sequence[Case]) -> None:
        self._step = step
        self._cases = [case for case in cases if shares(case) and not case.skipped]
        self._known: deque[tuple[int, int, np.ndarray, np.ndarray]] = deque(maxlen=REMEMBERED)

    def logits(self, case: Case, ask: Ask) -> np.ndarray:
        """What the session answers at `kept` of the case's tokens."""
        size, wanted = self._size(case), kept(case.length)
        for of_size, length, indices, answer in self._known:
            if of_size == size and length - case.length in (0, 1) and np.isin(wanted, indices).all():
                return answer[np.searchsorted(indices, wanted)]
        near = [other for other in self._cases if self._size(other) == size and abs(other.length - case.length) <= 1]
        together = [case, *near]
        longest = max(together, key=lambda other: other.length)
        indices = np.unique(np.concatenate([kept(other.length) for other in together]))
        answer = ask(longest.length, longest.context or longest.length, indices)
        self._known.append((size, longest.length, indices, answer))
        return answer[np.searchsorted(indices, wanted)]

    def _size(self, case: Case) -> int:
        return -(-(case.context or 0) // self._step) * self._step


def shares(case: Case) -> bool:
    """Whether a case is one that readings answer."""
    return case.kind == "forward" and not case.spread and case.context is not None
