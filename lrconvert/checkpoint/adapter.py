# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in PEFT layout: a model with one merged is a view that merges what is read of it.

    model = merged(open_model("base"), open_adapter("adapter"))

Shapes, for a module with weight W [out, in] and rank r: lora_A [r, in], lora_B [out, r], and for an embedding
[words, hidden] lora_embedding_A [r, words], lora_embedding_B [hidden, r]. With s = α/r, or α/√r with
use_rslora (`AdapterConfig.scale_of`):

    LoRA   W' = W + s·(B·A)            DoRA   W'' = W' · m / ‖row of W'‖, m = lora_magnitude_vector [out]

in float32, rows in blocks, with one rounding at the end. modules_to_save replace a tensor.

What an adapter does is what peft computes *before* it merges. The two differ where input and output
embeddings are tied and only one of them is adapted: peft's forward pass adapts one, `merge_and_unload`
changes the shared tensor. Here the tie is broken: lm_head.weight becomes a tensor of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.checkpoint import locate
from lrconvert.checkpoint.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from lrconvert.checkpoint.base import (
    FLOAT_DTYPES,
    Checkpoint,
    CheckpointView,
    Model,
    TensorInfo,
    numpy_dtype,
)
from lrconvert.checkpoint.blocks import Array, Block
from lrconvert.checkpoint.matching import build_model
from lrconvert.checkpoint.padding import PaddedCheckpoint
from lrconvert.checkpoint.source import describe_source, sha256_of
from lrconvert.checkpoint.tensor_file import TensorFile, other_dtypes
from lrconvert.errors import InputError, UnsupportedError, UsageError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
ENDS = (EMBEDDING, LM_HEAD)  # what has a row for every token
_PART_OF = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<pair>[AB])\.weight|lora_embedding_(?P<embedding>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|base_layer\.(?P<base>weight|bias)"
    r"|token_adapter\.(?P<tokens>trainable_tokens_delta)|(?P<wrapped>original_module|modules_to_save)\.weight)"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, opened and checked as far as possible without its base model."""

    reference: str  # as the user named it
    path: Path
    config: AdapterConfig
    file: TensorFile

    @cached_property
    def description(self) -> dict[str, str]:
        """What a manifest says of it: its name, and digests of both files."""
        return {
            "reference": self.reference,
            "config_sha256": sha256_of(self.path / CONFIG),
            "weights_sha256": sha256_of(self.file.path),
        }


def open_adapter(reference: str | Path, revision: str | None = None) -> Adapter:
    """Open the adapter that a folder or Hub id names.

    Raises `InputError` for files that aren't whole, `UnsupportedError` for features that aren't merged.
    """
    path = locate(reference, revision=revision)
    if not (path / CONFIG).is_file():
        raise InputError(f"{path}: no {CONFIG}, so not an adapter in PEFT layout")
    config = read_adapter_config(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        raise InputError(
            f"{path}: no {WEIGHTS}; an adapter_model.bin is a pickle, which can run code when loaded and is never "
            "opened",
            remedy="Save the adapter as safetensors first",
        )
    file = TensorFile(path / WEIGHTS)
    problems = other_dtypes(file.tensors) if file.tensors else ["holds no tensors"]
    if problems:
        raise InputError.collect(file.path, problems)
    return Adapter(str(reference), path, config, file)


def choose_adapter(given: str | None, carried: str | None, folder: Path) -> str | None:
    """The adapter to merge: the one given, else the one that a recipe in `folder` carries (a path relative to
    that folder, or a Hub id). Raises `UsageError` when there are two and they differ."""
    if carried is None:
        return given
    beside = folder / carried
    own = str(beside) if beside.exists() else carried
    if given is None:
        return own
    if given == own or (beside.exists() and Path(given).exists() and beside.samefile(given)):
        return given
    raise UsageError(
        f"adapter and recipe disagree: --adapter is {given}, the recipe was made for {own}",
        remedy="Omit --adapter, or use a recipe without an adapter",
    )


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor. `start` names the base tensor it starts from; in `saved`, the adapter's key for what
    replaces that, perhaps with more rows; `left`, `right` (keys of B and A) and `scale` the product to add."""

    start: str
    saved: str | None = None
    left: str | None = None
    right: str | None = None
    scale: float = 0.0
    embedding: bool = False  # the factors are stored transposed
    magnitude: str | None = None
    tokens: str | None = None  # key of the rows that replace `rows`
    rows: tuple[int, ...] = ()


class MergedCheckpoint(CheckpointView):
    """A checkpoint in which an adapter's changes are made when a tensor is read."""

    adapter: Adapter

    def __init__(
        self, base: Checkpoint, adapter: Adapter, changes: Mapping[str, Change], *, untied: bool, rounded: bool
    ) -> None:
        """`rounded`: a changed tensor has its base's dtype; else it stays in float32 for the reader to round."""
        super().__init__(base, changes)
        self.adapter, self._changes, self._rounded = adapter, changes, rounded
        if untied:  # the last file is the one to grow
            like, last = base.tensors[EMBEDDING], list(base.tensors.values())[-1]
            added = replace(like, name=LM_HEAD, file=last.file)
            self.tensors = base.tensors if LM_HEAD in base.tensors else {**base.tensors, LM_HEAD: added}
            self.config = {**base.config, "tie_word_embeddings": False}
        grown = {name: self._grown(name, change) for name, change in changes.items() if name in ENDS}
        if vocab := [info.shape[0] for name, info in grown.items() if info.shape != self.tensors[name].shape]:
            self.tensors = {**self.tensors, **grown}
            self.config = {**self.config, "vocab_size": vocab[0]}

    def _grown(self, name: str, change: Change) -> TensorInfo:
        """An end of the model with as many rows as the adapter has for it."""
        info = self.tensors[name]
        shape = info.shape if change.saved is None else self.adapter.file.tensors[change.saved].shape
        each = info.nbytes // max(1, info.shape[0])
        return replace(info, shape=shape, nbytes=each * shape[0])

    def blocks(self, name: str) -> Iterator[Block]:
        if (change := self._changes.get(name)) is None:
            return self.base.blocks(name)
        work = self._work(name, change)
        start = self.base.blocks(change.start) if change.saved is None else self.adapter.file.blocks(change.saved)
        return (replace(block, read=partial(work.block, block)) for block in start)

    def _work(self, name: str, change: Change) -> _Work:
        file = self.adapter.file
        stored = self.base.tensors[change.start].dtype
        own = numpy_dtype(stored if stored in FLOAT_DTYPES else "F32")  # what the base gives
        wide = np.float64 if stored == "F64" else np.float32
        work = _Work(name, wide, own if self._rounded else np.dtype(wide))
        if change.left is not None and change.right is not None:
            left, right = (file.read(key).astype(wide) for key in (change.left, change.right))
            if change.embedding:
                left, right = right.T, left.T
            work = replace(work, left=left, right=right, scale=change.scale)
        if change.magnitude is not None:
            work = replace(work, magnitude=file.read(change.magnitude).astype(wide))
        if change.tokens is not None:
            work = replace(work, rows=change.rows, fresh=file.read(change.tokens).astype(wide))
        return work


@dataclass(frozen=True)
class _Work:
    """A tensor being merged: left [rows, r] · right [r, columns] · scale is added to the rows read."""

    name: str
    wide: type[np.floating[Any]]
    dtype: np.dtype[Any]
    left: Array | None = None
    right: Array | None = None
    scale: float = 0.0
    magnitude: Array | None = None
    rows: tuple[int, ...] = ()
    fresh: Array | None = None  # what replaces these rows

    def block(self, block: Block) -> Array:
        weight, start, stop = block.read(), block.start, block.stop
        if self.fresh is not None:
            weight = weight.astype(self.wide)
            for row, values in zip(self.rows, self.fresh, strict=True):
                if start <= row < stop:
                    weight[row - start] = values
        if self.left is None and weight.dtype == self.dtype:
            return weight
        weight = weight.astype(self.wide)
        with np.errstate(all="ignore"):  # infinities are looked for below
            if self.left is not None and self.right is not None:
                delta = _product(self.left[start:stop], self.right)
                delta *= self.wide(self.scale)
                weight += delta
            if self.magnitude is not None:
                weight *= (self.magnitude[start:stop] / np.linalg.norm(weight, axis=1))[:, None]
            cast = weight.astype(self.dtype)
            total = weight.sum()  # finite only if all are; its own overflow is cleared up by the slow look
        if not np.isfinite(total) and not np.isfinite(weight).all():
            raise InputError(f"merged {self.name}: holds values that are not finite, from the adapter or its base")
        if self.dtype == np.float16 and not np.isfinite(cast).all():
            raise UnsupportedError(f"merged {self.name}: beyond float16's range", remedy="Use --dtype bf16")
        return cast


def _product(left: Array, right: Array) -> Array:
    """left [n, r] · right [r, c], in products so small that OpenBLAS makes each on the calling thread: for
    larger ones it wakes threads of its own, whose waiting costs more time here than all the rest."""
    (count, rank), columns = left.shape, right.shape[1]
    rows, values = 16, 2**18  # of one product: rows · columns · rank, OpenBLAS's own threshold
    left = np.concatenate([left, np.zeros((-count % rows, rank), left.dtype)])
    product = np.empty((len(left), columns), left.dtype)
    step = max(1, values // (rows * rank))
    for first in range(0, columns, step):
        part = product.reshape(-1, rows, columns)[:, :, first : first + step]
        np.matmul(left.reshape(-1, rows, rank), right[:, first : first + step], out=part)
    return product[:count]


def merged(model: Model, adapter: Adapter, *, rounded: bool = True) -> Model:
    """The model with the adapter merged, tensor by tensor when they are read.

    `rounded`: see `MergedCheckpoint`. Raises `InputError` that lists, with shapes, every tensor of the adapter
    that doesn't fit the model.
    """
    plan = _Matching(model, adapter)
    changes, untied, tie_note = plan.changes()
    checkpoint = MergedCheckpoint(model.checkpoint, adapter, changes, untied=untied, rounded=rounded)
    result = build_model(model.reference, checkpoint, tied=model.shape.tied and not untied)
    notes = [*model.notes, *tie_note]
    named = adapter.config.base
    if named and _last_part(named) != _last_part(model.reference):
        notes.append(f"adapter {adapter.reference} was trained on {named}; it is merged into {model.reference}")
    return replace(result, notes=tuple(notes))


def _last_part(reference: str) -> str:
    """What two references to one model have in common: a folder, a Hub id, a GGUF file with or without its ending."""
    return reference.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


class _Matching:
    """Every tensor of an adapter matched with the base tensor that it changes; remembers all problems."""

    def __init__(self, model: Model, adapter: Adapter) -> None:
        self.base, self.adapter, self.config = model.checkpoint.tensors, adapter, adapter.config
        self.tied = model.shape.tied
        self.problems: list[str] = []
        self.keys: dict[str, dict[str, str]] = {}  # base tensor → part (A, B, embedding A, …) → adapter key
        for key in adapter.file.tensors:
            name, part = self._read_key(key)
            if part in self.keys.setdefault(name, {}):
                self.problems.append(f"{key} and {self.keys[name][part]} are the same tensor")
            self.keys[name][part] = key

    def _read_key(self, key: str) -> tuple[str, str]:
        plain = key.removeprefix(PREFIX)
        if (match := _PART_OF.fullmatch(plain)) is None:
            return plain, "saved"
        if match["wrapped"]:  # written along where the vocabulary grew
            return f"{match['module']}.weight", "saved twice" if match["wrapped"] == "modules_to_save" else "original"
        if match["tokens"]:
            return f"{match['module']}.weight", "tokens"
        if match["base"]:  # peft writes the base's own tensor along where embeddings are adapted
            return f"{match['module']}.{match['base']}", "base"
        kind = match["pair"] or (match["embedding"] and f"embedding {match['embedding']}") or "magnitude"
        return f"{match['module']}.weight", kind

    def _shape(self, key: str) -> str:
        return f"{key} {list(self.adapter.file.tensors[key].shape)}"

    def changes(self) -> tuple[dict[str, Change], bool, list[str]]:
        """The change of every tensor that has one; whether the tie is broken, and a note if so."""
        found = {}
        for name, parts in self.keys.items():
            start = EMBEDDING if name == LM_HEAD and self.tied else name
            if start not in self.base:
                self.problems += [f"{self._shape(key)}: the model has no {name}" for key in parts.values()]
            else:
                found[name] = self._change(name, self.base[start], parts)
        if self.problems:
            raise InputError.collect(self.adapter.file.path, self.problems)
        return self._tie(found) if self.tied and {EMBEDDING, LM_HEAD} & set(found) else (found, False, [])

    def _change(self, name: str, base: TensorInfo, parts: dict[str, str]) -> Change:
        module, shape, listed = name.removesuffix(".weight"), base.shape, ", ".join(parts.values())
        rank = self.config.rank_of(module)
        embedding = name == EMBEDDING
        left, right = ("embedding B", "embedding A") if embedding else ("B", "A")
        whole = self._whole(name, shape)
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(("saved", "saved twice", "original", "base"), whole)
        if len(shape) == 2:
            shape, rows = whole, self.config.tokens_of(module)
            wanted["tokens"] = (len(rows), shape[1])
            if max(rows, default=-1) >= shape[0]:
                self.problems.append(f"{listed}: trainable_token_indices has {max(rows)}; {name} has {shape[0]} rows")
            wanted[right] = (rank, shape[0] if embedding else shape[1])
            wanted[left] = (shape[1] if embedding else shape[0], rank)
            wanted["magnitude"] = shape[:1]
        for part, key in parts.items():
            if part not in wanted:
                needed = f"{name} takes lora_embedding_A and _B" if embedding else f"no such part of {name}"
                self.problems.append(f"{self._shape(key)}: {needed} {list(shape)}")
            elif self.adapter.file.tensors[key].shape != wanted[part]:
                self.problems.append(f"{self._shape(key)}: {list(wanted[part])} is needed for {name} {list(shape)}")
        pair = left in parts, right in parts
        if any(pair) and not all(pair):
            self.problems.append(f"{listed}: one of A and B is missing")
        if {"saved", "saved twice"} <= set(parts) and not self._equal(parts["saved"], parts["saved twice"]):
            self.problems.append(f"{listed}: two different replacements")
        if "saved" in parts and (any(pair) or "base" in parts or "tokens" in parts):
            self.problems.append(f"{listed}: both replaced and adapted")
        if ("magnitude" in parts) != (self.config.dora and any(pair)):
            state = "with" if self.config.dora else "without"
            has = "a" if "magnitude" in parts else "no"
            self.problems.append(f"{listed}: {has} lora_magnitude_vector {state} use_dora")
        if embedding and "magnitude" in parts:
            raise UnsupportedError(f"{self.adapter.path}: use_dora on an embedding ({listed}) can't be merged")
        return Change(
            start=base.name,
            saved=next((parts[part] for part in ("saved", "saved twice", "base") if part in parts), None),
            left=parts.get(left),
            right=parts.get(right),
            scale=self.config.scale_of(module),
            embedding=embedding,
            magnitude=parts.get("magnitude"),
            tokens=parts.get("tokens"),
            rows=self.config.tokens_of(module) if "tokens" in parts else (),
        )

    def _whole(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor that replaces another: its own, or that of a vocabulary that has grown. Then the
        adapter has every end of the model with as many rows."""
        if name not in ENDS:
            return shape
        keys = [key for end in ENDS for part, key in self.keys.get(end, {}).items() if part in ("saved", "base")]
        rows = {self.adapter.file.tensors[key].shape[:1] for key in keys}
        here = {end for end in ENDS if {"saved", "base", "original"} & set(self.keys.get(end, {}))}
        every = self.tied or here == set(ENDS)
        return (*min(rows), *shape[1:]) if every and len(rows) == 1 and min(rows) > shape[:1] else shape

    def _tie(self, found: dict[str, Change]) -> tuple[dict[str, Change], bool, list[str]]:
        """What tied embeddings become. The tie stays where both ends are still the same tensor."""
        head, embedding = found.pop(LM_HEAD, Change(EMBEDDING)), found.pop(EMBEDDING, Change(EMBEDDING))
        raw = {name for name, parts in self.keys.items() if "saved" in parts}
        free = {name for name in raw if not self.config.saves(name.removesuffix(".weight"))}
        if free & {LM_HEAD} and EMBEDDING not in raw:
            text = f"{self._shape(self.keys[LM_HEAD]['saved'])}: tied in the model, and not in modules_to_save"
            raise InputError.collect(self.adapter.file.path, [text])
        # A tensor beside modules_to_save, or under a pair, is the one that both ends start from.
        shared = embedding.saved if EMBEDDING in free or "base" in self.keys.get(EMBEDDING, {}) else None
        shared = shared or (head.saved if "base" in self.keys.get(LM_HEAD, {}) else None)
        before = [parts["original"] for parts in map(self.keys.get, ENDS) if parts and "original" in parts]
        untouched = before[0] if before else None  # what both ends were when the vocabulary had grown
        head = replace(head, saved=head.saved or shared or untouched)
        embedding = replace(embedding, saved=embedding.saved or shared or untouched)
        plain = head.left is None and embedding.left is None
        if embedding.tokens is not None and head == Change(EMBEDDING):  # peft trains the rows of both ends as one
            copied = {LM_HEAD: embedding} if LM_HEAD in self.base else {}
            return {**found, EMBEDDING: embedding, **copied}, False, []
        if plain and head.saved and embedding.saved and self._equal(head.saved, embedding.saved):
            copied = {LM_HEAD: embedding} if LM_HEAD in self.base else {}  # a stored copy stays one
            return {**found, EMBEDDING: embedding, **copied}, False, []
        changed = {} if embedding == Change(EMBEDDING) else {EMBEDDING: embedding}
        note = "the adapter changes one of two tied embeddings: lm_head.weight is written, tie_word_embeddings is false"
        return {**found, **changed, LM_HEAD: head}, True, [note]

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors of the adapter, of one shape, hold the same bytes."""
        file = self.adapter.file
        if one == other:
            return True
        pairs = zip(file.blocks(one), file.blocks(other), strict=True)
        return file.tensors[one].dtype == file.tensors[other].dtype and all(
            ours.read().tobytes() == theirs.read().tobytes() for ours, theirs in pairs
        )


def describe(model: Model) -> dict[str, Any]:
    """`describe_source`, with the adapter where one is merged."""
    checkpoint, merged_into = model.checkpoint, model.checkpoint.adapter
    while isinstance(checkpoint, MergedCheckpoint | PaddedCheckpoint):
        checkpoint = checkpoint.base  # its config is not the one with a broken tie or more tokens
    source = describe_source(replace(model, checkpoint=checkpoint))
    return source if merged_into is None else {**source, "adapter": merged_into.description}
