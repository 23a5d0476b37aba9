# SPDX-License-Identifier: Apache-2.0
"""Importance matrices: how much each input column of a weight matters, measured by llama.cpp's `llama-imatrix`.

The GGUF form is read: for each weight `<name>.in_sum2`, the sums of squares of its inputs, and `<name>.counts`, over
how many inputs they go. Of a layer's experts each has a row of sums and a count of its own. What a scheme is given is
their mean, as `llama-quantize` computes it (llama.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp), and
1 for every column of an expert that no input reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGMLQuantizationType

from lrconvert.checkpoint.gguf_header import GgufHeader, GgufTensor, read_header
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import InputError, UsageError
from lrconvert.families.reading import MAX_EXPERTS
from lrconvert.targets.gguf.schemes import Scheme, needs_matrix

MAX_BYTES = 2**29  # those of models with 70 billion weights take 30 MB, that of Qwen3-235B-A22B's experts 470 MB
_SUMS, _COUNTS = ".in_sum2", ".counts"
_EMBEDDING = "token_embd.weight"
_SHOWN = 8  # problems in one message


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix, read and checked."""

    path: Path
    sha256: str
    datasets: tuple[str, ...]  # as its maker named them: file names, perhaps paths
    chunks: int  # of text that it was measured on
    chunk_tokens: int
    means: Mapping[str, np.ndarray[Any, Any]] = field(repr=False)  # by weight: float32 [1 or experts, columns]
    unused: int = 0  # experts that no input reached, in all layers

    @classmethod
    def load(cls, path: Path) -> Imatrix:
        """Read a whole matrix. Raises `InputError` that lists what is wrong with it."""
        header = _read_header(path)
        means, problems, unused = _read_means(header)
        if problems:
            shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
            raise InputError.collect(path, shown)
        datasets = header.array("imatrix.datasets") or []
        return cls(
            path=path,
            sha256=sha256_of(path),
            datasets=tuple(str(name) for name in datasets),
            chunks=_count(header, "imatrix.chunk_count"),
            chunk_tokens=_count(header, "imatrix.chunk_size"),
            means=means,
            unused=unused,
        )

    def weights(self, name: str, columns: int, expert: int = 0, experts: int = 1) -> np.ndarray[Any, Any] | None:
        """A number for each column of a tensor, or of one of the `experts` in it; float32, None where the matrix does
        not have the tensor.

        Raises `InputError` where it has another number of columns or experts; of the embedding it is then not used.
        """
        mean = self.means.get(name)
        if mean is None or mean.shape == (experts, columns):
            return None if mean is None else mean[expert]
        if name == _EMBEDDING:
            return None
        found, wanted = (
            f"{n} experts of {width}" if n > 1 else f"{width}" for n, width in (mean.shape, (experts, columns))
        )
        raise InputError(
            f"{self.path}: has {found} columns for {name}; the model has {wanted}",
            remedy="Give the matrix that was made for this model",
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says about it."""
        return {
            "sha256": self.sha256,
            "datasets": list(self.datasets),
            "chunks": self.chunks,
            "chunk_tokens": self.chunk_tokens,
            "weights": len(self.means),
            **({"unused_experts": self.unused} if self.unused else {}),
        }


def check_matrix(
    scheme: Scheme, tensors: Mapping[str, tuple[GGMLQuantizationType, tuple[int, ...]]], matrix: Imatrix | None
) -> None:
    """Before anything is written: whether the matrix serves these tensors (types and shapes, by GGUF name).

    Raises `UsageError` where the scheme needs a matrix and there is none, and `InputError` where it lacks a tensor
    that can't do without, has other columns than the model, or none of its tensors.
    """
    needing = [name for name, (kind, _) in tensors.items() if needs_matrix(scheme, name, kind)]
    if matrix is None:
        if needing:
            name, kind = needing[0], tensors[needing[0]][0].name
            raise UsageError(
                f"{scheme.name} needs an importance matrix: {name} becomes {kind}, which is noise without one",
                remedy="Give one with --imatrix FILE (llama.cpp's llama-imatrix makes it)",
            )
        return
    experts = {name: shape[0] if len(shape) == 3 else 1 for name, (_, shape) in tensors.items()}
    found = {
        name
        for name, (_, shape) in tensors.items()
        if matrix.weights(name, shape[-1], experts=experts[name]) is not None
    }
    if not found:
        raise InputError(
            f"{matrix.path}: has none of the model's tensors", remedy="Give the matrix that was made for this model"
        )
    if missing := [name for name in needing if name not in found]:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise InputError(
            f"{matrix.path}: lacks tensors that {scheme.name} needs: {', '.join(missing[:_SHOWN])}{more}",
            remedy="Give a matrix that was made for this model, or choose a scheme of more bits",
        )


# --- reading ---------------------------------------------------------------------------------------------


def _read_header(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error
    if magic != b"GGUF":
        raise InputError(
            f"{path}: not a GGUF file; an importance matrix in the older .dat format is not read",
            remedy=f"`llama-imatrix --in-file {path.name} -o imatrix.gguf` rewrites one",
        )
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes; an importance matrix of at most {MAX_BYTES} is read")
    header = read_header(path)
    if (kind := header.metadata.get("general.type")) != "imatrix":
        found = "missing" if kind is None else repr(kind)
        raise InputError(f"{path}: not an importance matrix: general.type is {found:.40}, not 'imatrix'")
    return header


def _count(header: GgufHeader, key: str) -> int:
    value = header.metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        found = "missing" if value is None else repr(value)
        raise InputError(f"{header.path}: {key} is {found:.40}; a count is needed")
    return value


def _read_means(header: GgufHeader) -> tuple[dict[str, np.ndarray[Any, Any]], list[str], int]:
    """Every weight's means, what is wrong with them, and how many experts no input reached."""
    means: dict[str, np.ndarray[Any, Any]] = {}
    problems: list[str] = []
    unused = 0
    with header.path.open("rb") as file:
        for name, sums, counts in _pairs(header.tensors):
            if sums is None or counts is None:
                problems.append(f"{name} has no {_SUMS[1:] if sums is None else _COUNTS[1:]}")
            elif {sums.type, counts.type} != {GGMLQuantizationType.F32}:
                problems.append(f"{name} is stored as {sums.type.name} and {counts.type.name}; F32 is needed")
            else:
                total, number = _read(file, sums), _read(file, counts)
                if problem := _problem(total, number):
                    problems.append(f"{name} {problem}")
                else:
                    rounded = np.floor(number + np.float32(0.5))[:, None]
                    rows = total.reshape(number.size, -1)
                    means[name] = np.where(rounded > 0, rows / np.maximum(rounded, 1), np.float32(1))
                    unused += int((rounded == 0).sum())
    problems = problems or ([] if means else ["holds no importance matrix: no tensor ends in .in_sum2"])
    return means, problems, unused


def _pairs(tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[str, GgufTensor | None, GgufTensor | None]]:
    names = {name.removesuffix(end): None for name in tensors for end in (_SUMS, _COUNTS) if name.endswith(end)}
    return ((name, tensors.get(name + _SUMS), tensors.get(name + _COUNTS)) for name in names)


def _read(file: BinaryIO, tensor: GgufTensor) -> np.ndarray[Any, Any]:
    file.seek(tensor.offset)
    data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise InputError(f"{tensor.file}: shrank while it was read ({tensor.name})")
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)


def _problem(sums: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> str | None:
    if not 1 <= counts.size <= MAX_EXPERTS or sums.size % counts.size:
        return f"has {sums.size} sums for {counts.size} counts"
    if not np.isfinite(sums).all() or not np.isfinite(counts).all():
        return "holds values that are not finite"
    if (sums < 0).any():
        return "holds negative sums of squares"
    if (counts < 0).any():
        return "holds negative counts"
    if (counts < 0.5).all():
        return "was never measured: its count is 0"
    return None
