# SPDX-License-Identifier: Apache-2.0
"""Which projections of the blocks LoRA trains, under the names that the families' classes have."""

from __future__ import annotations

from collections.abc import Collection

# A fused projection holds what is asked for.
TURNED = ["q_proj", "k_proj", "qkv_proj"]  # queries and keys: what the rotation turns
ATTENTION = [*TURNED, "v_proj", "o_proj"]
PROJECTIONS = {
    "turned": TURNED,
    "attention": ATTENTION,
    "all": [*ATTENTION, "gate_proj", "up_proj", "down_proj", "gate_up_proj"],
}


def projections_of(modules: Collection[str]) -> str | None:
    """The least of `PROJECTIONS` that holds an adapter's modules; None where it trains none of them, or others."""
    names = {module.rpartition(".")[2] for module in modules}
    return next((name for name, those in PROJECTIONS.items() if names and names <= set(those)), None)
