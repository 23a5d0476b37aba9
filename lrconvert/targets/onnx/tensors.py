# SPDX-License-Identifier: Apache-2.0
"""What the weight files hold: which tensor in which type, where its bytes lie, and how they are made.

A float tensor is one initializer with its Hugging Face name. A quantised one, [out, in], is two, in the layout of
ONNX Runtime's MatMulNBits: NAME.packed [out, blocks, bytes of a block] and NAME.scales [out, blocks] in float16,
symmetric blocks of 32 values along `in`, rounded by ONNX Runtime's own function. Float16 costs a scale 11 bits of
precision of which the 4 or 8 bits of its values show nothing, and saves a tenth of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from mmap import mmap
from pathlib import Path

import numpy as np
from onnx import TensorProto

from lrconvert.artifact.prefetch import Job
from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.base import all_finite, cast_block, numpy_dtype
from lrconvert.checkpoint.blocks import Array, Block
from lrconvert.checkpoint.onnx_folder import PACKED, SCALES, TIED_HEAD
from lrconvert.errors import InputError, UnsupportedError, require

ONNX_TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
BLOCK = 32
# A page: what the ONNX documentation recommends, so that a file can be mapped.
ALIGNMENT = 4096
# A browser holds a file in one buffer, which can't have more; transformers.js fetches model.onnx_data_1 and so on.
MAX_FILE_BYTES = 2 * 10**9
DATA_FILE = "model.onnx_data"
# Quantised at once: they are turned around for ONNX Runtime's function, which takes several times as long for what
# isn't in the processor's cache. Each call has threads of its own, so half as many take a tenth longer.
QUANTISED_VALUES = 2**17


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint as it is stored: plain in `dtype`, or quantised to `bits`. `file` and `offset`:
    where its bytes begin; the scales follow the packed values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: int | None = None
    block: int = BLOCK
    file: str = ""
    offset: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.shape[-1] // self.block)

    @property
    def packed(self) -> str:
        return self.name + PACKED

    @property
    def scales(self) -> str:
        return self.name + SCALES

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        return self.shape[0], self.blocks, self.block * (self.bits or 0) // 8

    @property
    def parts(self) -> list[tuple[str, int, tuple[int, ...], int]]:
        """Name, ONNX type, shape and bytes of each initializer, in the order of the file."""
        if self.bits is None:
            count = int(np.prod(self.shape, dtype=np.int64))
            return [(self.name, ONNX_TYPES[self.dtype], self.shape, count * numpy_dtype(self.dtype).itemsize)]
        scales = (self.shape[0], self.blocks)
        return [
            (self.packed, TensorProto.UINT8, self.packed_shape, int(np.prod(self.packed_shape, dtype=np.int64))),
            (self.scales, TensorProto.FLOAT16, scales, 2 * scales[0] * scales[1]),
        ]

    @property
    def nbytes(self) -> int:
        """With the padding after every part."""
        return sum(size + -size % ALIGNMENT for *_, size in self.parts)

    def protos(self) -> Iterator[TensorProto]:
        """The initializers, pointing into the file."""
        offset = self.offset
        for name, kind, shape, size in self.parts:
            proto = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", self.file), ("offset", offset), ("length", size)):
                proto.external_data.add(key=key, value=str(value))
            yield proto
            offset += size + -size % ALIGNMENT


def lay_out(model: Model, dtype: str, bits: int | None) -> list[Stored]:
    """Every tensor that the graph reads, in file order, with its place. `dtype` is that of plain tensors; with `bits`
    the linear layers are quantised, and embedding and lm_head to 8 bits whatever the others have: a tied model has one
    tensor for both. An embedding whose rows are no whole blocks can't be looked up so; it is float16, and the head of a
    tied model a copy."""
    found = []
    for tensor in model.roles.values():
        role = tensor.role
        if role == "lm_head" and model.shape.tied:
            continue
        stored = Stored(tensor.name, tensor.shape, dtype)
        if bits is not None and role == "embedding" and tensor.shape[1] % BLOCK:
            found.append(replace(stored, dtype="F16"))
            if model.shape.tied:
                found.append(replace(stored, name=TIED_HEAD, bits=8))
            continue
        # A router is small, and what it rounds decides which experts are used.
        if bits is not None and len(tensor.shape) == 2 and role not in ("router", "shared_router"):
            stored = replace(stored, bits=8 if role in ("embedding", "lm_head") else bits)
        found.append(stored)
    return list(_placed(found))


def _placed(tensors: Sequence[Stored]) -> Iterator[Stored]:
    number, offset = 0, 0
    for tensor in tensors:
        if offset and offset + tensor.nbytes > MAX_FILE_BYTES:
            number, offset = number + 1, 0
        yield replace(tensor, file=f"{DATA_FILE}_{number}" if number else DATA_FILE, offset=offset)
        offset += tensor.nbytes


def files_of(tensors: Sequence[Stored]) -> dict[str, list[Stored]]:
    """File name to its tensors, in order."""
    found: dict[str, list[Stored]] = {}
    for tensor in tensors:
        found.setdefault(tensor.file, []).append(tensor)
    return found


# --- bytes -----------------------------------------------------------------------------------------------


def jobs(checkpoint: Checkpoint, tensor: Stored, source: str) -> Iterator[Job]:
    """Functions that make a tensor's bytes block by block, padding included, each with about how many it makes.
    `source`: the checkpoint's name of it.

    Scales follow the packed values: the blocks leave theirs in one array. Results are taken in order, so when the array
    is, every block has done so. Nothing else of a tensor is in memory whole.
    """
    scales = None if tensor.bits is None else _mapped(tensor.packed_shape[:2])
    *_, size = tensor.parts[0]
    for block in checkpoint.blocks(source):
        make = partial(_plain if scales is None else partial(_packed, scales), tensor, block, checkpoint.path)
        yield make, size * block.rows // tensor.shape[0]
    yield from _padding(size)
    if scales is not None:
        yield partial(_bytes, scales), scales.nbytes
        yield from _padding(scales.nbytes)


def _mapped(shape: tuple[int, int]) -> Array:
    """An array of float16 that C's `malloc` doesn't know of: once glibc has freed a large array, it keeps up to twice
    its size of what is freed later, for every thread."""
    return np.frombuffer(mmap(-1, 2 * shape[0] * shape[1]), np.float16).reshape(shape)


def _padding(size: int) -> Iterator[Job]:
    """What follows a part of so many bytes."""
    if missing := -size % ALIGNMENT:
        yield partial(memoryview, bytes(missing)), missing


def _bytes(values: Array) -> memoryview:
    return values.reshape(-1).view(np.uint8).data


def _plain(tensor: Stored, block: Block, source: Path) -> memoryview:
    return _bytes(cast_block(block.read(), tensor.dtype, tensor.name, source))


def _packed(scales: Array, tensor: Stored, block: Block, source: Path) -> memoryview:
    """The packed values of a block. Its scales go into `scales`, the tensor's."""
    pieces, row = [], block.start
    for values in _row_blocks(block.read()):
        if not all_finite(values):
            raise InputError(f"{source}: {tensor.name} holds values that are not finite")
        packed, wide = quantise(values, tensor.bits or 0, tensor.block)
        end = row + len(values)
        with np.errstate(over="ignore"):
            scales[row:end] = wide
        if not all_finite(scales[row:end]):
            raise UnsupportedError(f"{tensor.name} holds values beyond float16's range", remedy="Use --dtype f32")
        pieces.append(packed)
        row = end
    return _bytes(np.concatenate(pieces))


def _row_blocks(values: Array) -> list[Array]:
    """Rows in pieces of about the same size: a small call takes nearly as long as a large one."""
    return np.array_split(values, min(len(values), -(-values.size // QUANTISED_VALUES)))


def quantise(values: Array, bits: int, block: int) -> tuple[Array, Array]:
    """Rows [n, in] to packed values [n, blocks, bytes] and scales [n, blocks], by ONNX Runtime's own function."""
    native = require("onnxruntime.capi._pybind_state", "onnx", "quantisation")
    rows, columns = values.shape
    blocks = -(-columns // block)
    packed = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zero_points = np.zeros(rows * blocks, np.uint8)  # not written: the rounding is symmetric
    transposed = np.ascontiguousarray(values.astype(np.float32).T)
    function = {4: native.quantize_matmul_4bits, 8: native.quantize_matmul_8bits}[bits]
    function(packed, transposed, scales, zero_points, block, rows, columns, True)
    return packed, scales.reshape(rows, blocks)
