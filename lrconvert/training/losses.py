# SPDX-License-Identifier: Apache-2.0
"""Losses of tokens from hidden states, a chunk at a time: the logits of a long document never exist at once.

Shapes: b documents, n tokens, c hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

MAX_LOGITS = {"cpu": 2**23, "cuda": 2**28}  # entries held at once: 1 GiB of float32 on a GPU
Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states to logits
LossesOf = Callable[[torch.Tensor, slice], torch.Tensor]  # of a part, from its hidden states


def chunks(first: int, end: int, *, vocab: int, rows: int, device: torch.device) -> list[slice]:
    """The tokens `first` … `end` of `rows` documents in parts whose logits fit `MAX_LOGITS`."""
    size = max(1, MAX_LOGITS[device.type] // (vocab * rows))
    return [slice(start, min(start + size, end)) for start in range(first, end, size)]


def cross_entropy(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss in nats of each target, [b, n], from hidden states [b, n, c]."""
    # Widened inside the kernel: a float32 copy of the logits would be half of its memory traffic.
    log_probabilities = functional.log_softmax(head(hidden), dim=-1, dtype=torch.float32)
    return -log_probabilities.gather(-1, targets[..., None])[..., 0]


def chunked_losses(head: Head, hidden: torch.Tensor, targets: torch.Tensor, parts: Iterable[slice]) -> torch.Tensor:
    """Losses of the tokens in `parts`, zero elsewhere: float32, [b, n]."""
    losses = torch.zeros(targets.shape, device=hidden.device)
    for part in parts:
        losses[:, part] = cross_entropy(head, hidden[:, part], targets[:, part])
    return losses


def chunked_choices(head: Head, hidden: torch.Tensor, targets: torch.Tensor, parts: Iterable[slice]) -> torch.Tensor:
    """Whether each target is its hidden state's first choice: [b, n], false outside of `parts`."""
    found = torch.zeros(targets.shape, dtype=torch.bool, device=hidden.device)
    for part in parts:
        found[:, part] = head(hidden[:, part]).argmax(-1) == targets[:, part]
    return found


def of_targets(head: Head, targets: torch.Tensor) -> LossesOf:
    """Losses of a part's targets [b, n]."""
    return lambda hidden, part: cross_entropy(head, hidden, targets[:, part])


@dataclass(frozen=True)
class Taught:
    """What a teacher says of rows: its hidden states [b, n, c], the head that makes logits of them, and for which
    losses [b, n − 1] it is the aim."""

    hidden: torch.Tensor
    head: Head
    where: NDArray[np.bool_]


def of_teacher(head: Head, targets: torch.Tensor, taught: Taught) -> LossesOf:
    """As `of_targets`, but where a teacher is the aim it is the divergence KL(teacher ‖ model)."""
    where = torch.from_numpy(np.pad(taught.where, ((0, 0), (0, 1)))).to(targets.device)  # the last predicts nothing

    def losses(hidden: torch.Tensor, part: slice) -> torch.Tensor:
        own = functional.log_softmax(head(hidden), dim=-1, dtype=torch.float32)
        with torch.no_grad():
            theirs = functional.log_softmax(taught.head(taught.hidden[:, part]), dim=-1, dtype=torch.float32)
        plain = -own.gather(-1, targets[:, part, None])[..., 0]
        return torch.where(where[:, part], (theirs.exp() * (theirs - own)).sum(-1), plain)

    return losses


def chunked_gradient(
    hidden: torch.Tensor, losses_of: LossesOf, weights: torch.Tensor, parts: Iterable[slice]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [b, n], zero outside of `parts`, and d Σ weights·losses / d hidden, [b, n, c]: what goes back through the
    decoder. `losses_of` makes those of a part from its hidden states.

    Each chunk's gradient is made with its logits, which are then forgotten.
    """
    losses = torch.zeros(hidden.shape[:2], device=hidden.device)
    upstream = torch.zeros_like(hidden)
    for part in parts:
        own = hidden[:, part].detach().requires_grad_()
        found = losses_of(own, part)
        (upstream[:, part],) = torch.autograd.grad((found * weights[:, part]).sum(), own)
        losses[:, part] = found.detach()
    return losses, upstream
