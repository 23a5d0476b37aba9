# SPDX-License-Identifier: Apache-2.0
"""A GGUF file, or the parts of a split one, as a checkpoint: Hugging Face names, shapes and row order.

Tensors are read from the file by rows, not mapped: the pages of a mapping count as our memory, and a file
that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lrconvert.checkpoint.base import FLOAT_DTYPES, Checkpoint, Encoded, TensorInfo, numpy_dtype
from lrconvert.checkpoint.blocks import Array, Block, row_blocks
from lrconvert.checkpoint.gguf_config import ROPE_TENSORS, build_config
from lrconvert.checkpoint.gguf_header import GgufHeader, GgufTensor, read_header
from lrconvert.checkpoint.gguf_tokenizer import side_files
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import Family, TensorRow, family_names, get_family
from lrconvert.families.base import EXPERT, GGUF_INTERLEAVED, GGUF_SLIDING, GGUF_STEP35, LAYER, is_norm
from lrconvert.families.reading import MAX_EXPERTS

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,4})\.")
PERMUTED = {"q": "heads", "q_bias": "heads", "k": "kv", "k_bias": "kv"}  # rows by role, where interleaved


class GgufCheckpoint(Checkpoint):
    """A GGUF checkpoint. Opening it reads headers and rope factors, no weights.

    A file whose rope metadata are incomplete or contradictory is refused, since every runtime would compute
    something else than its maker meant. `tolerant` opens it as an unscaled model and keeps the `rope_problems`,
    for who explains or replaces them.
    """

    format = "gguf"
    dequantises = True

    def __init__(self, path: Path, *, tolerant: bool = False) -> None:
        self.path = path
        self.headers = _read_parts(path)
        self.gguf = self.headers[0]
        self.metadata = self.headers[0].metadata
        self.stored = _all_tensors(path, self.headers)  # under the file's own names, rope factors too
        self.architecture = _architecture(self.headers[0])
        slides = bool(self.metadata.get(f"{self.architecture}.attention.sliding_window"))
        self.family, self.families = _families(path, self.architecture, self.stored, slides=slides)
        self.interleaved = self.architecture in GGUF_INTERLEAVED
        self.takes_shift = self.architecture != GGUF_STEP35  # its layers have two widths, and llama.cpp shifts by one
        self.config, rope_problems = build_config(self.headers[0], self.architecture, self.family, self.stored, _whole)
        if rope_problems and not tolerant:
            raise InputError.collect(path, rope_problems)
        self.rope_problems = tuple(rope_problems)
        self._sources = dict(_translate(self.family, self._used().values()))
        self.tensors = {
            name: TensorInfo(name, tensor.type.name, tensor.shape, tensor.file, tensor.nbytes)
            for name, (tensor, _) in self._sources.items()
        }
        _check_types(path, self.stored.values())

    def _used(self) -> dict[str, GgufTensor]:
        """The tensors of the model: without the empty layer that a step35 ends with."""
        if self.architecture != GGUF_STEP35:
            return self.stored
        empty = f"blk.{self.config['num_hidden_layers']}."
        return {name: tensor for name, tensor in self.stored.items() if not name.startswith(empty)}

    def blocks(self, name: str) -> Iterator[Block]:
        tensor, heads = self._sources[name][0], self._interleaved_heads(name)
        order = None if heads is None else _file_rows(tensor, heads)
        ranges = row_blocks(tensor.shape)
        row, offset = self._sources[name][1], self.family.norm_offset
        if offset and row is not None and is_norm(row.role):  # the file has norms' whole weights
            return (Block(*ends, partial(_less, partial(_rows, tensor, *ends, order), offset)) for ends in ranges)
        return (Block(start, stop, partial(_rows, tensor, start, stop, order)) for start, stop in ranges)

    def encoded(self, name: str) -> Encoded:
        tensor = self._sources[name][0]
        interleaved = self._interleaved_heads(name) is not None
        return Encoded(tensor.type.name, interleaved, partial(_read_rows, tensor))

    def factors(self, name: str) -> Array | None:
        """A set of rope factors, under the file's own name; None where there is none."""
        tensor = self.stored.get(name)
        return None if tensor is None else _whole(tensor)

    def _interleaved_heads(self, name: str) -> int | None:
        """How many heads' rows are interleaved in the tensor of this Hugging Face name; None where none are."""
        row = self._sources[name][1]
        if not self.interleaved or row is None or row.role not in PERMUTED:
            return None
        return self.config["num_attention_heads" if PERMUTED[row.role] == "heads" else "num_key_value_heads"]

    @property
    def computing(self) -> str:  # type: ignore[override]
        """The coarsest type that counts: "F32", "F16", "BF16", "Q8_0" or "quantised"."""
        kinds = {tensor.type.name for tensor in self.stored.values()}
        known = [kind for kind in ("F32", "F16", "BF16", "Q8_0") if kind in kinds]
        return known[-1] if len(known) == len(kinds) else "quantised"

    def weight_files(self) -> list[Path]:
        return [header.path for header in self.headers]

    def side_files(self) -> dict[str, Path | bytes]:
        return dict(side_files(self.headers[0], self.config))


