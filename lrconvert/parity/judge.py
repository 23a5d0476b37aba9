# SPDX-License-Identifier: Apache-2.0
"""The reference's answers to the cases. One forward pass serves every case that is a prefix of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.base import refuse_quantised
from lrconvert.errors import require
from lrconvert.parity.cases import Case, kept, stream
from lrconvert.rope import RopeSpec


class Judge:
    """The reference implementation over a model, asked case by case."""

    def __init__(self, model: Model, *, device: str = "cpu", stored_dtype: str | None = None) -> None:
        require("torch", "hf", "the reference implementation")
        refuse_quantised(model, "the reference implementation")
        from lrconvert.reference import Reference, Rotation

        # The rotation is handed over with every question: weights are read once for all of them.
        placeholder = Rotation(model.shape.theta, model.shape.rotary_dim, ())
        self.model = model
        self._reference = Reference(model, placeholder, device=device, stored_dtype=stored_dtype)
        self._dense: dict[tuple[object, int], tuple[int, np.ndarray, np.ndarray]] = {}

    @property
    def dtype(self) -> str:
        return str(self._reference.dtype).removeprefix("torch.")

    def _rotate_like(self, spec: RopeSpec) -> None:
        from lrconvert.reference import FactorSet, Rotation

        self._reference.rotation = Rotation(
            spec.base,
            spec.rotary_dim,
            [FactorSet(t.max_length, t.factors, t.start_tokens, t.attention_factor) for t in spec.tiers],
        )

    def prepare(self, spec: RopeSpec, cases: Iterable[Case]) -> None:
        """Answer the dense forward cases together: one pass a tier, as long as its longest case."""
        wanted: dict[int, list[int]] = {}
        for case in cases:
            if case.kind == "forward" and not case.spread:
                tier = spec.tiers.index(spec.tier_for(case.length))
                wanted.setdefault(tier, []).append(case.length)
        for tier, lengths in wanted.items():
            longest = max(lengths)
            indices = np.unique(np.concatenate([kept(length) for length in lengths]))
            logits = self._ask(spec, stream(self.model.shape.vocab, longest), longest, indices)
            self._dense[spec.tiers[tier], longest] = (longest, indices, logits)

    def _ask(self, spec: RopeSpec, tokens: Sequence[int] | np.ndarray, length: int, keep: np.ndarray) -> np.ndarray:
        self._rotate_like(spec)
        return self._reference.logits(tokens, length=length, keep=keep)

    def forward(self, spec: RopeSpec, case: Case, row: int = 0) -> np.ndarray:
        """Logits of a row of a forward or batch case at `kept` of its tokens."""
        length = case.lengths[row]
        if case.spread:
            positions = case.positions()
            self._rotate_like(spec)
            tokens = stream(self.model.shape.vocab, len(positions))
            return self._reference.logits(tokens, positions=positions, keep=kept(len(positions)))
        if row == 0 and case.kind == "forward":
            for (tier, _), (longest, indices, logits) in self._dense.items():
                if tier == spec.tier_for(length) and longest >= length:
                    return logits[np.searchsorted(indices, kept(length))]
        return self._ask(spec, stream(self.model.shape.vocab, length, row), length, kept_of_batch(case, row))

    def decoded(self, spec: RopeSpec, prompt: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """Logits that should have chosen each of `tokens` after `prompt`: at every length, a fresh forward
        pass with the tier of that length (one pass a tier, since a prefix computes what it computes)."""
        sequence = np.concatenate([prompt, np.asarray(tokens[:-1], dtype=np.int64)])
        ends = np.arange(len(prompt), len(sequence) + 1)  # the lengths whose last logits count
        groups: dict[object, list[int]] = {}
        for end in ends.tolist():
            groups.setdefault(spec.tier_for(end), []).append(end)
        rows: dict[int, np.ndarray] = {}
        for lengths in groups.values():
            longest = max(lengths)
            answer = self._ask(spec, sequence[:longest], longest, np.asarray(lengths) - 1)
            rows |= dict(zip(lengths, answer, strict=True))
        return np.stack([rows[end] for end in ends.tolist()])


def kept_of_batch(case: Case, row: int) -> np.ndarray:
    """Indices compared in a row of a batch: as many from the end as the shortest row has."""
    if case.kind == "forward":
        return kept(case.lengths[row])
    count = min(min(case.lengths), 64)
    return np.arange(case.lengths[row] - count, case.lengths[row])
