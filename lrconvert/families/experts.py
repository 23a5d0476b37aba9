# SPDX-License-Identifier: Apache-2.0
"""Experts of a decoder: which of them a token uses and with what weight, and how configs state that.

    scores = router · x                            one for each expert
    made   = Σ gate_e · mlp_e(x)                   over the experts that are used

"softmax": the gates are the largest `used` of the softmax over all scores; where `normalised`, divided by their sum.

A shared expert is one more, which every token uses: σ(shared_router · x) · mlp_shared(x) is added.

"sparsemixer" (arXiv 2409.12136, at inference), twice: the expert with the largest score s_m among those that are left,
its gate the softmax over those whose score is near it: (s_m - s) / max(|s|, s_m) <= 2 · jitter. The gates don't sum to
one: far from ties each of them is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Gating = Literal["softmax", "sparsemixer"]
SPARSEMIXER_USED = 2  # it is defined for two experts


@dataclass(frozen=True)
class Experts:
    """Of every layer of a model: `count` gated MLPs that are `ffn` channels wide, of which a token uses `used`."""

    count: int
    used: int
    ffn: int
    gating: Gating = "softmax"
    normalised: bool = True
    shared: int = 0  # how wide the expert is that every token uses; 0: there is none
    jitter: float = 0.0  # of sparsemixer: half the distance, relative to the scores, at which scores count as near

    @property
    def symbols(self) -> dict[str, int]:
        """The symbols that shapes of their tensors use."""
        return {"experts": self.count, "expert_ffn": self.ffn, "shared_ffn": self.shared, "one": 1}


@dataclass(frozen=True)
class StatedExperts:
    """How the configs of a family state them: the keys. `normalised` None: always."""

    count: str = "num_local_experts"
    used: str = "num_experts_per_tok"
    ffn: str = "intermediate_size"
    gating: Gating = "softmax"
    normalised: str | None = None
    jitter: str | None = None
    shared: str | None = None
    count_too: str | None = None  # another name of `count`, which transformers writes as well

    @property
    def keys(self) -> frozenset[str]:
        """All of them."""
        return frozenset(
            key
            for key in (self.count, self.count_too, self.used, self.ffn, self.normalised, self.jitter, self.shared)
            if key is not None
        )
