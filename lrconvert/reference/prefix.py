# SPDX-License-Identifier: Apache-2.0
"""Passes that the reference need not compute twice.

A token attends to those before it, so what a sequence computes for its first tokens is what any other sequence that
begins with them computes, as long as they are rotated alike. Their keys and values are kept: a sequence that is read
again with other tokens behind them costs those tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Layer = tuple[torch.Tensor, torch.Tensor]  # keys (rotated) and values, [g, n, d] each


@dataclass(frozen=True)
class Read:
    """Tokens with their positions, and the rotation of each, as a number that stands for it."""

    tokens: np.ndarray
    positions: np.ndarray
    rotations: np.ndarray

    def common(self, other: Read) -> int:
        """How many tokens both begin with."""
        most = min(len(self.tokens), len(other.tokens))
        same = self.tokens[:most] == other.tokens[:most]
        same &= self.positions[:most] == other.positions[:most]
        same &= self.rotations[:most] == other.rotations[:most]
        return most if same.all() else int(same.argmin())


class Prefixes:
    """Keys and values of the last sequences, of at most `room` bytes together."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: list[tuple[Read, list[Layer]]] = []
        self._rotations: list[object] = []

    def number(self, rotation: object) -> int:
        """What stands for a rotation here: equal ones have one number."""
        if rotation not in self._rotations:
            self._rotations.append(rotation)
        return self._rotations.index(rotation)

    def longest(self, read: Read) -> tuple[int, list[Layer]]:
        """How many tokens a kept sequence has in common with this one, and its layers."""
        found = [(kept.common(read), layers) for kept, layers in self._kept]
        return max(found, key=lambda each: each[0], default=(0, []))

    def keep(self, read: Read, layers: list[Layer]) -> None:
        """The oldest go where there is no room; what is too large alone is not kept."""
        if self.longest(read)[0] == len(read.tokens):
            return
        self._kept = [(kept, old) for kept, old in self._kept if kept.common(read) < len(kept.tokens)]
        self._kept.append((read, layers))
        while self._kept and sum(_bytes(old) for _, old in self._kept) > self.room:
            del self._kept[0]


def _bytes(layers: list[Layer]) -> int:
    return sum(each.nbytes for layer in layers for each in layer)