def _less(read: Callable[[], Array], offset: float) -> Array:
    return (read().astype(np.float64) - offset).astype(np.float32)


# --- parts -----------------------------------------------------------------------------------------------


def _read_parts(path: Path) -> list[GgufHeader]:
    """The headers of all parts of the file that `path` names; of the file alone where it isn't split."""
    first = read_header(path)
    count = first.metadata.get("split.count", 1)
    match = _PART.fullmatch(path.name)
    if not isinstance(count, int) or count <= 1:
        return [first]
    if not match or int(match["count"]) != count:
        raise InputError(
            f"{path}: one of {count} parts (split.count), but its name does not end in -NNNNN-of-{count:05}.gguf",
            remedy="Restore the names that llama.cpp's gguf-split gave the parts",
        )
    parts = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        shown = missing[:8] + ([f"and {len(missing) - 8} more"] if len(missing) > 8 else [])
        raise InputError(f"{path}: missing parts: {', '.join(shown)}")
    headers = [first if part == path else read_header(part) for part in parts]
    problems = []
    for number, header in enumerate(headers):
        stated = [header.metadata.get(key) for key in ("split.no", "split.count")]
        if stated != [number, count]:
            problems.append(
                f"{header.path.name} says split.no {stated[0]!r:.20} and split.count {stated[1]!r:.20}; "
                f"{number} and {count} are needed"
            )
    total = sum(len(header.tensors) for header in headers)
    promised = headers[0].metadata.get("split.tensors.count", total)
    if promised != total:
        problems.append(f"the parts hold {total} tensors, split.tensors.count is {promised!r:.20}")
    if problems:
        raise InputError.collect(path, problems)
    return headers


def _all_tensors(path: Path, headers: list[GgufHeader]) -> dict[str, GgufTensor]:
    stored: dict[str, GgufTensor] = {}
    problems = []
    for header in headers:
        problems += [f"{name} is in two parts" for name in header.tensors if name in stored]
        stored.update(header.tensors)
    if not stored:
        problems.append("holds no tensors (vocabulary only?)")
    if problems:
        raise InputError.collect(path, problems)
    return stored


# --- names -----------------------------------------------------------------------------------------------


def _architecture(header: GgufHeader) -> str:
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{header.path}: general.type is {kind!r:.60}; a whole model is needed")
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(f"{header.path}: missing metadata: general.architecture")
    return architecture


def _families(
    path: Path, architecture: str, stored: dict[str, GgufTensor], *, slides: bool
) -> tuple[Family, tuple[str, ...]]:
    """The family of the file's architecture that has just these tensors, and the names of all that do.

    Several families may share one: files of Mistral say `llama` too, and so do those of Qwen2 whose factors have
    to be honoured. Where several fit, or none, it is the one that is named like the architecture: llama.cpp
    computes the same for all of them (it drops Mistral's sliding window). Where layers that slide are a kind of their
    own, the file's window tells them apart.
    """
    families = [get_family(name) for name in family_names()]
    candidates = [
        family
        for family in families
        if architecture in (family.gguf_architecture, family.gguf_longrope, family.gguf_other)
    ]
    if architecture in GGUF_SLIDING and len(candidates) > 1:
        candidates = [family for family in candidates if (family.sliding is not None) == slides]
    if not candidates:
        known = ", ".join(sorted({family.gguf_architecture for family in families}))
        raise UnsupportedError(
            f"{path}: general.architecture is {architecture!r:.60}, which lrconvert doesn't read",
            remedy=f"Architectures: {known}",
        )
    candidates.sort(key=lambda family: family.name != architecture)
    fitting = [family for family in candidates if _fits(family, stored)]
    return (fitting or candidates)[0], tuple(family.name for family in fitting)


def _fits(family: Family, stored: dict[str, GgufTensor]) -> bool:
    """Whether the first layer holds the family's tensors and no others; switches of the config (biases) are on
    where any tensor of theirs is there."""
    there = {name for name in stored if name.startswith("blk.0.")}
    rows = [(row.gguf.replace(LAYER, "0"), row) for row in family.rows if LAYER in row.gguf]
    switched = {row.when for name, row in rows if row.when and name in there}
    return there == {name for name, row in rows if row.when is None or row.when in switched}


