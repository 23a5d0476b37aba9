# SPDX-License-Identifier: Apache-2.0
"""The cases that an artifact is verified with: lengths on both sides of every boundary, the far end, a batch, decoding.

Short sequences have consecutive positions. Where a length is beyond the budget, the same number of
tokens is spread over it, dense at both ends: the rotation sees every distance and the true last position, at
the cost of a short prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lrconvert.engines.capability import Capability
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.answers import Answer
from lrconvert.runtimes.backend import ANYTHING, Accepts

SEED = 20240221  # the day LongRoPE was published
SPREAD_TOKENS = 512  # tokens of a case that is spread over its length
KEPT = 128  # positions of a sequence whose logits are compared, half of them the last ones
DECODED = 8  # tokens decoded across a boundary
AROUND = 4  # of them up to the boundary


@dataclass(frozen=True)
class Budget:
    """How long sequences may be before they are spread (`dense`; `alone`: where the reference is compared with itself)
    or not decoded (`decode`), in tokens. `sides`: ask one length on each side of every boundary and the far end, and
    nothing else. `prompt`: tokens of a prompt beyond `dense` that is decoded from, where it need not begin at 0."""

    dense: int
    decode: int
    sides: bool = False
    alone: int = SPREAD_TOKENS
    prompt: int = SPREAD_TOKENS

    def at_most(self, tokens: int) -> Budget:
        """The same with no longer sequences; a spread one always fits."""
        tokens = max(tokens, SPREAD_TOKENS)
        return replace(self, dense=min(self.dense, tokens), decode=min(self.decode, tokens))

    def most(self, accepts: Accepts) -> int:
        """Tokens of the longest prompt. What can't be spread is read whole, also where only sides are asked."""
        return CPU.dense if self.sides and accepts.positions == "none" else max(self.dense, SPREAD_TOKENS)


CPU = Budget(dense=4224, decode=8320)
GPU = Budget(dense=65600, decode=65600)
# In float32 transformers' attention keeps the whole matrix of scores: 144 GiB for 9 heads at 64k.
GPU_FLOAT32 = Budget(dense=33000, decode=33000)
QUICK = Budget(dense=SPREAD_TOKENS, decode=0, sides=True)  # on any device


@dataclass(frozen=True)
class Case:
    """One question. `lengths`: tokens of each row, for `decode` the length of the prompt, for `shift` of what is
    read before the oldest quarter is forgotten. `context`: the size of a sequence's context in tokens, in code that
    chooses a tier by that."""

    name: str
    kind: Literal["forward", "batch", "decode", "shift"]
    lengths: tuple[int, ...]
    spread: bool = False
    consecutive: bool = False  # spread, but as consecutive positions that end at the length
    start: int = 0  # the position at which consecutive tokens and the prompt of a decode case begin
    context: int | None = None
    cached: bool = False  # keys from before a boundary are kept, as they were rotated then
    # What the code is known to get wrong, whatever the recipe: measured and shown; it never fails a verification.
    known: str | None = None
    skipped: str | None = None

    @property
    def length(self) -> int:
        """The longest sequence whose logits are compared."""
        return self.lengths[0] + (DECODED - 1 if self.kind in ("decode", "shift") else 0)

    @property
    def answer(self) -> Answer | None:
        """What a session has to answer besides logits."""
        if self.kind == "shift":
            return "shift"
        return "cached" if self.cached else "contexts" if self.context is not None else None

    @property
    def dropped(self) -> int:
        """Tokens that a `shift` forgets."""
        return self.lengths[0] // 4

    @property
    def tokens(self) -> int:
        """Tokens that a runtime reads to answer it."""
        if self.spread:
            return self.count
        return sum(self.lengths) - self.start + (DECODED if self.kind in ("decode", "shift") else 0)

    @property
    def count(self) -> int:
        """Tokens of the sequence of a `forward` case."""
        return SPREAD_TOKENS if self.spread and not self.consecutive else self.lengths[0] - self.start

    def positions(self) -> np.ndarray:
        """Positions of a spread case: three eighths dense at each end, the rest evenly between."""
        length, edge = self.lengths[0], SPREAD_TOKENS * 3 // 8
        if self.consecutive:
            return np.arange(self.start, length)
        middle = np.linspace(edge, length - edge - 1, SPREAD_TOKENS - 2 * edge + 2)[1:-1]
        return np.concatenate([
            np.arange(edge), middle.astype(np.int64), np.arange(length - edge, length)
        ])  # fmt: skip


def stream(vocabulary: int, count: int, row: int = 0) -> np.ndarray:
    """The tokens of a row: random, the same for every length, so that one is a prefix of the other."""
    return np.random.default_rng([SEED, row]).integers(0, vocabulary, size=count)


