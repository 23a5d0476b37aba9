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

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,4})\.")
_PERMUTED = {"q": "heads", "q_bias": "heads", "k": "kv", "k_bias": "kv"}  # rows by role, where interleaved
_CHUNK_BYTES = 16 * 2**20  # of dequantised values, beside the tensor itself


class GgufCheckpoint(Checkpoint):
    """A GGUF checkpoint. Opening it reads headers and rope factors; a weight is read by `read`."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers = _read_parts(path)
        self.metadata = self.headers[0].metadata
        stored = _all_tensors(path, self.headers)
        self.family = _family(self.headers[0])
        self.config: dict[str, Any] = build_config(self.headers[0], self.family, stored, _read_plain)
        self._sources = dict(_translate(self.family, stored.values()))
        self.tensors = {
            name: TensorInfo(name, tensor.type.name, tensor.shape, tensor.file)
            for name, (tensor, _) in self._sources.items()
        }
        _check_types(path, stored.values())

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor under its Hugging Face name: float32 where it was quantised, else as it is stored."""
        tensor, row = self._sources[name]
        values = _read_plain(tensor) if tensor.type.name in FLOAT_DTYPES else _dequantise(tensor)
        if not self.family.gguf_interleaved or row is None or row.role not in _PERMUTED:
            return values
        heads = self.config["num_attention_heads" if _PERMUTED[row.role] == "heads" else "num_key_value_heads"]
        return _unpermute(values, heads, tensor)

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


def _family(header: GgufHeader) -> Family:
    """The family of the file's architecture.

    Several families may share one: files of Mistral say `llama` too. They load as the family that is named
    like the architecture, since llama.cpp computes the same for both (it drops Mistral's sliding window).
    """
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{header.path}: general.type is {kind!r:.60}; a whole model is needed")
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(f"{header.path}: missing metadata: general.architecture")
    families = [get_family(name) for name in family_names()]
    candidates = [family for family in families if family.gguf_architecture == architecture]
    if not candidates:
        known = ", ".join(sorted({family.gguf_architecture for family in families}))
        raise UnsupportedError(
            f"{header.path}: general.architecture is {architecture!r:.60}, which lrconvert doesn't read",
            remedy=f"Architectures: {known}",
        )
    return next((family for family in candidates if family.name == architecture), candidates[0])


def _translate(family: Family, stored: Any) -> Iterator[tuple[str, tuple[GgufTensor, TensorRow | None]]]:
    """Hugging Face name, tensor and row. What no row names keeps its own name: `understand` lists it."""
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


def _dequantise(tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """float32 values, a few rows at a time: gguf-py alone would hold the tensor twice."""
    columns = tensor.shape[-1]
    values = np.empty((int(np.prod(tensor.shape[:-1], dtype=np.int64)), columns), np.float32)
    row_bytes = tensor.nbytes // len(values)
    step = max(1, _CHUNK_BYTES // (4 * columns))
    for start in range(0, len(values), step):
        count = min(step, len(values) - start)
        raw = _read_bytes(tensor, np.dtype(np.uint8), start * row_bytes, count * row_bytes)
        values[start : start + count] = _dequantise_rows(raw.reshape(count, row_bytes), tensor.type)
    return values.reshape(tensor.shape)


def _unpermute(values: np.ndarray[Any, Any], heads: int, tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's interleaving of a head's rows: pairs (2i, 2i+1) back to (i, i + d/2)."""
    rows = values.shape[0]
    if rows % (2 * heads):
        raise InputError(f"{tensor.file}: {tensor.name} has {rows} rows; a multiple of 2 x {heads} heads is needed")
    return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
