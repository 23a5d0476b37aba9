# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as transformers' own class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.pico import FAMILIES

from lrconvert.checkpoint import Model
from lrconvert.training.network import _FusedNorm, fuse_norms, load_network


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_fused_and_strange_ones_left_alone(family: str, pico: Callable[..., Model]) -> None:
    """Every norm of every family becomes one kernel, that of heads too; one whose weight counts from one does not."""
    model = pico(family)
    network = load_network(model, torch.float32)
    if model.shape.norm == "layer":  # PyTorch's own, which is one kernel already
        assert fuse_norms(network) == 0
        return
    norms = [module for module in network.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms) >= 2 * len(network.get_decoder().layers) + 1
    if model.shape.norm_offset:
        assert fuse_norms(network) == 0
        return
    strange = norms[0]
    strange.forward = lambda hidden, real=strange.forward: real(hidden) * (1 + strange.weight)
    assert fuse_norms(network) == len(norms) - 1
    assert not isinstance(strange.forward, _FusedNorm) and isinstance(norms[1].forward, _FusedNorm)