def kept(count: int) -> np.ndarray:
    """Indices of `count` tokens whose logits are compared: the last half of `KEPT`, the rest spread."""
    if count <= KEPT:
        return np.arange(count)
    tail = np.arange(count - KEPT // 2, count)
    return np.concatenate([np.linspace(0, count - KEPT // 2 - 1, KEPT // 2).astype(np.int64), tail])


def build_cases(
    spec: RopeSpec,
    capability: Capability,
    budget: Budget,
    *,
    accepts: Accepts = ANYTHING,
    boundaries: Sequence[int] | None = None,
) -> Iterator[Case]:
    """The cases for a recipe in one piece of code. `boundaries`: those to ask around, by default those of
    `spec`; code that chooses once has none of its own, and must not change anything at the recipe's."""
    boundaries = spec.boundaries if boundaries is None else boundaries
    cases = list(_lengths(spec, budget, accepts, boundaries))
    if budget.sides:
        steps = capability.context_step
        yield from (replace(case, context=_context_of(case, spec)) if steps else case for case in cases)
        return
    if accepts.positions != "none":
        cases += _batches(spec, capability, accepts)
    for boundary in boundaries:
        cases += _decodes(boundary, capability, budget, accepts)
    if capability.context_step:
        yield from (replace(case, context=_context_of(case, spec)) for case in cases)
        yield from _contexts(spec, accepts)
        return
    yield from cases
    if not boundaries and spec.window > 4 * DECODED:
        yield Case("decode", "decode", (min(spec.window // 2, 256),))


def _context_of(case: Case, spec: RopeSpec) -> int:
    """The size of a context that is as large as the case needs; for consecutive positions far out, of one that gets the
    same tier and holds their tokens."""
    if case.consecutive:
        return min(case.length, (spec.boundaries[-1] if spec.boundaries else 0) + SPREAD_TOKENS)
    return max(case.lengths) + (DECODED if case.kind == "decode" else 0)


def _contexts(spec: RopeSpec, accepts: Accepts) -> Iterator[Case]:
    """What only code with contexts can be asked: it serves a short prompt with the set of its context, decodes in
    each, and forgets the oldest tokens of a full one (exact while no attention factor is left to be applied
    again, so only then)."""
    short, far = spec.tiers[0].max_length, min(spec.window, spec.tiers[0].max_length + 256)
    if spec.boundaries:
        prompt = min(short // 2, 1024)
        yield Case("short prompt, long context", "forward", (prompt,), context=far)
        yield Case("decode, short context", "decode", (min(short, 512) - DECODED,), context=min(short, 512))
    yield Case("decode, long context", "decode", (min(short, 512) - DECODED,), context=far)
    if spec.tiers[-1].attention_factor == 1.0 and accepts.shifts:
        read = min(512, spec.window - DECODED)
        yield Case("after a context shift", "shift", (read,), context=far)


def _lengths(spec: RopeSpec, budget: Budget, accepts: Accepts, boundaries: Sequence[int]) -> Iterator[Case]:
    names: dict[int, str] = {}
    end, dense = spec.window - accepts.reserved, budget.most(accepts)
    for boundary in boundaries:
        if not budget.sides:
            names.setdefault(boundary - 1, f"below {boundary}")
        names.setdefault(boundary, f"at {boundary}")
        names.setdefault(boundary + 1, f"one past {boundary}")
    if not boundaries:
        names.setdefault(min(64, spec.window), "short")
    counts = sorted({tier.start_tokens for tier in spec.tiers if tier.start_tokens > 1})
    for count in counts:
        if count + 1 <= spec.window:
            names.setdefault(count + 1, f"one past {count} start tokens")
    names.setdefault(end, "far end")
    if end > dense and accepts.positions == "none":
        names.setdefault(dense, f"at {dense}")
    for length, name in sorted(names.items()):
        spread = length > dense
        if spread and accepts.positions == "none":
            skipped = f"{length} consecutive tokens are beyond this device's budget; use --full"
            yield Case(name, "forward", (length,), skipped=skipped)
        elif length <= end:
            # Below a boundary they begin where those at it do: it is the same reading without its last token.
            last = length + 1 if length + 1 in boundaries else length
            consecutive = spread and accepts.positions == "consecutive"
            start = last - SPREAD_TOKENS if consecutive else 0
            yield Case(name, "forward", (length,), spread=spread, consecutive=consecutive, start=start)


def _batches(spec: RopeSpec, capability: Capability, accepts: Accepts) -> Iterator[Case]:
    """Left padding within the first tier, and with rows on both sides of the first boundary."""
    within = min(spec.tiers[0].max_length, 256)
    if not accepts.padded:
        yield Case("batch", "batch", (within,) * 3)
        return
    name = "several sequences" if capability.context_step else "batch, left-padded"
    yield Case(name, "batch", (within, max(2, within // 2), max(1, within // 5)))
    short = spec.tiers[0].max_length
    if spec.boundaries and short < 2048:
        known = None if capability.row_tiers else "one tier for the whole batch: short rows get the long set"
        yield Case("batch across the boundary", "batch", (short + 3, short - 3), known=known)


def _decodes(boundary: int, capability: Capability, budget: Budget, accepts: Accepts) -> Iterator[Case]:
    known = None if capability.switches else "keys cached before the boundary keep the short set"
    prompt, name = (boundary - AROUND,), f"decode across {boundary}"
    start = max(0, prompt[0] - budget.prompt) if accepts.decodes_anywhere and boundary > budget.dense else 0
    skipped = None
    if boundary - start > budget.decode:
        skipped = f"a prompt of {boundary} tokens is beyond this device's budget; use a GPU with more memory, or --full"
    if not accepts.cached_keys:
        yield Case(name, "decode", prompt, known=known, skipped=skipped, start=start)
        return
    yield Case(f"{name}, read anew", "decode", prompt, skipped=skipped, start=start)
    yield Case(f"{name}, cached keys", "decode", prompt, cached=True, skipped=skipped, start=start)
