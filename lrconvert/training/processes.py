# SPDX-License-Identifier: Apache-2.0
"""The processes that torchrun starts: who answers which question, and what several of them share.

Usually every process holds the whole model and answers a question of its own. The processes of a *team* share a
document: each computes a part of it (PyTorch's context parallelism). With *sharded* weights each process holds a part
of every layer (FSDP). In both cases all do the same at the same time: a process without a question answers the last
one again.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lrconvert.errors import UsageError

# PyTorch has ring attention for kernels of these alone; on any other device the first layer of a team would fail.
RING_DEVICES = {"cuda"}


@cache  # a mesh has connections of its own, which a process keeps to its end: models that follow each other share them
def _mesh(device: str, width: int, team: int) -> DeviceMesh:
    return init_device_mesh(device, (width, team), mesh_dim_names=("team", "part"))


class Workers:
    """All processes, seen from this one. `team`: how many share a document; `sharded`: whether all share weights."""

    def __init__(self, device: torch.device, *, team: int = 1, sharded: bool = False) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.team, self.sharded = team, sharded
        if self.count % team:
            raise UsageError(
                f"--context-parallel {team} needs {team} processes or a multiple, and there is 1"
                if self.count == 1
                else f"--context-parallel {team} needs a multiple of {team} processes, and there are {self.count}",
                remedy=f"Start it with torchrun --nproc-per-node {team}",
            )
        if team > 1 and device.type not in RING_DEVICES:
            raise UsageError("--context-parallel needs GPUs: PyTorch's context parallelism does not run on a CPU")
        if sharded and self.count == 1:
            raise UsageError("--shard-weights splits the weights among torchrun's processes, but there is only one")
        if self.count > 1 and not dist.is_initialized():
            # Answers are small and lie in main memory; only shared documents and weights need the GPUs' own network.
            shared = device.type == "cuda" and (team > 1 or sharded)
            dist.init_process_group("cpu:gloo,cuda:nccl" if shared else "gloo")
        self.rank = dist.get_rank() if self.count > 1 else 0
        self._mesh: DeviceMesh | None = None
        if team > 1 or sharded:
            self._mesh = _mesh(device.type, self.width, team)

    @property
    def width(self) -> int:
        """Questions that are answered at the same time."""
        return self.count // self.team

    @property
    def together(self) -> bool:
        """Whether processes wait for each other within an evaluation."""
        return self._mesh is not None

    def own(self, questions: int) -> int | None:
        """Which of the questions this process answers."""
        index = self.rank // self.team
        return min(index, questions - 1) if index < questions or self.together else None

    def everyone(self, own: Any) -> list[Any]:
        """Each process's value, in all of them; none goes on before all have come here."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, own)
        return found

    def gather(self, own: Any, questions: int) -> list[Any]:
        """Everybody's answers, one a question."""
        return self.everyone(own)[:: self.team][:questions]

    def agree(self, value: Any) -> Any:
        """The leading process's value."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum_of_all(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Summed over the questions of all processes; a team's members all have its whole answer."""
        return values if self.count == 1 else np.sum(self.gather(values, self.width), axis=0)

    # --- weights -----------------------------------------------------------------------------------------

    def sum_gradients(self, weights: Sequence[torch.Tensor]) -> None:
        """Of whole weights, the sum over all processes. FSDP has summed those that are in parts."""
        if self.count == 1:
            return
        for weight in weights:
            if hasattr(weight, "to_local"):
                continue
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)

    def norm(self, squares: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> float:
        """The norm of all gradients, from the sum of squares of each one's own part."""
        parts = [hasattr(weight, "to_local") for weight in weights]
        mine = sum(float(square) for square, part in zip(squares, parts, strict=True) if part)
        whole = sum(float(square) for square, part in zip(squares, parts, strict=True) if not part)
        return math.sqrt(whole + (sum(self.everyone(mine)) if any(parts) else 0.0))

    def place(self, network: nn.Module, layers: Any, device: torch.device) -> None:
        """Move the network to the device; the weights of its layers in parts where they are shared."""
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            whole = init_device_mesh(device.type, (self.count,))
            for layer in layers:
                # Explicit: without a wrapped module above, a layer would keep its whole weights after a forward pass.
                fully_shard(layer, mesh=whole, reshard_after_forward=True)
                # Losses are weighted over all rows, so gradients add up. A plain sum: gloo knows no other.
                layer.set_gradient_divide_factor(1.0)
                layer.set_force_sum_reduction_for_comms(True)
        network.to(device)

    # --- documents ---------------------------------------------------------------------------------------

    @property
    def multiple(self) -> int:
        """What a document's length has to be a multiple of. A process gets one part of the front and one of the back:
        then all compute the same amount of attention."""
        return 1 if self.team == 1 else 2 * self.team

    @contextlib.contextmanager
    def spread(self, *tensors: torch.Tensor) -> Iterator[None]:
        """Within, the tensors [b, n] hold this process's part of each row, and attention spans the whole team."""
        if self.team == 1:
            yield
            return
        from torch.distributed.tensor.experimental import context_parallel

        with context_parallel(
            self._part,
            buffers=list(tensors),
            buffer_seq_dims=[1] * len(tensors),
            no_restore_buffers=set(tensors),
        ):
            yield

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """[b, n] of the whole team, from everyone's part."""
        if self.team == 1:
            return part
        from torch.distributed.tensor.experimental._attention import context_parallel_unshard

        return context_parallel_unshard(self._part, [part], [1])[0]

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the team, in every process of it."""
        if self.team > 1:
            dist.all_reduce(part, group=self._part.get_group())
        return part

    @property
    def _part(self) -> DeviceMesh:
        assert self._mesh is not None  # a team of one asks nobody
        return self._mesh["part"]
