# SPDX-License-Identifier: Apache-2.0
"""An ONNX folder that lrconvert wrote, read back: its weights, and what its graph says of the rotation.

Initializers have Hugging Face names, so the folder is a checkpoint like any other; quantised ones are dequantised.
(Graphs of other exporters are only looked at: `onnx_graph`.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.checkpoint.base import Checkpoint, TensorInfo, numpy_dtype, read_json
from lrconvert.checkpoint.blocks import Array, Block, row_blocks
from lrconvert.checkpoint.folder import CONFIG, side_files_of
from lrconvert.errors import InputError, require
from lrconvert.rope import Tier

GRAPH = "onnx/model.onnx"
MICROSOFT = "com.microsoft"
# The function that rotates, and what its call says of the tiers. Published names are permanent.
DOMAIN = "lrconvert"
COS_SIN = "LongRopeCosSin"
TIER_ATTRIBUTES = ("tier_lengths", "start_tokens", "attention_factors", "inverse_frequencies",
                   "scaled_inverse_frequencies")  # fmt: skip
# A quantised tensor is two initializers; a table has the first one's values again, row by row.
PACKED, SCALES, ROWS = ".packed", ".scales", ".rows"
# `accuracy_level` of MatMulNBits: products of integers. On a CPU ONNX Runtime then rounds activations to 8 bits.
INT8_PRODUCTS = 4
TIED_HEAD = "lm_head.weight"  # of a tied model that is quantised, where the embedding itself can't be
MAX_GRAPH_BYTES = 2**31 - 1  # of a protobuf message


@dataclass(frozen=True)
class External:
    """Where an initializer's bytes lie."""

    file: Path
    offset: int
    nbytes: int
    dtype: str  # a safetensors name, or "U8"
    shape: tuple[int, ...]


def load_graph(path: Path) -> Any:
    """The graph without its external data; `InputError` for anything else."""
    onnx = require("onnx", "onnx", "reading ONNX")
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe has no end
            raise InputError(f"{path}: not a file")
        if size > MAX_GRAPH_BYTES:
            raise InputError(f"{path}: {size} bytes; an ONNX graph can have at most {MAX_GRAPH_BYTES}")
        model = onnx.load(str(path), load_external_data=False)
        if odd := next((text for text in _texts(model) if not isinstance(text, str)), None):
            raise InputError(f"{path}: not an ONNX graph (a name is {odd[:40]!a}, which is not UTF-8)")
        return model
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error
    except Exception as error:  # protobuf's DecodeError, from whichever implementation is installed
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not an ONNX graph ({' '.join(str(error).split())[:200]})") from error


def _texts(message: Any) -> Iterator[Any]:
    """Every string of a message; protobuf hands out as bytes what is not UTF-8."""
    for field, value in message.ListFields():
        values = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
        if field.message_type is not None:
            for inner in values:
                yield from _texts(inner)
        elif field.type == field.TYPE_STRING:
            yield from values


def is_own(folder: Path) -> bool:
    """Whether a folder has a graph with our function."""
    path = folder / GRAPH
    return path.is_file() and any(function.domain == DOMAIN for function in load_graph(path).functions)


def _numbers(tensor: Any) -> np.ndarray[Any, Any]:
    """An attribute of the call; `ValueError` for what is no array of finite numbers."""
    from onnx import numpy_helper

    if tensor.data_location == 1:
        raise ValueError(f"{tensor.name} is stored in a file")
    array = numpy_helper.to_array(tensor)
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise ValueError(f"{tensor.name} holds something other than numbers")
    return array


def _size(file: Path) -> int:
    """Of a data file; −1 where there is none, whatever its name is."""
    try:
        return file.stat().st_size if file.is_file() else -1
    except OSError:  # a name that no file can have
        return -1


