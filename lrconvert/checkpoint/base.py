# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is, regardless of its file format: a config, named tensors read on demand, side files."""

from __future__ import annotations

import json
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lrconvert.checkpoint.blocks import Array, Block
from lrconvert.checkpoint.rope_config import FoundRope, read_rope
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import ExpectedTensor, Family, Key, ModelShape
from lrconvert.recipe import Recipe, resolve
from lrconvert.rope import RopeSpec, Tier

if TYPE_CHECKING:
    from lrconvert.checkpoint.gguf_header import GgufHeader

# The largest indexes, of a hundred thousand tensors, are about 10 MB; parsed, a file can be 20 times its size.
MAX_JSON_BYTES = 32 * 2**20
MAX_JSON_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_TOKENIZER_BYTES = 48 * 2**20  # of a tokenizer.json: 262,000 tokens with their merges take 33 MB

# Names of the dtypes as safetensors spells them, as arrays come in.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a float dtype's safetensors name; BF16 comes from ml_dtypes."""
    if name == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[name])


CACHED_VALUES = 65_536  # looked at together: what is in a processor's cache is looked at ten times as fast


def all_finite(values: Array) -> bool:
    """Whether no value is infinite or NaN. F16 and BF16 are looked at by their bits, several times as fast as by NumPy
    and ml_dtypes."""
    if values.dtype.itemsize > 2:
        return bool(np.isfinite(values).all())
    infinity = 0x7C00 if values.dtype.kind == "f" else 0x7F80
    return all(int((piece & 0x7FFF).max()) < infinity for piece in bit_pieces(values))


def bit_pieces(values: Array) -> Iterator[np.ndarray[Any, np.dtype[np.uint16]]]:
    """The bits of 16-bit floats, in pieces that stay in the processor's cache."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint16)
    return (bits[start : start + CACHED_VALUES] for start in range(0, bits.size, CACHED_VALUES))


def cast_block(values: Array, dtype: str, name: str, source: Path) -> Array:
    """A block in another dtype (safetensors name). What float16 can't hold is an error: `InputError` for values that
    are not finite, `UnsupportedError` for those beyond its range."""
    with np.errstate(over="ignore"):
        cast = values.astype(numpy_dtype(dtype), copy=False)
    if dtype == "F16" and values.dtype != cast.dtype and not all_finite(cast):
        if not all_finite(values):
            raise InputError(f"{source}: {name} holds values that are not finite")
        raise UnsupportedError(f"{name} holds values beyond float16's range", remedy="Use --dtype bf16 or f32")
    return np.ascontiguousarray(cast)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is: known without reading it."""

    name: str  # the Hugging Face name
    dtype: str  # as safetensors spells it; for GGUF the quantisation type, as ggml spells it
    shape: tuple[int, ...]
    file: Path
    nbytes: int = 0  # in the file


@dataclass(frozen=True)
class Encoded:
    """A tensor's bytes as a GGUF stores them. Rows are the file's, along the last dimension: a vector is one row."""

    type: str  # as ggml spells it
    interleaved: bool  # rows of a head lie in llama.cpp's order: channel i and i + d/2 side by side
    read: Callable[[int, int], Array]  # rows from start to stop as uint8 [rows, bytes of a row], in any thread


