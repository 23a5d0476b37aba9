# SPDX-License-Identifier: Apache-2.0
"""How long a search takes on the device at hand: its passes, by what passes over two short rows took."""

from __future__ import annotations

from dataclasses import dataclass

from lrconvert.precision import long_name
from lrconvert.searching.plan import SearchPlan
from lrconvert.training.costs import PROBES, Cost, forward_cost
from lrconvert.training.devices import computing_threads, default_dtype


@dataclass(frozen=True)
class Device:
    """A device, named in words, with the rows that it read and what they say of a pass."""

    name: str
    rows: tuple[int, int]
    cost: Cost

    def seconds(self, plan: SearchPlan) -> float:
        """Of all evaluations; one with a gradient counts as the passes that it takes the time of."""
        rows = [(tier.budget, [len(document.tokens) for document in tier.objective.documents]) for tier in plan.tiers]
        return sum(budget * sum(map(self.cost.seconds, lengths)) for budget, lengths in rows)


def measured_device(
    plan: SearchPlan, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
) -> Device:
    """Loads the model and reads rows for some seconds. `device`, `dtype`, `threads`: as of a search.
    `EnvironmentFailure` where PyTorch, a GPU or memory is missing."""
    import torch

    from lrconvert.training.loaded import LoadedModel

    kind = default_dtype(device, "a search") if dtype is None else long_name(dtype)
    with computing_threads(threads):
        loaded = LoadedModel(plan.model, device=device, dtype=kind)
        number = torch.get_num_threads()
        used = f"this CPU with {number} thread{'s' if number > 1 else ''}"
        name = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else used
        return Device(name, PROBES[loaded.device.type], forward_cost(loaded))
