# SPDX-License-Identifier: Apache-2.0
"""A checkpoint matched with its family: every tensor gets its role, or is reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lrconvert.checkpoint.base import FLOAT_DTYPES, Checkpoint, Model
from lrconvert.checkpoint.names import RenamedCheckpoint, head_of_its_own, is_extra, under_family_names
from lrconvert.checkpoint.quantised import readable, zero_biases
from lrconvert.errors import InputError
from lrconvert.families import ExpectedTensor, Family, expected_tensors, get_family, read_shape

OWN_HEAD = (
    "config.json ties the head to the embedding, but the file holds another lm_head.weight: the file counts, and "
    "artifacts are untied"
)


def build_model(reference: str, checkpoint: Checkpoint, *, tied: bool | None = None) -> Model:
    """The model of a checkpoint: every tensor matched with its family's table.

    What the file holds counts: a head that differs from a tied embedding unties the model. `tied` says it where that
    is known already. Raises `UnsupportedError` for a family that isn't known and `InputError` that lists all tensors
    that are missing, unknown, or of another shape or dtype than the config promises.
    """
    family = get_family(checkpoint.config.get("model_type"))
    shape = read_shape(checkpoint.config, family)
    checkpoint, quantised = readable(checkpoint)
    names = {tensor.name for tensor in expected_tensors(family, shape)}
    checkpoint, notes = under_family_names(checkpoint, family, shape, names)
    notes = [*quantised, *notes, *(text for key, text in family.remarks.items() if checkpoint.config.get(key))]
    if checkpoint.quantised_with and (zero := zero_biases(checkpoint, names)):
        checkpoint = RenamedCheckpoint(checkpoint, {name: name for name in checkpoint.tensors if name not in zero})
        notes.append(f"{len(zero)} biases of quantised modules are zero, and {family.name} has none: never read")
    stored = checkpoint.native or checkpoint.quantised_with is not None
    if shape.tied and tied is None and stored and head_of_its_own(checkpoint):
        tied, notes = False, [*notes, OWN_HEAD]
    shape = shape if tied is None else replace(shape, tied=tied)
    expected = {tensor.name: tensor for tensor in expected_tensors(family, shape)}
    if problems := list(_problems(checkpoint, family, expected, shape.layers)):
        raise InputError.collect(checkpoint.path, problems)
    roles = {t.key: t for t in expected.values() if t.name in checkpoint.tensors}
    return Model(reference, checkpoint, family, shape, notes=tuple(notes), roles=roles)


def _problems(
    checkpoint: Checkpoint, family: Family, expected: Mapping[str, ExpectedTensor], layers: int
) -> Iterator[str]:
    """What keeps the tensors from being those of the family, in words."""
    found = checkpoint.tensors
    ignored = {pattern.replace("{layer}", str(layer)) for pattern in family.ignored for layer in range(layers)}
    if missing := [t.name for t in expected.values() if t.required and t.name not in found]:
        yield f"missing tensors: {', '.join(missing)}"
    if unknown := [name for name in found if name not in expected and name not in ignored and not is_extra(name)]:
        yield f"tensors that {family.name} does not have: {', '.join(unknown)}"
    for name, tensor in expected.items():
        if name in found and found[name].shape != tensor.shape:
            yield f"{name} has shape {list(found[name].shape)}; the config needs {list(tensor.shape)}"
        elif name in found and not checkpoint.dequantises and found[name].dtype not in FLOAT_DTYPES:
            yield f"{name} is {found[name].dtype}; one of {', '.join(FLOAT_DTYPES)} is needed"
