# SPDX-License-Identifier: Apache-2.0
"""A GGUF file, or the parts of a split one, as a checkpoint: Hugging Face names, shapes and row order.

Tensors are read from the file one by one, not mapped: the pages of a mapping count as our memory, and a file
that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lrconvert.checkpoint.base import FLOAT_DTYPES, Checkpoint, TensorInfo, numpy_dtype
from lrconvert.checkpoint.gguf_config import ROPE_TENSORS, build_config
from lrconvert.checkpoint.gguf_header import GgufHeader, GgufTensor, read_header
from lrconvert.checkpoint.gguf_tokenizer import side_files
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import Family, TensorRow, family_names, get_family
from lrconvert.families.base import GGUF_INTERLEAVED, LAYER

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,4})\.")
PERMUTED = {"q": "heads", "q_bias": "heads", "k": "kv", "k_bias": "kv"}  # rows by role, where interleaved
_CHUNK_BYTES = 16 * 2**20  # of dequantised values, beside the tensor itself


class GgufCheckpoint(Checkpoint):
    """A GGUF checkpoint. Opening it reads headers and rope factors; a weight is read by `read`.

    A file whose rope metadata are incomplete or contradictory is refused, since every runtime would compute
    something else than its maker meant. `tolerant` opens it as an unscaled model and keeps the `rope_problems`,
    for who explains or replaces them.
    """

    format = "gguf"

    def __init__(self, path: Path, *, tolerant: bool = False) -> None:
        self.path = path
        self.headers = _read_parts(path)
        self.metadata = self.headers[0].metadata
        self.stored = _all_tensors(path, self.headers)  # under the file's own names, rope factors too
        self.architecture = _architecture(self.headers[0])
        self.family, self.families = _families(path, self.architecture, self.stored)
        self.interleaved = self.architecture in GGUF_INTERLEAVED
        self.config, rope_problems = build_config(
            self.headers[0], self.architecture, self.family, self.stored, _read_plain
        )
        if rope_problems and not tolerant:
            raise InputError.collect(path, rope_problems)
        self.rope_problems = tuple(rope_problems)
        self._sources = dict(_translate(self.family, self.stored.values()))
        self.tensors = {
            name: TensorInfo(name, tensor.type.name, tensor.shape, tensor.file)
            for name, (tensor, _) in self._sources.items()
        }
        _check_types(path, self.stored.values())

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor under its Hugging Face name: float32 where it was quantised, else as it is stored."""
        tensor = self.stored_as(name)
        values = _read_plain(tensor) if tensor.type.name in FLOAT_DTYPES else _dequantise(tensor).reshape(tensor.shape)
        heads = self.permuted_heads(name)
        return values if heads is None else _unpermute(values, heads, tensor)

    def rows(self, tensor: GgufTensor, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows of a stored tensor in the file's own order: float32 where it was quantised, else as it is stored."""
        if tensor.type.name in FLOAT_DTYPES:
            width = tensor.nbytes // _rows_of(tensor)
            dtype = numpy_dtype(tensor.type.name)
            return _read_bytes(tensor, dtype, start * width, (stop - start) * width).reshape(stop - start, -1)
        return _dequantise(tensor, start, stop)

    def stored_as(self, name: str) -> GgufTensor:
        """Where the tensor of this Hugging Face name lies, under its own name and type."""
        return self._sources[name][0]

    def permuted_heads(self, name: str) -> int | None:
        """How many heads' rows are interleaved in the tensor of this name; None where none are."""
        row = self._sources[name][1]
        if not self.interleaved or row is None or row.role not in PERMUTED:
            return None
        return self.config["num_attention_heads" if PERMUTED[row.role] == "heads" else "num_key_value_heads"]

    def weight_files(self) -> list[Path]:
        return [header.path for header in self.headers]

    def side_files(self) -> dict[str, Path | bytes]:
        return dict(side_files(self.headers[0], self.config))


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
            remedy="Give the parts the names that llama.cpp's gguf-split gave them",
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
        problems.append("holds no tensors (a vocabulary alone?)")
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


def _families(path: Path, architecture: str, stored: dict[str, GgufTensor]) -> tuple[Family, tuple[str, ...]]:
    """The family of the file's architecture that has just these tensors, and the names of all that do.

    Several families may share one: files of Mistral say `llama` too, and so do those of Qwen2 whose factors have
    to be honoured. Where several fit, or none, it is the one that is named like the architecture: llama.cpp
    computes the same for all of them (it drops Mistral's sliding window).
    """
    families = [get_family(name) for name in family_names()]
    candidates = [family for family in families if architecture in (family.gguf_architecture, family.gguf_longrope)]
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
        if row is not None:
            yield row.hf.replace("{layer}", layer), (tensor, row)
        else:
            yield f"{tensor.name} (in GGUF)", (tensor, None)


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


def _read_bytes(tensor: GgufTensor, dtype: np.dtype[Any], start: int, nbytes: int) -> np.ndarray[Any, Any]:
    count = nbytes // dtype.itemsize
    try:
        values = np.fromfile(tensor.file, dtype, count=count, offset=tensor.offset + start)
    except OSError as error:
        raise InputError(f"{tensor.file}: can't be read ({error.strerror or error})") from error
    if values.size != count:
        raise InputError(f"{tensor.file}: shrank while {tensor.name} was read")
    return values


def _read_plain(tensor: GgufTensor) -> np.ndarray[Any, Any]:
    return _read_bytes(tensor, numpy_dtype(tensor.type.name), 0, tensor.nbytes).reshape(tensor.shape)


def _dequantise_rows(rows: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):  # damaged scales make infinities; no reason for a warning here
        return dequantize(rows, kind)


def _rows_of(tensor: GgufTensor) -> int:
    return int(np.prod(tensor.shape[:-1], dtype=np.int64))


def _dequantise(tensor: GgufTensor, first: int = 0, last: int | None = None) -> np.ndarray[Any, Any]:
    """float32 values of rows, shape [rows, columns], a few at a time: gguf-py alone would hold the tensor twice."""
    columns, row_bytes = tensor.shape[-1], tensor.nbytes // _rows_of(tensor)
    values = np.empty(((last or _rows_of(tensor)) - first, columns), np.float32)
    step = max(1, _CHUNK_BYTES // (4 * columns))
    for start in range(0, len(values), step):
        count = min(step, len(values) - start)
        raw = _read_bytes(tensor, np.dtype(np.uint8), (first + start) * row_bytes, count * row_bytes)
        values[start : start + count] = _dequantise_rows(raw.reshape(count, row_bytes), tensor.type)
    return values


def _unpermute(values: np.ndarray[Any, Any], heads: int, tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's interleaving of a head's rows: pairs (2i, 2i+1) back to (i, i + d/2)."""
    rows = values.shape[0]
    if rows % (2 * heads):
        raise InputError(f"{tensor.file}: {tensor.name} has {rows} rows; a multiple of 2 x {heads} heads is needed")
    return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
