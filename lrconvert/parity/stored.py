# SPDX-License-Identifier: Apache-2.0
"""The weights in an artifact against the model's, where their types round.

Code is compared with the reference on *the weights in the artifact*, so that a rope error can't hide behind the noise
of quantisation. That these are the model's weights is a check of its own, tensor by tensor; what quantisation costs
is measured by the reference alone, with the recipe's factors and without any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lrconvert.artifact.checks import Row
from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.base import CheckpointView
from lrconvert.checkpoint.onnx_folder import TIED_HEAD
from lrconvert.errors import InputError
from lrconvert.families.base import is_norm
from lrconvert.parity.cases import Budget
from lrconvert.parity.distance import Distance, Pair
from lrconvert.parity.expected import end_case
from lrconvert.parity.measures import compare
from lrconvert.parity.reference_runner import ReferenceRunner
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
    about √2, whatever the type. A row of a large tensor is a small part of its norm, so rows are judged one by one too.
    """
    names = {tensor.name: tensor.name for tensor in model.roles.values()}
    if model.shape.tied:  # a head that was quantised is a copy of its own
        names[TIED_HEAD] = model.roles["embedding", None].name
    offsets = {tensor.name: model.shape.norm_offset for tensor in model.roles.values() if is_norm(tensor.role)}
    pairs = [
        Pair(stored, own, model.checkpoint, name, offsets.get(name, 0.0))
        for own, name in names.items()
        if own in stored.tensors
    ]
    kept = model.checkpoint.tensors
    added = [name for name in stored.tensors if name not in names and name not in kept]
    return _rows(pairs, progress, added, exactly=False)


def check_folder_weights(
    own: Model, model: Model, stored: str | None = None, progress: Progress | None = None
) -> list[Row]:
    """Whether a folder's tensors are the model's: what a bake did not change bit by bit, the rest within its rounding.
    `stored`: the dtype that they were written in, None for the model's own.

    Tensors of files that the source has too (hard links) are the same without being read.
    """
    there = {role: tensor.name for role, tensor in own.roles.items()}
    missing = [tensor.name for role, tensor in model.roles.items() if role not in there and tensor.required]
    if missing:
        return [Row(WEIGHTS, "tensors", "fail", reason=f"missing, and the model has them: {', '.join(missing[:8])}")]
    pairs = [
        Pair(own.checkpoint, name, model.checkpoint, model.roles[role].name)
        for role, name in there.items()
        if role in model.roles
    ]
    for pair in pairs:
        if pair.kind != (right := stored or pair.model.tensors[pair.name].dtype):
            return [Row(WEIGHTS, "types", "fail", reason=f"{pair.own} is {pair.kind}; {right} is needed")]
    added = [name for role, name in there.items() if role not in model.roles]
    return _rows(pairs, progress, added, exactly=True)[0]


def _rows(pairs: list[Pair], progress: Progress | None, added: list[str], *, exactly: bool) -> tuple[list[Row], bool]:
    """A row for each type: its worst tensor, or the first that is too far off. `exactly`: see `Distance.reason`."""
    worst: dict[str, Distance] = {}
    failed: dict[str, str] = {}
    equal = True
    steps = Steps("weights", progress, "tensors")
    for pair in pairs:
        steps.expect(pair.values)
    for pair in pairs:
        steps.start(pair.own, pair.values)
        distance, kind = pair.distance(rounded=exactly), pair.kind
        equal = equal and distance.whole == 0.0
        if kind not in worst or distance.whole > worst[kind].whole:
            worst[kind] = distance
        if (reason := distance.reason(pair, exactly=exactly)) is not None:
            failed.setdefault(kind, reason)
    steps.finish()
    rows = []
    for kind, distance in sorted(worst.items()):
        case = f"{kind}, error up to {distance.whole:.1e}"
        reason = failed.get(kind, "")
        rows.append(Row(WEIGHTS, case, "fail" if reason else "pass", reason=reason))
    if added:
        listed = ", ".join(added[:8]) + (f" and {len(added) - 8} more" if len(added) > 8 else "")
        rows.append(Row(WEIGHTS, "tensors", "fail", reason=f"tensors that the model does not have: {listed}"))
    return rows, equal


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
