# SPDX-License-Identifier: Apache-2.0
"""A model with norms of q and k as llama.cpp's step35: the architecture that has them and honours both factor sets.

It was made for another model, so its loader asks for what a plain decoder hasn't: a sliding layer (its cache has two
kinds of layers), a head of its own, and twice the rotated width, of which its full layers take half. The sliding layer
is one more at the end, whose weights are zero: it adds nothing to what the others computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from gguf import GGMLQuantizationType

from lrconvert.checkpoint import Model
from lrconvert.families import ModelShape
from lrconvert.families.base import GGUF_STEP35, LAYER
from lrconvert.targets.gguf.layout import Planned, Value
from lrconvert.targets.gguf.weights import Source, is_plain

NOTE = (
    "written as the step35 architecture, which llama.cpp 0.6 runs and versions from before February 2026 don't know; a "
    "full context can't be shifted there"
)
SLIDING = 1  # tokens that the empty layer sees


def architecture_keys(shape: ModelShape) -> dict[str, Value]:
    """What the loader reads besides the keys of every architecture, or otherwise."""
    keys: dict[str, Value] = {
        "block_count": shape.layers + 1,
        "rope.dimension_count": 2 * shape.rotary_dim,
        "rope.dimension_count_swa": shape.rotary_dim,
        "attention.sliding_window": SLIDING,
        "attention.sliding_window_pattern": [False] * shape.layers + [True],
        "expert_feed_forward_length": shape.ffn,
    }
    return {f"{GGUF_STEP35}.{key}": value for key, value in keys.items()}


def more_tensors(model: Model, kinds: Mapping[str, GGMLQuantizationType]) -> list[Source]:
    """The layer of zeros, and a head where the model has none. Zeros are exact in Q8_0, which needs no matrix."""
    last, found = model.shape.layers - 1, []
    rows = {row.role: row for row in model.family.rows}
    for tensor in model.roles.values():
        if tensor.layer == last:
            before, name = (rows[tensor.role].gguf.replace(LAYER, str(index)) for index in (last, last + 1))
            kind = kinds[before] if is_plain(kinds[before]) else GGMLQuantizationType.Q8_0
            zeros = np.zeros(tensor.shape, np.float32)
            found.append(Source(Planned(name, kind, tensor.shape), tensor.name, values=zeros))
    if model.shape.tied:
        embedding = model.roles["embedding", None]
        head = Planned(rows["lm_head"].gguf, kinds[rows["embedding"].gguf], embedding.shape)
        found.append(Source(head, embedding.name))
    return found
