# SPDX-License-Identifier: Apache-2.0
"""Models in float64 throughout: the reference, and native classes without what they compute in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from lrconvert.checkpoint import Model, open_model
from lrconvert.families import get_family
from lrconvert.reference import FactorSet, Reference, Rotation

TOKENS = np.random.default_rng(5).integers(0, 101, size=48)
EXACT = 1e-10  # of logits, float64 on both sides


class _Exact(torch.nn.Module):
    """cos and sin in float64. `own`: θ of the layers that slide, where they have one."""

    def __init__(self, theta: float, width: int, own: float | None) -> None:
        super().__init__()
        self.thetas = {"full_attention": theta, "sliding_attention": own or theta}
        self.exponents = -torch.arange(0, width, 2, dtype=torch.float64) / width

    def forward(self, x: Any, position_ids: Any, layer_type: str = "full_attention") -> tuple[Any, Any]:
        angles = position_ids[..., None].double() * self.thetas[layer_type] ** self.exponents
        whole = torch.cat((angles, angles), dim=-1)
        return whole.cos().to(x.dtype), whole.sin().to(x.dtype)


def in_float64(network: Any, theta: float, width: int, own: float | None = None) -> Any:
    """Without the places where native code computes in float32 whatever its weights are: frequencies, norms and
    routers. (So does its own softmax of scores; PyTorch's does not.)"""
    getattr(network.model, "language_model", network.model).rotary_emb = _Exact(theta, width, own)
    norm = torch.nn.functional.rms_norm
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, own=module: norm(x, own.weight.shape, *_weighted(own))
        elif hasattr(module, "scalar_embed_scale"):  # Gemma's embedding
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
        elif type(module).__name__.endswith("Router"):
            module.forward = _widely(module.forward)
    return network


def _weighted(module: Any) -> tuple[Any, float]:
    """What a norm multiplies with, and its epsilon; Gemma's weights count from one."""
    if hasattr(module, "variance_epsilon"):
        return module.weight, module.variance_epsilon
    return 1.0 + module.weight, module.eps


def _widely(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Native code in which nothing is narrowed to float32."""
    softmax = torch.nn.functional.softmax

    def wide(x: Any, dim: int, dtype: Any = None) -> Any:
        return softmax(x, dim=dim)

    def run(*given: Any) -> Any:
        doubled = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
        with doubled, mock.patch.object(torch.nn.functional, "softmax", wide):
            return forward(*given)

    return run


def of_experts(family: str) -> dict[str, str]:
    """What `from_pretrained` has to be told: experts one by one, since the fused products take no float64."""
    return {} if get_family(family).experts is None else {"experts_implementation": "eager"}


def natively(folder: Path) -> np.ndarray:
    """Logits of transformers' own class, in float64."""
    from transformers import AutoModelForCausalLM

    model = open_model(folder)
    shape, more = model.shape, of_experts(model.family.name)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa", **more)
    own = shape.plain_theta
    network = in_float64(network.eval(), shape.theta, shape.rotary_dim, own)
    with torch.no_grad(), divided_in_float64():
        return network(torch.as_tensor(TOKENS)[None]).logits[0].numpy()


@contextmanager
def divided_in_float64() -> Iterator[None]:
    """Within, quotients of integers (positions by a window) are float64, not the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def rotation_of(model: Model) -> Rotation:
    """The model's plain one."""
    width = model.shape.rotary_dim
    return Rotation(model.shape.theta, width, [FactorSet(2**20, [1.0] * (width // 2), 0, 1.0)])


def by_reference(model: Model) -> np.ndarray:
    return Reference(model, rotation_of(model)).logits(TOKENS)
