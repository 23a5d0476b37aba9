# SPDX-License-Identifier: Apache-2.0
"""The result of one check of an artifact: what targets read off their files, and what parity measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "known", "skipped"]


@dataclass(frozen=True)
class Row:
    """One check. For parity: KL(reference ‖ artifact) in nats, mean and largest, against its bound."""

    code: str  # the backend that was asked, or what was looked at: "files", "config", "weights"
    case: str
    verdict: Verdict
    length: int | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    logit_max: float | None = None
    top1: float | None = None
    bound: float | None = None
    reason: str = ""
    basis: str = ""  # where the bound comes from
    noise: float | None = None  # the mean KL that float32 costs the reference, where that was asked for
    trace: tuple[tuple[int, float], ...] = ()  # KL at every compared position, where the case has one sequence

    @property
    def values(self) -> dict[str, Any]:
        """What is known of it, for a report: without the trace, which is for drawings."""
        return {key: value for key, value in vars(self).items() if value not in (None, "") and key != "trace"}

    @property
    def margin(self) -> float | None:
        """The bound over the mean KL: how many times worse it may get."""
        if self.bound is None or self.kl_mean is None:
            return None
        return math.inf if self.kl_mean == 0 else self.bound / self.kl_mean


def rows_of(code: str, good: str, problems: list[tuple[str, str]]) -> list[Row]:
    """A failed row for every problem (case, reason); one that passes, named `good`, when there is none."""
    if not problems:
        return [Row(code, good, "pass")]
    return [Row(code, case, "fail", reason=reason) for case, reason in problems]
