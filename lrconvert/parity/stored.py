# SPDX-License-Identifier: Apache-2.0
"""The weights in an artifact against the model's, where their types round.

Code is compared with the reference on *the weights in the artifact*, so that a rope error can't hide behind the noise
of quantisation. That these are the model's weights is a check of its own, tensor by tensor; what quantisation costs
is measured by the reference alone, with the recipe's factors and without any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lrconvert.artifact.checks import Row
from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.base import CheckpointView
from lrconvert.checkpoint.onnx_folder import TIED_HEAD
from lrconvert.errors import InputError
from lrconvert.parity.cases import Budget
from lrconvert.parity.expected import end_case
from lrconvert.parity.measures import compare
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.parity.tolerances import weight_error
from lrconvert.progress import Progress, Steps
from lrconvert.rope import RopeSpec, Tier

WEIGHTS = "weights"


class StoredWeights(CheckpointView):
    """The weights of a file, for a model whose config and tokenizer take precedence over the file's."""

    def __init__(self, model: Model, stored: Checkpoint) -> None:
        super().__init__(stored)
        self._source, self.config = model.checkpoint, model.checkpoint.config

    def side_files(self) -> dict[str, Path | bytes]:
        return self._source.side_files()


def on_stored_weights(model: Model, stored: Checkpoint) -> Model:
    """The model with the file's weights. `InputError` where one is missing or has another shape."""
    problems = []
    for tensor in model.roles.values():
        found = stored.tensors.get(tensor.name)
        if found is None and not (tensor.role == "lm_head" and model.shape.tied):
            problems.append(f"{tensor.name} is missing")
        elif found is not None and found.shape != tensor.shape:
            problems.append(f"{tensor.name} has shape {list(found.shape)}; the model has {list(tensor.shape)}")
    head = stored.tensors.get(TIED_HEAD)
    if model.shape.tied and head is not None and head.shape != model.roles["embedding", None].shape:
        problems.append(f"{TIED_HEAD} has shape {list(head.shape)}; the embedding has another")
    if problems:
        raise InputError.collect(stored.path, problems)
    found = replace(model, checkpoint=StoredWeights(model, stored))
    return _untied(found) if model.shape.tied and TIED_HEAD in stored.tensors else found


def _untied(model: Model) -> Model:
    """A tied model that was quantised: the product of its last layer has weights of its own."""
    embedding = model.roles["embedding", None]
    head = replace(embedding, role="lm_head", name=TIED_HEAD)
    return replace(model, shape=replace(model.shape, tied=False), roles={**model.roles, ("lm_head", None): head})


# --- weights ---------------------------------------------------------------------------------------------


def check_weights(stored: Checkpoint, model: Model, progress: Progress | None = None) -> tuple[list[Row], bool]:
    """Whether the file's weights are the model's, as closely as their types can say; and whether they are equal.

    The error of a tensor is the norm of the difference over the norm of the tensor. Rows in another order differ by
    about √2, whatever the type.
    """
    rows, exact = [], True
    worst: dict[str, tuple[float, str]] = {}
    names = {tensor.name: tensor.name for tensor in model.roles.values()}
    if model.shape.tied:  # a head that was quantised is a copy of its own
        names[TIED_HEAD] = model.roles["embedding", None].name
    there = {own: name for own, name in names.items() if own in stored.tensors}
    steps = Steps("weights", progress, "tensors")
    for own in there:
        steps.expect(math.prod(stored.tensors[own].shape))
    for own, name in there.items():
        kind = stored.tensors[own].dtype
        steps.start(own, math.prod(stored.tensors[own].shape))
        ours, theirs = stored.read(own), model.checkpoint.read(name)
        if ours.dtype == theirs.dtype and np.array_equal(ours, theirs):
            error = 0.0
        else:
            wide = theirs.astype(np.float64)
            with np.errstate(invalid="ignore"):
                off = ours.astype(np.float64) - wide
            error = float(np.linalg.norm(off) / max(float(np.linalg.norm(wide)), 1e-300))
            error = error if math.isfinite(error) else math.inf  # NaN would be less than nothing
        exact = exact and error == 0.0
        worst[kind] = max(worst.get(kind, (-1.0, "")), (error, own))
    steps.finish()
    for kind, (error, name) in sorted(worst.items()):
        bound = weight_error(kind)
        case = f"{kind}, error up to {error:.1e}"
        if error <= bound:
            rows.append(Row(WEIGHTS, case, "pass"))
        else:
            reason = f"{name} differs from the model's by {error:.1e} of its norm; {kind} allows {bound:.0e}"
            rows.append(Row(WEIGHTS, case, "fail", reason=reason))
    return rows, exact


def quantisation(
    name: str, original: ReferenceRunner, kept: RopeSpec, stored: ReferenceRunner, expected: RopeSpec, budget: Budget
) -> Iterator[Row]:
    """What the stored types cost by themselves, reference against reference, at the end of every tier: with the
    recipe's factors, and without any."""
    plain = {"": (kept, expected), ", without factors": (_plain(kept, kept), _plain(expected, kept))}
    for suffix, (exact, rounded) in plain.items():
        for tier in kept.tiers:
            case = end_case(f"quantisation alone{suffix},", tier.max_length, budget)
            measures = compare(original.forward(exact, case), stored.forward(rounded, case))
            yield Row(name, case.name, "known", length=case.length, reason="", **vars(measures))


def _plain(spec: RopeSpec, kept: RopeSpec) -> RopeSpec:
    """Unscaled rotation; what the weights carry of an attention factor stays undone."""
    folded = spec.tiers[-1].attention_factor / kept.tiers[-1].attention_factor
    tiers = [Tier(t.max_length, (1.0,) * len(t.factors), attention_factor=folded) for t in spec.tiers]
    return replace(spec, tiers=tuple(tiers))
