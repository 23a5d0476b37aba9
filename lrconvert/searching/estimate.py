# SPDX-License-Identifier: Apache-2.0
"""How long a search takes on the device at hand: its passes, by what passes over two short rows took."""

from __future__ import annotations

from dataclasses import dataclass

from lrconvert.machine import check_memory, size
from lrconvert.precision import ITEM_BYTES, long_name
from lrconvert.searching.plan import SearchPlan
from lrconvert.training.costs import PROBES, Cost, forward_cost, token_bytes, weight_count
from lrconvert.training.devices import computing_threads, default_dtype, device_memory, process_device


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


def check_fits(plan: SearchPlan, device: str | None, *, team: int = 1, processes: int = 1) -> None:
    """`EnvironmentFailure` for documents that can't fit the device's memory, before anything is loaded: the least that
    weights and hidden states take. `team` processes share a document, `processes` the weights."""
    target = process_device(device, "a search")
    has, bytes_each = device_memory(target), ITEM_BYTES[plan.dtype]
    tokens = max(len(document.tokens) for tier in plan.tiers for document in tier.objective.documents)
    weights = weight_count(plan.model) * bytes_each / processes
    each = token_bytes(plan.model.shape, bytes_each) / team

    def fits(has: int) -> str:
        most = int((has - weights) / each)
        return f"documents of {most} tokens fit" if most > 1 else f"its weights alone take {size(weights)}"

    check_memory(
        weights + each * tokens,
        f"a search on documents of {tokens} tokens on {target}",
        has=has,
        fits=fits,
        remedy="Search for a shorter --target, with --dtype bf16 or --shard-weights, or on a larger device",
    )


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
