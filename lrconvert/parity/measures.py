# SPDX-License-Identifier: Apache-2.0
"""How far apart two sets of logits are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measures:
    """Over the compared positions: KL(reference ‖ artifact) in nats, mean and largest; the largest difference
    of a logit; the share of positions where both prefer the same token."""

    kl_mean: float
    kl_max: float
    logit_max: float
    top1: float


def compare(reference: np.ndarray, artifact: np.ndarray, share: float = 1.0) -> Measures:
    """Both [n, vocabulary], float64. A value that isn't finite makes every measure infinite (top1: 0). `share`: the
    divergences are those of so many of the positions, the closest ones."""
    if reference.shape != artifact.shape:
        raise ValueError(f"reference {reference.shape} and artifact {artifact.shape} differ in shape")
    if not np.isfinite(artifact).all():
        return Measures(float("inf"), float("inf"), float("inf"), 0.0)
    p, q = _log_softmax(reference), _log_softmax(artifact)
    # Rounding can leave a sum of −1e-16: a divergence is not negative.
    divergence = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    if share < 1.0:
        divergence = np.sort(divergence)[: max(1, int(share * len(divergence)))]
    same = reference.argmax(axis=-1) == artifact.argmax(axis=-1)
    return Measures(
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        logit_max=float(np.abs(reference - artifact).max()),
        top1=float(same.mean()),
    )


def merge(parts: list[Measures], counts: list[int]) -> Measures:
    """One measure for several rows."""
    return Measures(
        kl_mean=float(np.average([part.kl_mean for part in parts], weights=counts)),
        kl_max=max(part.kl_max for part in parts),
        logit_max=max(part.logit_max for part in parts),
        top1=float(np.average([part.top1 for part in parts], weights=counts)),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