class OnnxCheckpoint(Checkpoint):
    """The folder. Raises `InputError` where the graph is not one of ours or does not fit its data files."""

    format = "onnx"
    dequantises = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self.graph = load_graph(path / GRAPH)
        if self.call is None:
            raise InputError(
                f"{path / GRAPH}: has no {DOMAIN}::{COS_SIN}, so it was not written by lrconvert",
                remedy="Convert its source checkpoint",
            )
        self._external = dict(self._located())
        if problems := list(self._quantised_problems()):
            raise InputError.collect(path / GRAPH, problems[:20])

    # --- the rotation ------------------------------------------------------------------------------------

    @cached_property
    def _calls(self) -> list[Any]:
        return [node for node in self.graph.graph.node if (node.domain, node.op_type) == (DOMAIN, COS_SIN)]

    @property
    def call(self) -> Any:
        """The node that calls the rotary function with the recipe's tiers, or None."""
        return self._calls[0] if self._calls else None

    @property
    def double(self) -> bool:
        """Whether angles are made in float64, not read from tables."""
        return not any(attribute.name == "coarse_cos" for attribute in self.call.attribute)

    @cached_property
    def attention(self) -> str:
        """ "gqa" or "standard"."""
        return "gqa" if any(node.domain == MICROSOFT and node.op_type == "GroupQueryAttention"
                            for node in self.graph.graph.node) else "standard"  # fmt: skip

    @property
    def heads(self) -> int:
        """Query heads of a layer, as the graph has them."""
        attributes = [a for node in self.graph.graph.node for a in node.attribute
                      if node.op_type in ("GroupQueryAttention", "Attention")]  # fmt: skip
        return max((a.i for a in attributes if a.name in ("num_heads", "q_num_heads")), default=1)

    @cached_property
    def tiers(self) -> tuple[Tier, ...]:  # type: ignore[override]
        """The tiers in the graph, which determines the computation, regardless of config.json."""
        return self._tiers_of(self.call)

    @property
    def plain(self) -> list[tuple[np.ndarray[Any, Any], tuple[Tier, ...]]]:
        """Of every other call: its inverse frequencies before any factor, and its tiers. It should have one of ones:
        it rotates layers with a θ of their own."""
        frequencies = [
            _numbers(a.t) for call in self._calls[1:] for a in call.attribute if a.name == TIER_ATTRIBUTES[3]
        ]
        return list(zip(frequencies, map(self._tiers_of, self._calls[1:]), strict=True))

    def _tiers_of(self, call: Any) -> tuple[Tier, ...]:
        try:
            arrays = {a.name: _numbers(a.t) for a in call.attribute if a.name in TIER_ATTRIBUTES}
            plain, scaled = arrays["inverse_frequencies"], arrays["scaled_inverse_frequencies"]
            columns = (arrays["tier_lengths"], arrays["start_tokens"], arrays["attention_factors"])
            if not len(columns[0]) or not plain.size or not all((array > 0).all() for array in (plain, scaled)):
                raise ValueError("no tiers, or frequencies that are not positive")
            return tuple(
                Tier(int(length), tuple((plain / row).tolist()), int(start), float(factor))
                for length, start, factor, row in zip(*columns, scaled, strict=True)
            )
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{self.path / GRAPH}: {COS_SIN} has no readable tiers ({error})") from error

    @property
    def takes_padding(self) -> bool:  # type: ignore[override]
        return self.attention == "standard"

    # --- weights -----------------------------------------------------------------------------------------

    def _located(self) -> Iterator[tuple[str, External]]:
        """Every initializer in a data file, checked against the file."""
        kinds = {1: "F32", 10: "F16", 16: "BF16", 2: "U8"}
        problems, sizes = [], {}
        for tensor in self.graph.graph.initializer:
            if tensor.data_location != 1:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location = entries.get("location", "")
            file = self.path / Path(GRAPH).parent / location
            if not location or Path(location).name != location or "\\" in location:
                problems.append(f"{tensor.name} is stored in {location!r}, which is not a plain file name")
                continue
            if file not in sizes:
                sizes[file] = _size(file)
            try:
                offset, nbytes = int(entries.get("offset", 0)), int(entries["length"])
                dtype, shape = kinds[tensor.data_type], tuple(tensor.dims)
                needed = int(np.prod(shape, dtype=np.int64)) * (1 if dtype == "U8" else numpy_dtype(dtype).itemsize)
            except (KeyError, ValueError):
                problems.append(f"{tensor.name}: has no length, or a type that lrconvert does not write")
                continue
            if sizes[file] < 0:
                problems.append(f"{tensor.name} is stored in {location}, which is missing")
            elif offset < 0 or nbytes != needed or offset + nbytes > sizes[file]:
                problems.append(f"{tensor.name} does not fit into {location}")
            else:
                yield tensor.name, External(file, offset, nbytes, dtype, shape)
        if problems:
            raise InputError.collect(self.path / GRAPH, problems[:20])

    def _quantised_problems(self) -> Iterator[str]:
        """Of tensors whose bytes are there: what can't be read as the graph reads it."""
        for name, place in self._external.items():
            if place.dtype == "U8" and name.removesuffix(PACKED) not in self._blocks:
                yield f"{name}: bytes that nothing reads as quantised values"
        for name, (bits, block, columns) in self._blocks.items():
            packed, scales = self._external.get(name + PACKED), self._external.get(name + SCALES)
            if packed is None or scales is None:
                yield f"{name}: has no packed values or no scales in a data file"
            elif bits not in (4, 8) or block < 1 or columns < 1:
                yield f"{name}: {bits} bits in blocks of {block} for rows of {columns}"
            elif (packed.dtype, packed.shape[1:]) != ("U8", (-(-columns // block), block * bits // 8)):
                yield f"{name}: packed values of shape {list(packed.shape)}"
            elif scales.dtype not in ("F32", "F16") or scales.shape != packed.shape[:2]:
                yield f"{name}: scales of type {scales.dtype} and shape {list(scales.shape)}"

    @cached_property
    def _blocks(self) -> dict[str, tuple[int, int, int]]:
        """Of quantised tensors: bits, values a block, and values a row."""
        found: dict[str, tuple[int, int, int]] = {}
        joined = {node.output[0]: node.input for node in self.graph.graph.node
                  if node.op_type == "Concat" and node.output}  # fmt: skip
        for node in self.graph.graph.node:
            values = {a.name: a.i for a in node.attribute}
            if node.op_type == "MatMulNBits" and len(node.input) > 2:
                of_all = (values.get("bits", 4), values.get("block_size", 32), values.get("K", 0))
                parts = joined.get(node.input[1], [node.input[1]])  # of one product, or of several that are one
                found |= {part.removesuffix(PACKED): of_all for part in parts}
            if node.op_type == "GatherBlockQuantized" and len(node.input) > 2:
                name = node.input[0].removesuffix(ROWS).removesuffix(PACKED)
                block, packed = values.get("block_size", 128), self._external.get(name + PACKED)
                columns = block * packed.shape[1] if packed and len(packed.shape) == 3 else 0
                found.setdefault(name, (values.get("bits", 4), block, columns))
        return found

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:  # type: ignore[override]
        found = {}
        for name, place in self._external.items():
            if name.endswith(SCALES):
                continue
            plain = name.removesuffix(PACKED)
            if plain == name:
                found[name] = TensorInfo(name, place.dtype, place.shape, place.file, place.nbytes)
            elif plain in self._blocks:
                bits, _, columns = self._blocks[plain]
                size = place.nbytes + self._external[plain + SCALES].nbytes
                found[plain] = TensorInfo(plain, f"INT{bits}", (place.shape[0], columns), place.file, size)
        return found

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The types of the weights in products."""
        return frozenset(info.dtype for info in self.tensors.values() if len(info.shape) == 2)

    @property
    def computing(self) -> str:  # type: ignore[override]
        """What products are computed with, as `tolerances` calls it."""
        quantised = sorted(kind for kind in self.kinds if kind.startswith("INT"))
        if quantised:
            return quantised[0]
        return next((kind for kind in ("BF16", "F16") if kind in self.kinds), "F32")

    @cached_property
    def activation_block(self) -> int:
        """How many channels of an activation share a scale where products round them to 8 bits: the block of their
        weights. 0 where no product does."""
        nodes = [{a.name: a.i for a in node.attribute}
                 for node in self.graph.graph.node if node.op_type == "MatMulNBits"]  # fmt: skip
        rounding = [each for each in nodes if each.get("accuracy_level") == INT8_PRODUCTS]
        return max((each.get("block_size", 32) for each in rounding), default=0)

    def blocks(self, name: str) -> Iterator[Block]:
        read = partial(self._raw if name in self._external else self._dequantised, name)
        return (Block(*rows, partial(read, *rows)) for rows in row_blocks(self.tensors[name].shape))

    def _raw(self, name: str, start: int, stop: int) -> Array:
        """Rows of an initializer as they are stored."""
        place = self._external[name]
        dtype = np.dtype(np.uint8) if place.dtype == "U8" else numpy_dtype(place.dtype)
        inner = place.shape[1:]
        width = int(np.prod(inner, dtype=np.int64))
        count = (stop - start) * width
        try:
            values = np.fromfile(place.file, dtype, count, offset=place.offset + start * width * dtype.itemsize)
        except OSError as error:
            raise InputError(f"{place.file}: can't be read ({error.strerror or error})") from error
        if values.size != count:
            raise InputError(f"{place.file}: shrank while {name} was read")
        return values.reshape(stop - start, *inner)

    def _dequantised(self, name: str, start: int, stop: int) -> Array:
        bits, block, columns = self._blocks[name]
        packed, scales = (self._raw(name + part, start, stop) for part in (PACKED, SCALES))
        if bits == 4:  # two values a byte, the first one in the low half
            packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], block)
        values = (packed.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None].astype(np.float32)
        return values.reshape(len(values), -1)[:, :columns]

    def weight_files(self) -> list[Path]:
        return [self.path / GRAPH, *sorted({place.file for place in self._external.values()})]

    def side_files(self) -> dict[str, Path | bytes]:
        return side_files_of(self.path)
