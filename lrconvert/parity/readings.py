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
Ask = Callable[[Case, np.ndarray], np.ndarray]  # of the longest case that a reading answers, at indices: logits [n, v]


class Readings:
    """The answers of one session to forward cases of consecutive tokens in contexts, which a program makes in sizes of
    `step`."""

    def __init__(self, step: int, cases: Sequence[Case]) -> None:
        self._step = step
        self._cases = [case for case in cases if shares(case) and not case.skipped]
        self._known: deque[tuple[int, Case, np.ndarray, np.ndarray]] = deque(maxlen=REMEMBERED)

    def logits(self, case: Case, ask: Ask) -> np.ndarray:
        """What the session answers at `kept` of the case's tokens."""
        size, wanted = self._size(case), kept(case.count)
        for of_size, read, indices, answer in self._known:
            same = of_size == size and read.start == case.start
            if same and read.count - case.count in (0, 1) and np.isin(wanted, indices).all():
                return answer[np.searchsorted(indices, wanted)]
        near = [other for other in self._cases if self._size(other) == size and other.start == case.start]
        together = [case, *(other for other in near if abs(other.count - case.count) <= 1)]
        longest = max(together, key=lambda other: other.count)
        indices = np.unique(np.concatenate([kept(other.count) for other in together]))
        answer = ask(longest, indices)
        self._known.append((size, longest, indices, answer))
        return answer[np.searchsorted(indices, wanted)]

    def _size(self, case: Case) -> int:
        return -(-(case.context or 0) // self._step) * self._step


def shares(case: Case) -> bool:
    """Whether a case is one that readings answer."""
    return case.kind == "forward" and (case.consecutive or not case.spread) and case.context is not None