class MergedAdapter(Protocol):
    """What a merged adapter is described by: how it was named, where it lies, and what a manifest says of it."""

    @property
    def reference(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def description(self) -> dict[str, str]: ...


class Checkpoint(ABC):
    """A model on disk, opened. Nothing but headers is in memory until a block is read.

    Attributes tell what code that uses the weights has to know. `format` is for people and manifests.
    """

    path: Path  # the folder or file
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    format: str  # "safetensors", "gguf", "onnx"
    quantised_with: str | None = None  # the method of a `quantization_config`; weights are read dequantised
    dense_dtype: str | None = None  # what such weights are written as where nobody says otherwise
    outdated: Mapping[str, Any] = MappingProxyType({})  # keys of the file's config that no longer hold of what is read
    families: tuple[str, ...] = ()  # all whose weights these may be, where the file does not say
    computing: str | None = None  # what code computes products over these weights in, where the file decides that
    takes_padding: bool = True  # whether rows of a batch may be padded on the left, where the file decides that
    takes_shift: bool = True  # whether a full context may be shifted, where the file decides that
    rope_problems: tuple[str, ...] = ()  # why the rope scaling of a file that was opened all the same means nothing
    native: bool = False  # the weight files are what transformers loads, and an artifact may keep them as they are
    dequantises: bool = False  # tensors of other types than floats are read as float32
    tiers: tuple[Tier, ...] | None = None  # what the checkpoint's own code computes, whatever its config says
    gguf: GgufHeader | None = None  # of a GGUF: metadata that a GGUF made from it carries on
    # Of a language model inside of a larger one: that one's model_type, and how many tensors are left out, by pattern.
    part_of: Mapping[str, Any] | None = None
    touched: frozenset[str] = frozenset()  # names of tensors that differ from what the files hold
    adapter: MergedAdapter | None = None  # merged into what is read

    @abstractmethod
    def blocks(self, name: str) -> Iterator[Block]:
        """One tensor as blocks of rows, in order and without gaps. There is at least one; a vector is one.

        Their arrays are F64, F32, F16 or BF16 (ml_dtypes): the stored dtype, or float32 where it was quantised. A view
        that says `rounded=False` gives wider ones of what it changes.
        """

    def read(self, name: str) -> Array:
        """One tensor whole, in the dtype of its blocks."""
        shape = self.tensors[name].shape
        whole: Array | None = None
        for block in self.blocks(name):
            rows = block.read()
            if not shape or block.rows == shape[0]:
                return rows.reshape(shape)
            whole = np.empty(shape, rows.dtype) if whole is None else whole
            whole[block.start : block.stop] = rows
        assert whole is not None
        return whole

    def encoded(self, name: str) -> Encoded | None:
        """The tensor as it is stored, where that is a type of GGUF; None elsewhere, and where a view changes it."""
        return None

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that hold the weights, and the index if there is one, in a fixed order."""

    @abstractmethod
    def side_files(self) -> dict[str, Path | bytes]:
        """What has to come along besides config and weights: tokenizer, chat template, licence, …
        File name to the file, or to its bytes where it had to be rebuilt."""


class CheckpointView(Checkpoint):
    """Another checkpoint, some of whose tensors are changed as they are read; its files are the base's.

    A view says in `touched` which ones, and makes their blocks in `blocks`; all else it leaves to its base.
    """

    def __init__(self, base: Checkpoint, touched: Iterable[str] = ()) -> None:
        self.base, self.touched = base, base.touched | frozenset(touched)
        self.path, self.format, self.config, self.tensors = base.path, base.format, base.config, base.tensors
        self.quantised_with, self.families, self.rope_problems = base.quantised_with, base.families, base.rope_problems
        self.native, self.dequantises, self.dense_dtype = base.native, base.dequantises, base.dense_dtype
        self.outdated = base.outdated
        self.gguf, self.adapter, self.part_of = base.gguf, base.adapter, base.part_of

    @property
    def tiers(self) -> tuple[Tier, ...] | None:  # type: ignore[override]
        return self.base.tiers

    @property
    def computing(self) -> str | None:  # type: ignore[override]
        return self.base.computing

    @property
    def takes_padding(self) -> bool:  # type: ignore[override]
        return self.base.takes_padding

    @property
    def takes_shift(self) -> bool:  # type: ignore[override]
        return self.base.takes_shift

    def blocks(self, name: str) -> Iterator[Block]:
        return self.base.blocks(name)

    def encoded(self, name: str) -> Encoded | None:
        return None if name in self.touched else self.base.encoded(name)

    def weight_files(self) -> list[Path]:
        return self.base.weight_files()

    def side_files(self) -> dict[str, Path | bytes]:
        return self.base.side_files()


@dataclass(frozen=True)
class Model:
    """A checkpoint matched with its family: the shape, and every tensor's role."""

    reference: str  # as the user named it
    checkpoint: Checkpoint
    family: Family
    shape: ModelShape
    notes: tuple[str, ...] = ()
    roles: Mapping[Key, ExpectedTensor] = field(default_factory=dict, repr=False)

    @cached_property
    def dtype(self) -> str:
        """The dtype that most weights have."""
        counts: dict[str, int] = {}
        for info in self.checkpoint.tensors.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + int(np.prod(info.shape, dtype=np.float64))
        return max(counts, key=lambda name: counts[name])

    @property
    def quantised(self) -> str | None:
        """What the weights are dequantised from, in words; None for plain ones."""
        kinds = {info.dtype for info in self.checkpoint.tensors.values()} - set(FLOAT_DTYPES)
        return ", ".join(sorted(kinds)) if self.checkpoint.dequantises and kinds else None

    def read_dequantised(self, what: str) -> list[str]:
        """A note on `what` computes with weights that a folder stores quantised; none for others."""
        if self.checkpoint.quantised_with is None or self.quantised is None:
            return []
        return [f"the model is quantised, {self.quantised}: {what}"]

    def dequantised(self, written: str | None) -> list[str]:
        """What a user has to know where quantised weights are written as another type; None: as they are."""
        if written is None or self.quantised is None:
            return []
        return [f"weights dequantised from {self.quantised}, written as {written}"]

    def lifted(self) -> Model:
        """The model without its sliding windows: every layer attends to every token."""
        return replace(self, shape=replace(self.shape, sliding=()))

    def family_name(self, name: str) -> str:
        """The family's name; `name` where the weights may be of that family too (a GGUF of Mistral says llama)."""
        return name if name in self.checkpoint.families else self.family.name

    def resolve(self, recipe: Recipe, window: int | None = None) -> RopeSpec:
        """The recipe against this model; `window` (tokens) may cut it short.

        Raises `InputError` when the recipe is for another model and `UsageError` for a window that it does not reach.
        """
        family, shape = self.family_name(recipe.family), self.shape
        return resolve(recipe, family=family, rotary_dim=shape.rotary_dim, theta=shape.theta, window=window)

    @cached_property
    def rotation(self) -> FoundRope:
        """The rotation that the model has: what its own code computes, else what its config means.

        Raises `InputError` for a config that means none.
        """
        if tiers := self.checkpoint.tiers:
            return FoundRope("lrconvert", tiers[0].max_length, tiers)
        return read_rope(self.checkpoint.config, self.shape)

    def tensor(self, role: str, layer: int | None = None, expert: int | None = None) -> Array | None:
        """The tensor of a role, or None where this model has none."""
        expected = self.roles.get((role, layer) if expert is None else (role, layer, expert))
        return None if expected is None else self.checkpoint.read(expected.name)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file; `InputError` for anything else, in bounded time and memory."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device has no end
            raise InputError(f"{path}: not a file")
        if status.st_size > limit:
            raise InputError(f"{path}: {status.st_size} bytes; at most {limit} are read")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error
    return parse_json(content, path)


def read_json_source(source: Path | bytes, name: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file, or in the bytes of one that was made here: `name`. `InputError` as `read_json`."""
    return read_json(source, limit) if isinstance(source, Path) else parse_json(source, name)


def parse_json(content: bytes, where: object) -> dict[str, Any]:
    """The JSON object in some bytes; `InputError` for anything else."""
    try:
        value = json.loads(content)
        if _SURROGATE.search(content):  # half of a pair is no character: nothing can write it again
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: not usable JSON (a string with half a surrogate pair)") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{where}: not JSON ({reason})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds {type(value).__name__}; a JSON object is needed")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return value
    raise InputError(f"{where}: not usable JSON (nested more than {MAX_JSON_DEPTH} deep)")
