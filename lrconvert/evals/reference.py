# SPDX-License-Identifier: Apache-2.0
"""The reference implementation as something that is evaluated: what a recipe does, whatever code will run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from lrconvert import __version__
from lrconvert.artifact.manifest import Manifest
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.base import refuse_quantised
from lrconvert.errors import UnsupportedError, require
from lrconvert.evals.subject import Subject
from lrconvert.parity.promise import promise
from lrconvert.parity.stored import on_stored_weights
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.base import Scores
from lrconvert.training.devices import torch_device


class ReferenceSession:
    """The reference over a model, asked row by row in this process: a `Session` that scores and doesn't decode.

    A row's length chooses its tier. Attention is full, whatever sliding window a config has, as in artifacts.
    """

    def __init__(self, model: Model, spec: RopeSpec, *, device: str = "cpu") -> None:
        torch = require("torch", "hf", "the reference implementation")
        refuse_quantised(model, "the reference implementation")
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
            "the reference implementation scores texts and does not generate: it keeps no cache",
            remedy="Leave --code reference out",
        )

    def close(self) -> None: ...


@contextmanager
def open_reference(subject: Subject, *, device: str = "cpu", threads: int | None = None) -> Iterator[ReferenceSession]:
    """The reference over what is evaluated: an artifact's own weights under its recipe, a model under the recipe given,
    or under the rotation of its config.

    Raises `UnsupportedError` for weights that can't be read, `InputError` for a recipe that is another model's.
    """
    torch = require("torch", "hf", "the reference implementation")
    torch_device(device, "hf", "the reference implementation")
    model, spec = computed(subject)
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield ReferenceSession(model, spec, device=device)
    finally:
        torch.set_num_threads(before)


def computed(subject: Subject) -> tuple[Model, RopeSpec]:
    """The weights, and the rotation that is to be computed on them."""
    model = subject.model()
    stored = model.checkpoint
    if subject.recipe is not None and subject.given is not None:
        return model, model.resolve(subject.recipe)
    if not stored.native:
        model = on_stored_weights(model, stored)
    if subject.recipe is not None:
        options = Manifest.read(subject.artifact).options
        spec = model.resolve(subject.recipe, options.get("window"))
        made = promise(model, spec, options, subject.artifact, gguf=stored.gguf is not None)
        return made.model, made.spec
    found, shape = model.rope, model.shape
    window = found.tiers[-1].max_length
    return model, RopeSpec(model.family.name, shape.rotary_dim, shape.theta, found.original_window, window, found.tiers)
