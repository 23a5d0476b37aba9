# SPDX-License-Identifier: Apache-2.0
"""What a search and training compute of a model whose queries grow with the position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.float64 import rotation_of

from lrconvert.checkpoint import Model

pytest.importorskip("torch", reason="needs lrconvert[hf]")
pytest.importorskip("transformers", reason="needs lrconvert[hf]")
TOKENS = np.random.default_rng(3).integers(0, 101, size=160)


def test_losses_are_the_references_beyond_the_window(pico: Callable[..., Model]) -> None:
    """Of tokens in three windows, whatever the model's own rotation: it is replaced, and the scale is not."""
    from lrconvert.reference import Reference
    from lrconvert.training.loaded import LoadedModel

    settings = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    model = pico("ministral3", rope_parameters={"rope_type": "yarn", "factor": 4.0, **settings})
    losses = LoadedModel(model, device="cpu").losses(TOKENS[None])[0]
    wanted, _ = Reference(model, rotation_of(model)).losses(TOKENS, len(TOKENS) - 1)
    assert np.abs(losses - wanted).max() < 1e-3
    forgotten = replace(model, shape=replace(model.shape, query_scale=None))
    wrong, _ = Reference(forgotten, rotation_of(model)).losses(TOKENS, len(TOKENS) - 1)
    assert np.abs(losses - wrong).max() > 0.1
