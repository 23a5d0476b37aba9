# SPDX-License-Identifier: Apache-2.0
"""Float rows to the bytes of a GGUF type.

Three ways, chosen so that the bytes do not depend on what is installed where there is a choice:

- F32, F16, BF16: NumPy and ml_dtypes casts, to nearest even.
- Q4_0, Q4_1, Q5_0, Q5_1: gguf-py, always. ggml gives the same bytes where its compiler keeps a product and a sum
  apart, as on x86-64; in builds for ARM it fuses them, and values at a rounding boundary go the other way: in one of
  240 blocks of Q4_0, when the weights were BF16 and such values are common.
- Q8_0: ggml where there is a library, which is faster, else gguf-py. It has no sums to fuse: the bytes are the same.
- K and IQ types, and whatever an importance matrix weights: ggml, the bytes of which depend on the processor's family.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from lrconvert.checkpoint.base import CACHED_VALUES, all_finite, bit_pieces, numpy_dtype
from lrconvert.errors import EnvironmentFailure, InputError, UnsupportedError
from lrconvert.runtimes.llama_library import LlamaLibrary, load
from lrconvert.targets.gguf.schemes import FLOATS

if TYPE_CHECKING:
    from lrconvert.targets.gguf.imatrix import Imatrix

Type = GGMLQuantizationType

IN_NUMPY = frozenset({Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1})
_FASTER_IN_GGML = frozenset({Type.Q8_0})
_UNWEIGHTED = frozenset({Type.Q8_0})  # ggml takes an importance matrix for it and does not look at it

# Where a block keeps its float16 numbers (ggml-common.h), in bytes; IQ1_M has its one in four pieces.
_SCALES: dict[GGMLQuantizationType, tuple[int, ...]] = {
    **dict.fromkeys((Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.IQ4_NL, Type.IQ4_XS, Type.IQ3_S, Type.IQ3_XXS), (0,)),
    **dict.fromkeys((Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ1_S), (0,)),
    **dict.fromkeys((Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K), (0, 2)),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q6_K: (208,),
    Type.IQ1_M: (),
}
# Far below what a float16 scale can tell from zero (2**-24), and far above where its reciprocal overflows float32.
# A block of smaller values is stored as zeros; what ggml and NumPy would store as its quants is undefined.
_TINY = np.float32(2.0**-100)


def check(kinds: Iterable[GGMLQuantizationType], library: LlamaLibrary | None, *, weighted: bool = False) -> None:
    """Before anything is written: whether these types can be encoded.

    `weighted`: with an importance matrix. Raises `EnvironmentFailure` where that takes a library and there is none,
    and `UnsupportedError` for types that are not written.
    """
    kinds = set(kinds) - FLOATS
    if unknown := sorted(kind.name for kind in kinds - _SCALES.keys()):
        raise UnsupportedError(f"{', '.join(unknown)}: types that lrconvert does not write")
    needing = sorted(kind.name for kind in kinds if _needs_ggml(kind, weighted))
    if needing and library is None:
        reason = " with an importance matrix" if weighted else ""
        raise EnvironmentFailure(
            f"quantising to {', '.join(needing)}{reason} needs llama.cpp's library, which is not installed",
            remedy="pip install 'lrconvert[llama]'",
        )


def _needs_ggml(kind: GGMLQuantizationType, weighted: bool) -> bool:
    return kind not in IN_NUMPY or (weighted and kind not in _UNWEIGHTED)


class Encoder:
    """Float rows to the bytes of a type. Safe to use from several threads, which ggml's work then keeps busy."""

    def __init__(self, library: LlamaLibrary | None, imatrix: Imatrix | None = None) -> None:
        self._ggml = None if library is None else _Ggml(library)
        self._imatrix = imatrix

    def encode(
        self, rows: np.ndarray[Any, Any], kind: GGMLQuantizationType, name: str, expert: int = 0, experts: int = 1
    ) -> memoryview:
        """The bytes of whole rows, [n, columns] of F64, F32, F16 or BF16 (ml_dtypes), or of a vector.

        `name` is the tensor's in the file, for the importance matrix and for messages; `expert` of the `experts` in it
        is the one whose rows these are. Raises `InputError` for values
        that are not finite and for a matrix that does not fit, `UnsupportedError` for values beyond the type's range.
        """
        if kind in FLOATS:
            return _bytes(_cast(rows, kind, name))
        rows = _as_float32(np.atleast_2d(rows), name)
        if rows.shape[-1] % GGML_QUANT_SIZES[kind][0]:  # ggml would end the process
            raise ValueError(f"{name}: rows of {rows.shape[-1]} values can't be {kind.name}")
        weights = None if self._imatrix is None else self._imatrix.weights(name, rows.shape[-1], expert, experts)
        with np.errstate(over="ignore", invalid="ignore"):
            quants = self._quantise(rows, kind, name, weights)
        if not _finite_scales(quants, kind):
            raise UnsupportedError(
                f"{name} holds values beyond the range of {kind.name}, whose scales are float16",
                remedy="Use --type bf16",
            )
        return _bytes(quants)

    def _quantise(
        self, rows: np.ndarray[Any, Any], kind: GGMLQuantizationType, name: str, weights: np.ndarray[Any, Any] | None
    ) -> np.ndarray[Any, Any]:
        in_numpy = not _needs_ggml(kind, weights is not None)
        if in_numpy and (self._ggml is None or kind not in _FASTER_IN_GGML):
            return quantize(rows, kind)
        if self._ggml is None:
            check([kind], None, weighted=weights is not None)
        assert self._ggml is not None
        if weights is None and self._ggml.requires_matrix(kind):  # else it would end the process
            raise InputError(f"{name}: {kind.name} needs an importance matrix", remedy="Give one with --imatrix FILE")
        return self._ggml.quantise(rows, kind, weights)


