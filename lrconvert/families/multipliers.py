# SPDX-License-Identifier: Apache-2.0
"""What a decoder multiplies with besides its weights, and how files state it. Families without any have ones.

    x = embedding · E[token]
    x = x + residual · attention(norm(x)),   scores: attention · q·k / sqrt(head_dim)
    x = x + residual · mlp(norm(x))
    logits = logits · (head · norm(x))

The reference, the search, the ONNX graph, the GGUF writer and the folds read these four numbers from
`ModelShape.multipliers`; how a config spells them is a matter of its family's table alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Multipliers:
    """The four multipliers, each positive and finite; 1 changes nothing."""

    embedding: float = 1.0
    residual: float = 1.0  # of what attention and MLP add
    attention: float = 1.0  # of scores, besides 1 / sqrt(head_dim)
    logits: float = 1.0


NAMES = ("embedding", "residual", "attention", "logits")


@dataclass(frozen=True)
class Stated:
    """How a file states a multiplier: under `key` stands a number, and the multiplier is that number to the `power`,
    times the `times`: numbers of the shape ("layers", "hidden", "head_dim") with their exponents."""

    key: str
    power: float = 1
    times: Mapping[str, float] = field(default_factory=dict)

    def multiplier(self, value: float, numbers: Mapping[str, int]) -> float:
        """What `value` under the key means in a model with these `numbers`. Infinite or zero where float64 ends."""
        try:
            return value**self.power * self._others(numbers)
        except (OverflowError, ZeroDivisionError):
            return math.inf

    def value(self, multiplier: float, numbers: Mapping[str, int]) -> float:
        """What stands under the key of a model with this multiplier."""
        return (multiplier / self._others(numbers)) ** (1 / self.power)

    def _others(self, numbers: Mapping[str, int]) -> float:
        return power_of(self.times, numbers)


def power_of(times: Mapping[str, float], numbers: Mapping[str, int]) -> float:
    """The product of `numbers` with these exponents."""
    return math.prod(numbers[name] ** exponent for name, exponent in times.items())
