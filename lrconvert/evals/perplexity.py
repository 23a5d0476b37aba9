# SPDX-License-Identifier: Apache-2.0
"""Perplexity of long documents, at several lengths of context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrconvert.errors import InputError
from lrconvert.runtimes.base import Session

JUDGED = 1024  # tokens whose loss counts: the same ones at every length


def same_token_perplexity(
    session: Session, tokens: Sequence[int] | np.ndarray, length: int, judged: int = JUDGED
) -> float:
    """Perplexity of the document's last `judged` tokens, seen at the end of a context of `length` tokens.

    The judged tokens do not depend on the length, so what differs between lengths is the context alone:
    a model that can use, or at least stand, a longer context does not get worse.
    """
    if length > len(tokens) or judged >= length:
        raise InputError(f"a text of {len(tokens)} tokens can't be judged at {length} with {judged} judged tokens")
    window = np.asarray(tokens[-length:], dtype=np.int64)
    # Logits at index i predict token i + 1.
    (logits,) = session.logits([window.tolist()], keep=list(range(length - judged - 1, length - 1)))
    return float(np.exp(losses(logits, window[-judged:]).mean()))


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target under its row of logits, in nats."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(targets)), targets]
