# SPDX-License-Identifier: Apache-2.0
"""Layers that differ from each other: how far they see, how they rotate, and how configs state that.

A layer's reach is how many tokens it attends to, itself included; 0 for all of them. A recipe rotates every layer but
those with a θ of their own: they rotate plainly, by that θ, in sequences of any length (0: they don't rotate).
"""

from __future__ import annotations

from dataclasses import dataclass

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_KINDS = (SLIDING, FULL)
LOCAL_THETA = "rope_local_base_freq"  # the key of θ of layers that slide, in families that have one


@dataclass(frozen=True)
class StatedLayers:
    """How the configs of a family state layers of other kinds: the keys.

    `full_every`: where no list says which layers slide, all do but every such one; `full_every_key`: where a config
    has another number. `own_theta`: θ of the layers that slide, whatever their window: also where it is that of all.
    `rotates`: a list with 0 for every layer that doesn't rotate; without it, every n-th doesn't: n is under
    `unrotated_every`.
    """

    full_every: int | None = None
    full_every_key: str | None = None
    own_theta: str | None = None
    rotates: str | None = None
    unrotated_every: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        """All of them."""
        found = (self.full_every_key, self.own_theta, self.rotates, self.unrotated_every)
        return frozenset(key for key in found if key is not None)
