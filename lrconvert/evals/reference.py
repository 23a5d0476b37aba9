# SPDX-License-Identifier: Apache-2.0
"""The reference implementation as something that is evaluated: what a recipe does, in any code that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from lrconvert import __version__
from lrconvert.checkpoint import Model
from lrconvert.errors import UnsupportedError, require
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.base import Scores
from lrconvert.training.devices import torch_device


class ReferenceSession:
    """The reference over a model, asked row by row in this process: a `Session` that scores and doesn't decode.

    A row's length chooses its tier. Layers attend as the artifact's config says.
    """

    answers: frozenset[str] = frozenset()

    def __init__(self, model: Model, spec: RopeSpec, *, device: str = "cpu") -> None:
        torch = require("torch", "hf", "the reference implementation")
        from lrconvert.reference import FactorSet, Reference, Rotation

        sets = [FactorSet(t.max_length, t.factors, t.start_tokens, t.attention_factor) for t in spec.tiers]
        self._reference = Reference(model, Rotation(spec.base, spec.rotary_dim, sets), device=device)
        place = self._reference.device
        self.info: dict[str, Any] = {
            "lrconvert": __version__,
            "torch": torch.__version__,
            "class": "reference",
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
            "dtype": str(self._reference.dtype).removeprefix("torch."),
        }

    def logits(
        self, rows: Sequence[Sequence[int]], *, positions: Sequence[int] | None = None, keep: Sequence[int]
    ) -> list[np.ndarray]:
        return [self._reference.logits(row, positions=positions, keep=keep) for row in rows]

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        """Logits are made a chunk of tokens at a time: those of a long row are never held at once."""
        return [Scores(*self._reference.losses(row, count)) for row, count in zip(rows, judged, strict=True)]

    def generate(self, prompt: Sequence[int], new_tokens: int) -> NoReturn:
        raise UnsupportedError(
            "the reference implementation scores texts and does not generate: it has no cache",
            remedy="Omit --code reference",
        )

    def close(self) -> None: ...


@contextmanager
def open_reference(
    model: Model, spec: RopeSpec, *, device: str = "cpu", threads: int | None = None
) -> Iterator[ReferenceSession]:
    """The reference over a model under a rotation, with `threads` of PyTorch's for as long as the session lives.

    Raises `UnsupportedError` for weights that can't be read.
    """
    torch = require("torch", "hf", "the reference implementation")
    torch_device(device, "hf", "the reference implementation")
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield ReferenceSession(model, spec, device=device)
    finally:
        torch.set_num_threads(before)
