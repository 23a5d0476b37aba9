# SPDX-License-Identifier: Apache-2.0
"""How far apart two sets of logits are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AT_ONCE = 2**17  # logits: 1 MB, which stays near a core. Whole arrays of a large vocabulary take four times as long


@dataclass(frozen=True)
class Measures:
    """Over the compared positions: KL(reference ‖ artifact) in nats, mean and largest; the largest difference
    of a logit; the share of positions where both prefer the same token."""

    kl_mean: float
    kl_max: float
    logit_max: float
    top1: float


def compare(reference: np.ndarray, artifact: np.ndarray, share: float = 1.0, spared: float = 0.0) -> Measures:
    """Both [n, vocabulary], float64. A value that isn't finite makes every measure infinite (top1: 0). `share`: the
    divergences are those of so many of the positions, the closest ones. `spared`: the largest is that of all but so
    many, rounded down; the mean is of them all."""
    if reference.shape != artifact.shape:
        raise ValueError(f"reference {reference.shape} and artifact {artifact.shape} differ in shape")
    if not np.isfinite(artifact).all():
        return Measures(float("inf"), float("inf"), float("inf"), 0.0)
    found, furthest, same = np.empty(len(reference)), [0.0], 0
    rows = max(1, AT_ONCE // reference.shape[1])
    for start in range(0, len(reference), rows):
        ours, theirs = reference[start : start + rows], artifact[start : start + rows]
        found[start : start + rows] = divergences(ours, theirs)
        furthest.append(float(np.abs(ours - theirs).max()))
        same += int((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum())
    found = np.sort(found)[: max(1, int(share * len(found)))]
    return Measures(
        float(found.mean()), float(found[-1 - int(spared * len(found))]), max(furthest), same / len(reference)
    )


def divergences(reference: np.ndarray, artifact: np.ndarray) -> np.ndarray:
    """KL(reference ‖ artifact) in nats at every position, [n]; both [n, vocabulary], float64."""
    p, q = _log_softmax(reference), _log_softmax(artifact)
    # Rounding can leave a sum of −1e-16: a divergence is not negative.
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


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
