# SPDX-License-Identifier: Apache-2.0
"""Models in float64 throughout: the reference, and native classes without what they compute in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lrconvert.checkpoint import Model
from lrconvert.reference import FactorSet, Reference, Rotation

TOKENS = np.random.default_rng(5).integers(0, 101, size=48)
EXACT = 1e-10  # of logits, float64 on both sides


class _Exact(torch.nn.Module):
    """cos and sin in float64."""

    def __init__(self, theta: float, width: int) -> None:
        super().__init__()
        self.frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(self, x: Any, position_ids: Any) -> tuple[Any, Any]:
        angles = position_ids[..., None].double() * self.frequencies
        whole = torch.cat((angles, angles), dim=-1)
        return whole.cos().to(x.dtype), whole.sin().to(x.dtype)


def in_float64(network: Any, theta: float, width: int) -> Any:
    """Without the places where native code computes in float32 whatever its weights are: frequencies and norms. (So
    does its own softmax; PyTorch's does not.)"""
    network.model.rotary_emb = _Exact(theta, width)
    norm = torch.nn.functional.rms_norm
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, own=module: norm(x, own.weight.shape, own.weight, own.variance_epsilon)
    return network


def by_reference(model: Model) -> np.ndarray:
    width = model.shape.rotary_dim
    rotation = Rotation(model.shape.theta, width, [FactorSet(2**20, [1.0] * (width // 2), 0, 1.0)])
    return Reference(model, rotation).logits(TOKENS)
