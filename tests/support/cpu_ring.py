# SPDX-License-Identifier: Apache-2.0
"""PyTorch's ring attention on CPUs, with their flash kernel, so that two processes can share a document in a test.

PyTorch has the ring for any kernel, but hands it those of GPUs alone. The private names are those of torch 2.13, the
only version that they were tried with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention

from lrconvert.training.processes import RING_DEVICES

ring: Any = _attention
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
TOKENS = 2  # their dimension in [b, heads, n, channels], and in the log-sum-exps [b, heads, n]


def allow_teams_on_cpus() -> None:
    """In this process, from now on. Attention that the flash kernel does not take is an error: the ring has no other
    kernel of a CPU."""
    RING_DEVICES.add("cpu")
    ring.custom_ops[FORWARD] = ring.custom_ops[BACKWARD] = _in_ring
    torch.backends.cuda.enable_math_sdp(False)  # the switch is for CPUs too


def _in_ring(kernel: Any, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[DTensor, ...]:
    """The kernel's results for this process's part of the tokens, with all of the team's in sight."""
    names = [argument.name for argument in kernel._schema.arguments]
    named = {**dict(zip(names, given, strict=False)), **options}
    mesh = named["query"].device_mesh
    own = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in named.items()}
    if own.pop("attn_mask", None) is not None:
        raise NotImplementedError("the ring knows no mask")
    if kernel is FORWARD:
        found = ring._templated_ring_attention(mesh.get_group(), TOKENS, kernel, **own)
    else:
        found = ring._templated_ring_attention_backward(
            mesh.get_group(), TOKENS, kernel, grad_out_name="grad_out", **own
        )
    return tuple(DTensor.from_local(part, mesh, [Shard(TOKENS)], run_check=False) for part in found)
