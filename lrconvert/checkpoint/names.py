# SPDX-License-Identifier: Apache-2.0
"""Tensor names as trainers leave them, under the names that the family has: wrappers' prefixes, a backbone saved alone,
the head of a tied model in the embedding's place, and extras that nobody reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from lrconvert.checkpoint.base import Checkpoint, CheckpointView, Encoded, TensorInfo
from lrconvert.checkpoint.blocks import Block
from lrconvert.errors import InputError
from lrconvert.families.base import EMBEDDING, LM_HEAD, Family, ModelShape

# What wrappers put into names: torch.compile anywhere, data parallelism and value-head models in front.
WRAPPED = "_orig_mod."
IN_FRONT = ("module.", "pretrained_model.")
BACKBONE = "model."
# Extras of trainers that no decoder reads: value heads, and state of fp8 kernels.
EXTRAS = ("v_head.*", "value_head.*", "*._extra_state")


class RenamedCheckpoint(CheckpointView):
    """A checkpoint under other tensor names. `names`: ours to the base's, for those that are ours; the rest is left
    out. Files that hold a renamed tensor are written again."""

    def __init__(self, base: Checkpoint, names: Mapping[str, str]) -> None:
        super().__init__(base, [ours for ours, theirs in names.items() if ours != theirs])
        self._names = names
        self.tensors: Mapping[str, TensorInfo] = {
            ours: replace(base.tensors[theirs], name=ours) for ours, theirs in names.items()
        }

    def blocks(self, name: str) -> Iterator[Block]:
        return self.base.blocks(self._names[name])

    def encoded(self, name: str) -> Encoded | None:
        return self.base.encoded(self._names[name])


def under_family_names(
    checkpoint: Checkpoint, family: Family, shape: ModelShape, expected: Collection[str]
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with the names that the family `expected`, where that is all that keeps them from it, and notes.

    Raises `InputError` for two tensors that would get one name.
    """
    stored = list(checkpoint.tensors)
    extras = {name for name in stored if is_extra(name)}
    extras |= _tables(family, shape, stored)
    names = {_plain(name): name for name in stored if name not in extras}
    if len(names) + len(extras) < len(stored):
        twice = Counter(_plain(name) for name in stored if name not in extras)
        same = next(name for name, count in twice.items() if count > 1)
        both = " and ".join(name for name in stored if _plain(name) == same)
        raise InputError(f"{checkpoint.path}: {both} are the same tensor of {family.name}")
    bare = {BACKBONE + name: theirs for name, theirs in names.items() if BACKBONE + name in expected}
    if bare and EMBEDDING.hf not in names:
        names = {**{name: theirs for name, theirs in names.items() if BACKBONE + name not in expected}, **bare}
    if shape.tied and EMBEDDING.hf not in names and LM_HEAD.hf in names:
        names[EMBEDDING.hf] = names.pop(LM_HEAD.hf)
    moved = [(ours, theirs) for ours, theirs in names.items() if ours != theirs]
    notes = [f"not part of {family.name}, never read: {_listed(sorted(extras))}"] if extras else []
    if not moved:
        return checkpoint, notes
    notes.append(f"{len(moved)} tensors are read under other names, such as {moved[0][1]} as {moved[0][0]}")
    return RenamedCheckpoint(checkpoint, names), notes


def is_extra(name: str) -> bool:
    """Whether a tensor is something that a trainer stored beside the model."""
    return any(fnmatchcase(_plain(name), pattern) for pattern in EXTRAS)


def _plain(name: str) -> str:
    """A name without what wrappers put into it."""
    name = name.replace(WRAPPED, "")
    while front := next((front for front in IN_FRONT if name.startswith(front)), None):
        name = name.removeprefix(front)
    return name


def _tables(family: Family, shape: ModelShape, stored: Collection[str]) -> set[str]:
    """Rotary tables that are stored with the weights; the config says all that they hold."""
    known = {pattern.replace("{layer}", str(layer)) for pattern in family.ignored for layer in range(shape.layers)}
    return {name for name in stored if _plain(name) in known}


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def head_of_its_own(checkpoint: Checkpoint) -> bool:
    """Whether the file holds a head that is another tensor than the embedding. Reads both until they differ."""
    head, embedding = (checkpoint.tensors.get(row.hf) for row in (LM_HEAD, EMBEDDING))
    if head is None or embedding is None or head.shape != embedding.shape:
        return False  # another shape is reported where all shapes are
    if head.dtype != embedding.dtype:
        return True
    pairs = zip(checkpoint.blocks(LM_HEAD.hf), checkpoint.blocks(EMBEDDING.hf), strict=True)
    return any(ours.read().tobytes() != theirs.read().tobytes() for ours, theirs in pairs)
