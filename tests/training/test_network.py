# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as transformers' own class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.pico import FAMILIES, write_pico

from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import UnsupportedError
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


def test_a_folder_that_names_another_model_is_refused(tmp_path: Path) -> None:
    """transformers would load that model, from wherever it is, and not this folder's weights."""
    write_pico(tmp_path / "other", seed=99)
    folder = write_pico(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(UnsupportedError, match=r"adapter_config\.json is in the folder"):
        load_network(open_model(folder), torch.float32)
