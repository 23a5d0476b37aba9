# SPDX-License-Identifier: Apache-2.0
"""The reference's answers to the cases. One forward pass serves every case that is a prefix of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.checkpoint import Model
from lrconvert.errors import require
from lrconvert.machine import check_memory
from lrconvert.parity.cases import DECODED, Case, kept, stream
from lrconvert.rope import RopeSpec, Tier
from lrconvert.runtimes.backend import Rounding

if TYPE_CHECKING:
    from lrconvert.reference.weights import Weights

MOST_KEPT = 2**28  # bytes of answers that are kept for another code of the same artifact


def check_reference(model: Model, device: str) -> None:
    """`EnvironmentFailure` where the reference can't fit the device's memory: it reads weights one by one, and in
    float32 at least the head is whole."""
    check_memory(4 * model.shape.vocab * model.shape.hidden, f"{model.reference} in the reference", device=device)


class ReferenceRunner:
    """The reference implementation over a model, asked case by case."""

    def __init__(
        self,
        model: Model,
        *,
        device: str = "cpu",
        stored_dtype: str | None = None,
        watch: Callable[[float], None] | None = None,
        rounding: Rounding | None = None,
        coarse: bool = False,
        weights: Weights | None = None,
    ) -> None:
        """`watch` gets the part of a forward pass that is done. `rounding`: compute in float32, as a program does.
        `coarse`: what is compared rounds so much more that float32 (with float64 angles) is exact beside it. `weights`:
        those of another runner over the same model."""
        require("torch", "hf", "the reference implementation")
        import torch

        from lrconvert.reference import Reference, Rotation

        # The rotation is handed over with every question: weights are read once for all of them.
        placeholder = Rotation(model.shape.theta, model.shape.rotary_dim, ())
        self.model, self.stored_dtype, self._device, self._rounding = model, stored_dtype, device, rounding
        narrow = coarse or rounding is not None
        self._reference = Reference(
            model,
            placeholder,
            device=device,
            dtype=torch.float32 if narrow else None,
            stored_dtype=stored_dtype,
            cache=torch.float16 if rounding is not None and rounding.cache == "f16" else None,
            activation_block=0 if rounding is None else rounding.activations,
            results=None if rounding is None or rounding.results == "float32" else getattr(torch, rounding.results),
            weights=weights,
        )
        self._reference.watch = watch
        self._rounded: dict[Rounding, ReferenceRunner] = {}
        self._dense: list[tuple[Tier, int, np.ndarray, np.ndarray]] = []  # tier, tokens, indices, logits
        self._spread: dict[tuple[Tier, float, int, int, int], np.ndarray] = {}

    @property
    def weights(self) -> Weights:
        """For another runner over the same tensors."""
        return self._reference.weights

    @property
    def dtype(self) -> str:
        return str(self._reference.dtype).removeprefix("torch.")

    def _rotate_like(self, spec: RopeSpec) -> None:
        from lrconvert.reference import FactorSet, Rotation

        self._reference.rotation = Rotation(
            spec.base,
            spec.rotary_dim,
            [FactorSet(t.max_length, t.factors, t.start_tokens, t.attention_factor) for t in spec.tiers],
            "float64" if self._rounding is None else self._rounding.angles,
        )

    def rounded(self, rounding: Rounding) -> ReferenceRunner:
        """The same reference with the rounding of a program."""
        if rounding not in self._rounded:
            own = self._reference
            more = {"device": self._device, "stored_dtype": self.stored_dtype, "watch": own.watch}
            self._rounded[rounding] = ReferenceRunner(self.model, rounding=rounding, weights=self.weights, **more)
        return self._rounded[rounding]

    def prepare(
        self, spec: RopeSpec, cases: Iterable[Case], start: Callable[[Tier, int], None] = lambda tier, tokens: None
    ) -> None:
        """Answer the dense forward cases together: one pass a tier, as long as its longest case. `start` gets the tier
        and the tokens of each."""
        for number, lengths in dense_passes(spec, cases).items():
            tier, longest = spec.tiers[number], max(lengths)
            start(tier, longest)
            indices = np.unique(np.concatenate([kept(length) for length in lengths]))
            if self._prepared(tier, longest, indices) is not None:
                continue
            tokens = stream(self.model.shape.vocab, longest)
            logits = self.answer(spec, tokens, tier.max_length, indices, remember=True)
            self._dense.append((tier, longest, indices, logits))

    def _prepared(self, tier: Tier, length: int, wanted: np.ndarray | None = None) -> np.ndarray | None:
        """Logits of a pass with this tier that holds all `wanted` indices (default: those of `length`)."""
        wanted = kept(length) if wanted is None else wanted
        for rotated_with, longest, indices, logits in self._dense:
            if rotated_with == tier and longest >= length and np.isin(wanted, indices).all():
                return logits[np.searchsorted(indices, wanted)]
        return None

    def answer(
        self,
        spec: RopeSpec,
        tokens: Sequence[int] | np.ndarray,
        length: int,
        keep: np.ndarray,
        *,
        remember: bool = False,
    ) -> np.ndarray:
        """Logits of a sequence at `keep`, with the tier of a `length`; `remember`: others will begin as it does."""
        self._rotate_like(spec)
        return self._reference.logits(tokens, length=length, keep=keep, remember=remember)

    def cos_sin(self, spec: RopeSpec, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, [n, d/2] each, in float64; the largest position chooses the tier."""
        import torch

        self._rotate_like(spec)
        rotation = self._reference.rotation
        chosen = rotation.choose(int(positions.max()) + 1)
        cos, sin = rotation.tables(torch.from_numpy(positions), chosen, torch.float64)
        return cos.numpy(), sin.numpy()

    def forward(self, spec: RopeSpec, case: Case, row: int = 0) -> np.ndarray:
        """Logits of a row of a forward or batch case at `kept` of its tokens."""
        length = case.lengths[row]
        chooses = case.context or length  # the number that decides on the tier
        if case.spread:
            return self._spread_out(spec, case, chooses)
        if row == 0 and case.kind == "forward":
            ready = self._prepared(spec.tier_for(chooses), length)
            if ready is not None:
                return ready
        return self.answer(spec, stream(self.model.shape.vocab, length, row), chooses, kept_of_batch(case, row))

    def _spread_out(self, spec: RopeSpec, case: Case, chooses: int) -> np.ndarray:
        """Logits of a spread case, which the codes of an artifact are often asked with the same set."""
        key = (spec.tier_for(chooses), spec.base, spec.rotary_dim, case.length, case.start)
        if key not in self._spread:
            positions = case.positions()
            self._rotate_like(spec)
            tokens, keep = stream(self.model.shape.vocab, len(positions)), kept(len(positions))
            given = {"positions": positions, "length": chooses, "keep": keep}
            logits = self._reference.logits(tokens, **given, remember=case.consecutive)
            if sum(answer.nbytes for answer in self._spread.values()) + logits.nbytes > MOST_KEPT:
                return logits
            self._spread[key] = logits
        return self._spread[key]

    def shifted(self, spec: RopeSpec, case: Case) -> np.ndarray:
        """Logits after each of the `DECODED` tokens that follow when the oldest are forgotten. Only distances
        matter to a rotation, so no key has to move: later tokens just don't see the forgotten ones."""
        read = case.lengths[0]
        self._rotate_like(spec)
        tokens = stream(self.model.shape.vocab, read + DECODED)
        keep = np.arange(read, read + DECODED)
        return self._reference.logits(tokens, length=case.context or read, keep=keep, forgotten=(case.dropped, read))

    def decoded(
        self,
        spec: RopeSpec,
        prompt: np.ndarray,
        tokens: Sequence[int],
        *,
        context: int | None = None,
        cached: bool = False,
        start: int = 0,
    ) -> np.ndarray:
        """Logits that should have chosen each of `tokens` after `prompt`: at every length, a fresh forward pass
        with the tier of that length, or of the `context` (one pass a tier, since a prefix computes what it
        computes, also of those that other cases made). `cached`: each token's key keeps the rotation of the length at
        which it was read. `start` is the position of the first token."""
        sequence = np.concatenate([prompt, np.asarray(tokens[:-1], dtype=np.int64)])
        positions = np.arange(start, start + len(sequence))
        last = np.arange(len(prompt) - 1, len(sequence))  # the indices whose logits count
        self._rotate_like(spec)
        if cached:
            lengths = np.maximum(positions + 1, positions[len(prompt) - 1] + 1)
            return self._reference.logits(sequence, positions=positions, length=lengths, keep=last, remember=True)
        groups: dict[Tier, list[int]] = {}
        for index in last.tolist():
            groups.setdefault(spec.tier_for(context or start + index + 1), []).append(index)
        rows: dict[int, np.ndarray] = {}
        for indices in groups.values():
            count = max(indices) + 1
            where, length = positions[:count], context or start + count
            answer = self._reference.logits(
                sequence[:count], positions=where, length=length, keep=np.asarray(indices), remember=True
            )
            rows |= dict(zip(indices, answer, strict=True))
        return np.stack([rows[index] for index in last.tolist()])


def dense_passes(spec: RopeSpec, cases: Iterable[Case]) -> dict[int, list[int]]:
    """The lengths of the dense forward cases, by the number of their tier."""
    wanted: dict[int, list[int]] = {}
    for case in cases:
        if case.kind == "forward" and not case.spread:
            tier = spec.tiers.index(spec.tier_for(case.context or case.length))
            wanted.setdefault(tier, []).append(case.length)
    return wanted


def kept_of_batch(case: Case, row: int) -> np.ndarray:
    """Indices compared in a row of a batch: as many from the end as the shortest row has."""
    if case.kind == "forward":
        return kept(case.lengths[row])
    count = min(min(case.lengths), 64)
    return np.arange(case.lengths[row] - count, case.lengths[row])
