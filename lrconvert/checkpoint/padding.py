# SPDX-License-Identifier: Apache-2.0
"""An embedding with fewer rows than the tokenizer has tokens: a view that appends the rows that are missing.

    model = padded(open_model("base"), 11)

Every new row, of the embedding and of a head of its own, is the mean of the others. So the logit of a new token is the
mean of all logits: it is never the largest, and n new tokens beside V others get at most n / (V + n) of the probability
(the exponential of a mean is at most the mean of the exponentials). A row of zeros has the logit 0, which wins where
all others are negative.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from lrconvert.checkpoint.base import MAX_TOKENIZER_BYTES, Checkpoint, CheckpointView, Model, TensorInfo, read_json
from lrconvert.checkpoint.blocks import Array, Block
from lrconvert.checkpoint.protobuf import fields
from lrconvert.errors import InputError, UnsupportedError

FLAG = "--pad-embedding"
MAX_ADDED = 2**16  # rows; an id far beyond the embedding is damage
ENDS = ("embedding", "lm_head", "lm_head_bias")  # roles that have a row for every token


class PaddedCheckpoint(CheckpointView):
    """A checkpoint whose tensors `names` have more rows than its files hold."""

    def __init__(self, base: Checkpoint, names: tuple[str, ...], added: int) -> None:
        super().__init__(base, names)
        self._names, self._added = frozenset(names), added
        self._means, self._lock = dict[str, Array](), Lock()
        rows = base.tensors[names[0]].shape[0] + added
        grown = {name: _taller(base.tensors[name], rows) for name in names}
        self.tensors = {**base.tensors, **grown}
        self.config = {**base.config, "vocab_size": rows}

    def blocks(self, name: str) -> Iterator[Block]:
        yield from self.base.blocks(name)
        if name in self._names:
            stop = self.tensors[name].shape[0]
            yield Block(stop - self._added, stop, partial(self._rows, name))

    def _rows(self, name: str) -> Array:
        """The new rows, in the dtype of the others. They are read again for it, block by block, once."""
        with self._lock:
            if name not in self._means:
                total, dtype = np.zeros(self.tensors[name].shape[1:]), np.dtype(np.float32)
                for block in self.base.blocks(name):
                    values = block.read()
                    total, dtype = total + values.sum(axis=0, dtype=np.float64), values.dtype
                mean = total / self.base.tensors[name].shape[0]
                self._means[name] = np.broadcast_to(mean.astype(dtype), (self._added, *mean.shape))
            return self._means[name].copy()


def _taller(info: TensorInfo, rows: int) -> TensorInfo:
    nbytes = info.nbytes // max(1, info.shape[0]) * rows
    return replace(info, shape=(rows, *info.shape[1:]), nbytes=nbytes)


def padded(model: Model, added: int) -> Model:
    """The model with `added` more tokens, which nothing was trained on. `UnsupportedError` for a GGUF, whose
    vocabulary has as many tokens as its embedding."""
    if model.checkpoint.gguf is not None:
        raise UnsupportedError(f"{model.reference}: a GGUF has a row for every token of its own; {FLAG} adds none")
    ends = {key: tensor for key, tensor in model.roles.items() if tensor.role in ENDS}
    checkpoint = PaddedCheckpoint(model.checkpoint, tuple(tensor.name for tensor in ends.values()), added)
    rows = model.shape.vocab + added
    grown = {key: replace(tensor, shape=(rows, *tensor.shape[1:])) for key, tensor in ends.items()}
    shape = replace(model.shape, vocab=rows)
    return replace(model, checkpoint=checkpoint, shape=shape, roles={**model.roles, **grown})


def settle_vocabulary(model: Model, *, pad: bool) -> tuple[Model, int]:
    """The model with a row for every token of its tokenizer, if that is asked for, and how many rows were added. Its
    notes say what was done, or what is missing.

    Raises what `padded` and, if it is asked for, `tokens_of` raise.
    """
    rows = model.shape.vocab
    try:
        missing = max(0, tokens_of(model.checkpoint.side_files()) - rows)
    except InputError:  # a damaged tokenizer is a matter of whoever has to read it
        if pad:
            raise
        return model, 0
    if not missing:
        note = ["every token of the tokenizer has a row in the embedding: nothing was padded"] if pad else []
        return replace(model, notes=(*model.notes, *note)), 0
    found = f"the tokenizer has ids up to {rows + missing - 1}, the embedding {rows} rows"
    if not pad:
        return replace(model, notes=(*model.notes, f"{found}; {FLAG} adds what is missing")), 0
    if missing > MAX_ADDED:
        raise InputError(f"{found}; at most {MAX_ADDED} are added")
    note = f"{found}: {missing} were added, each the mean of the others, and nothing was trained on them"
    return replace(padded(model, missing), notes=(*model.notes, note)), missing


def tokens_of(side_files: Mapping[str, Path | bytes]) -> int:
    """One more than the largest id of a tokenizer's files, 0 where there are none. `InputError` for damaged ones."""
    found: list[Any] = [-1]
    if tokenizer := _json(side_files, "tokenizer.json"):
        model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, list):  # a unigram model's pieces, by their place
            found.append(len(vocabulary) - 1)
        found += vocabulary.values() if isinstance(vocabulary, dict) else ()
        found += [entry.get("id") for entry in added if isinstance(entry, dict)] if isinstance(added, list) else ()
    elif source := side_files.get("tokenizer.model"):
        found.append(_pieces(source) - 1)
    found += (_json(side_files, "added_tokens.json") or {}).values()
    decoder = (_json(side_files, "tokenizer_config.json") or {}).get("added_tokens_decoder")
    found += [int(key) for key in decoder if key.isdecimal() and len(key) < 10] if isinstance(decoder, dict) else ()
    return 1 + max(index for index in found if isinstance(index, int))


def _json(side_files: Mapping[str, Path | bytes], name: str) -> dict[str, Any] | None:
    source = side_files.get(name)
    if source is None:
        return None
    if isinstance(source, Path):
        return read_json(source, MAX_TOKENIZER_BYTES)
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error})") from error
    return value if isinstance(value, dict) else None


def _pieces(source: Path | bytes) -> int:
    try:
        if isinstance(source, Path) and not source.is_file():  # a pipe has no end
            raise ValueError("not a file")
        data = source.read_bytes() if isinstance(source, Path) else source
        return sum(field == 1 for field, _ in fields(data))
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer.model: can't be read ({error})") from error