# --- floats ------------------------------------------------------------------------------------------------


def _cast(rows: np.ndarray[Any, Any], kind: GGMLQuantizationType, name: str) -> np.ndarray[Any, Any]:
    """The rows as F32, F16 or BF16, to nearest even."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = rows.astype(numpy_dtype(kind.name), copy=False)
    if all_finite(rows if kind == Type.F32 and rows.dtype.itemsize == 2 else cast):  # F32 holds all of them
        return cast
    if not all_finite(rows):
        raise _not_finite(name)
    remedy = "Use --type bf16" if kind == Type.F16 else "Use --type f32" if kind == Type.BF16 else None
    raise UnsupportedError(f"{name} holds values beyond the range of {kind.name}", remedy=remedy)


def _as_float32(rows: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """The rows [n, columns] as contiguous float32, checked; zero where they are tiny or a negative zero.

    gguf-py and ggml give zeros another sign here and there, which nothing computed from them shows.
    """
    cast = np.ascontiguousarray(_cast(rows, Type.F32, name))
    if rows.dtype.itemsize == 2 and all(int((piece & 0x7FFF).min()) >= _tiny_bits(rows) for piece in bit_pieces(rows)):
        return cast  # none is tiny, which the bits of the shorter type tell sooner
    cleaned = None
    step = max(1, CACHED_VALUES // cast.shape[1])
    for start in range(0, len(cast), step):
        tiny = np.abs(cast[start : start + step]) < _TINY
        if tiny.any():
            cleaned = cast.copy() if cleaned is None else cleaned  # the caller's stay as they are
            cleaned[start : start + step][tiny] = 0
    return cast if cleaned is None else cleaned


def _tiny_bits(rows: np.ndarray[Any, Any]) -> int:
    """The bits of the smallest F16 or BF16 that isn't tiny. Every F16 but zero is larger."""
    return 1 if rows.dtype.kind == "f" else int(_TINY.view(np.uint32) >> 16)


def _not_finite(name: str) -> InputError:
    return InputError(f"{name} holds values that are not finite")


def _bytes(array: np.ndarray[Any, Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# --- quants ------------------------------------------------------------------------------------------------


def _finite_scales(quants: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> bool:
    blocks = quants.reshape(-1, GGML_QUANT_SIZES[kind][1])
    if kind == Type.IQ1_M:  # four bits at the end of each of the last four 16-bit words
        words = blocks[:, -8:].copy().view(np.uint16) >> 12
        bits = words[:, 0] | words[:, 1] << 4 | words[:, 2] << 8 | words[:, 3] << 12
        return bool(np.isfinite(bits.view(np.float16)).all())
    fields = [blocks[:, offset : offset + 2].copy().view(np.float16) for offset in _SCALES[kind]]
    return all(bool(np.isfinite(field).all()) for field in fields)


class _Ggml:
    """ggml's quantisation functions in a library."""

    def __init__(self, library: LlamaLibrary) -> None:
        size, number, pointer = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
        self._chunk = _function(
            library, "ggml_quantize_chunk", size, ctypes.c_int, pointer, pointer, number, number, number, pointer
        )
        self._requires = _function(library, "ggml_quantize_requires_imatrix", ctypes.c_bool, ctypes.c_int)

    def requires_matrix(self, kind: GGMLQuantizationType) -> bool:
        return self._requires(int(kind))

    def quantise(
        self, rows: np.ndarray[Any, Any], kind: GGMLQuantizationType, weights: np.ndarray[Any, Any] | None
    ) -> np.ndarray[Any, Any]:
        """The quants of contiguous float32 rows; `weights` has one number a column."""
        block, nbytes = GGML_QUANT_SIZES[kind]
        quants = np.empty(rows.size // block * nbytes, np.uint8)
        weights = None if weights is None else np.ascontiguousarray(weights, np.float32)
        data = None if weights is None else weights.ctypes.data
        done = self._chunk(int(kind), rows.ctypes.data, quants.ctypes.data, 0, *rows.shape, data)
        if done != quants.nbytes:
            raise EnvironmentFailure(
                f"llama.cpp's library made {done} bytes of {kind.name} where the format has {quants.nbytes}",
                remedy="pip install -U 'lrconvert[llama]'",
            )
        return quants


def _function(library: LlamaLibrary, name: str, result: Any, *arguments: Any) -> Any:
    """A function of the library. Calls release the GIL; its types are ours alone, whoever else uses the library."""
    try:
        found = getattr(load(library), name)
    except AttributeError as error:
        raise EnvironmentFailure(f"{library.name} has no {name}", remedy="pip install -U 'lrconvert[llama]'") from error
    address = ctypes.cast(found, ctypes.c_void_p).value or 0
    return ctypes.CFUNCTYPE(result, *arguments)(address)
