# SPDX-License-Identifier: Apache-2.0
"""Which experts a token uses and with what weight, from the router's scores [n, experts]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lrconvert.families.experts import Experts


def gates_of(scores: torch.Tensor, experts: Experts) -> torch.Tensor:
    """The weight of every expert's answer, [n, experts]; zero for those that a token doesn't use."""
    if experts.gating == "sparsemixer":
        return _sparsemixer(scores, experts.jitter)
    gates = torch.softmax(scores, dim=-1)
    kept = torch.zeros_like(gates)
    largest = gates.topk(experts.used, dim=-1)
    kept.scatter_(-1, largest.indices, largest.values)
    return kept / kept.sum(dim=-1, keepdim=True) if experts.normalised else kept


def _sparsemixer(scores: torch.Tensor, jitter: float) -> torch.Tensor:
    """Of arXiv 2409.12136, without the noise of training: two experts, one after the other. The gate of the best one
    that is left is its softmax among those of them that are near it."""
    gates, left = torch.zeros_like(scores), scores.clone()
    for _ in range(2):
        best = left.max(dim=-1, keepdim=True)
        distance = (best.values - scores) / torch.maximum(scores.abs(), best.values)
        near = left.masked_fill(distance > 2 * jitter, float("-inf"))
        gates.scatter_(-1, best.indices, torch.softmax(near, dim=-1).gather(-1, best.indices))
        left.scatter_(-1, best.indices, float("-inf"))
    return gates


__all__ = ["gates_of"]