def _translate(family: Family, stored: Any) -> Iterator[tuple[str, tuple[GgufTensor, TensorRow | None]]]:
    """Hugging Face name, tensor and row. What no row names keeps its own name: `build_model` lists it."""
    rows = {row.gguf: row for row in family.rows}
    for tensor in stored:
        if tensor.name in ROPE_TENSORS:
            continue  # part of the config
        match = _LAYER.match(tensor.name)
        layer = match[1] if match else ""
        row = rows.get(tensor.name if not match else "blk.{layer}." + tensor.name[match.end() :])
        if row is not None and EXPERT in row.hf:
            for expert, part in enumerate(_experts(tensor)):
                yield row.hf.replace(LAYER, layer).replace(EXPERT, str(expert)), (part, row)
        elif row is not None:
            if len(tensor.shape) == 1 and len(row.shape) == 2:
                tensor = replace(
                    tensor, shape=(1, *tensor.shape)
                )  # a matrix of one row, which others write as a vector
            yield row.hf.replace(LAYER, layer), (tensor, row)
        else:
            yield f"{tensor.name} (in GGUF)", (tensor, None)


def _experts(tensor: GgufTensor) -> Iterator[GgufTensor]:
    """Every expert's part of a layer's tensor; the tensor itself where it has no dimension for them."""
    if len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS:
        yield tensor
        return
    each = tensor.nbytes // tensor.shape[0]
    for expert in range(tensor.shape[0]):
        yield replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * each, nbytes=each)


# --- values ----------------------------------------------------------------------------------------------


def _check_types(path: Path, stored: Any) -> None:
    """Refuse types that can't be dequantised before anything is written, by trying one block of each."""
    refused: dict[str, str] = {}
    for tensor in stored:
        if tensor.type.name in FLOAT_DTYPES or tensor.type.name in refused:
            continue
        try:
            _dequantise_rows(np.zeros((1, GGML_QUANT_SIZES[tensor.type][1]), np.uint8), tensor.type)
        except NotImplementedError:
            refused[tensor.type.name] = tensor.name
    if refused:
        listed = ", ".join(f"{kind} (as in {name})" for kind, name in refused.items())
        raise UnsupportedError(f"{path}: quantisations that gguf-py can't dequantise: {listed}")


def _read_rows(tensor: GgufTensor, start: int, stop: int) -> Array:
    """Rows along the last dimension as the bytes that stand in the file, [rows, bytes of a row]."""
    width = tensor.nbytes // int(np.prod(tensor.shape[:-1], dtype=np.int64))
    count = (stop - start) * width
    try:
        data = np.fromfile(tensor.file, np.uint8, count, offset=tensor.offset + start * width)
    except OSError as error:
        raise InputError(f"{tensor.file}: can't be read ({error.strerror or error})") from error
    if data.size != count:
        raise InputError(f"{tensor.file}: shrank while {tensor.name} was read")
    return data.reshape(-1, width)


def _rows(tensor: GgufTensor, start: int, stop: int, order: Array | None) -> Array:
    """Rows along the first dimension, decoded; `order`: the file's row for each of the tensor's."""
    inner = tensor.shape[1:]
    if not inner:  # a vector is read whole: a quantised type has blocks of its values
        values = _decoded(tensor, _read_rows(tensor, 0, 1))[0]
        return values if order is None else values[order]
    each = int(np.prod(inner[:-1], dtype=np.int64))
    if order is None:
        rows = _read_rows(tensor, start * each, stop * each)
    else:
        wanted = order[start:stop]
        first, last = int(wanted.min()), int(wanted.max()) + 1
        rows = _read_rows(tensor, first * each, last * each).reshape(last - first, -1)[wanted - first]
    return _decoded(tensor, rows.reshape((stop - start) * each, -1)).reshape(-1, *inner)


def _whole(tensor: GgufTensor) -> Array:
    """A small tensor in the file's own order."""
    return np.concatenate([_rows(tensor, start, stop, None) for start, stop in row_blocks(tensor.shape)])


def _decoded(tensor: GgufTensor, rows: Array) -> Array:
    """The values of rows of bytes: float32 where the type is quantised, else as they are stored."""
    if tensor.type.name in FLOAT_DTYPES:
        return rows.view(numpy_dtype(tensor.type.name))
    return _dequantise_rows(rows, tensor.type)


def _dequantise_rows(rows: Array, kind: GGMLQuantizationType) -> Array:
    with np.errstate(all="ignore"):  # damaged scales make infinities; no reason for a warning here
        return dequantize(rows, kind)


def _file_rows(tensor: GgufTensor, heads: int) -> Array:
    """Where llama.cpp's interleaving put each row of a head: row i of a half at 2i, of the other at 2i + 1."""
    rows = tensor.shape[0]
    if rows % (2 * heads):
        raise InputError(f"{tensor.file}: {tensor.name} has {rows} rows; a multiple of 2 x {heads} heads is needed")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
