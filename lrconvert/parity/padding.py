# SPDX-License-Identifier: Apache-2.0
"""Rows that a bake added to the embedding: are they the mean of the others, as they are stored?

The weights of a file are compared tensor by tensor, where a few small rows hide among many. So they are looked at
alone, against a mean that is made here, of the model's own rows.
"""

from __future__ import annotations

import numpy as np

from lrconvert.artifact.checks import Row
from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.onnx_folder import TIED_HEAD
from lrconvert.checkpoint.padding import ENDS
from lrconvert.parity.tolerances import weight_error


def padding_rows(stored: Checkpoint, model: Model, added: int) -> list[Row]:
    """A row for every tensor of the artifact that was padded. `model` has the padded vocabulary too."""
    names = {tensor.name: tensor.name for tensor in model.roles.values() if tensor.role in ENDS}
    if model.shape.tied:
        names[TIED_HEAD] = model.roles["embedding", None].name
    found = []
    for own, name in names.items():
        if (info := stored.tensors.get(own)) is None:
            continue
        mean = model.checkpoint.read(name)[: model.shape.vocab - added].mean(axis=0, dtype=np.float64)
        off = stored.read(own)[-added:].astype(np.float64) - mean
        error = float(np.linalg.norm(off.reshape(added, -1), axis=1).max() / max(float(np.linalg.norm(mean)), 1e-300))
        bound, case = weight_error(info.dtype), f"{added} rows of {own}, error {error:.1e}"
        reason = f"{own}: rows that were added are off by {error:.1e} of the mean of the others; {bound:.0e} is allowed"
        found.append(Row("padding", case, "pass") if error <= bound else Row("padding", case, "fail", reason=reason))
    return found
