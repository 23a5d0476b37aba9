# SPDX-License-Identifier: Apache-2.0
"""GGUF files for tests: baked from pico models, and written again with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGUFValueType

from lrconvert.checkpoint.gguf_header import read_header
from lrconvert.targets.gguf.layout import Planned, Raw, header_of, padding

Tensors = dict[str, tuple[GGMLQuantizationType, tuple[int, ...], bytes]]  # type, shape in NumPy's order, data
WINDOW = 256  # llama.cpp makes contexts in steps of this: a boundary below it is none


def contents(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Metadata (values as they stand in the file) and tensors of a GGUF."""
    header = read_header(path)
    metadata: dict[str, Any] = {key: Raw(header.raw(key)) for key in header.metadata}
    data = path.read_bytes()
    return metadata, {t.name: (t.type, t.shape, data[t.offset : t.offset + t.nbytes]) for t in header.tensors.values()}


def write_gguf(path: Path, metadata: dict[str, Any], tensors: Tensors) -> Path:
    """A file of these parts."""
    planned = [Planned(name, kind, shape) for name, (kind, shape, _) in tensors.items()]
    body = b"".join(data + bytes(padding(len(data))) for _, _, data in tensors.values())
    path.write_bytes(header_of(metadata, planned) + body)
    return path


def changed(source: Path, output: Path, change: Callable[[dict[str, Any], Tensors], None]) -> Path:
    """The file written again, after `change` has worked on its metadata and tensors."""
    metadata, tensors = contents(source)
    change(metadata, tensors)
    return write_gguf(output, metadata, tensors)


def f32(values: Any) -> tuple[GGMLQuantizationType, tuple[int, ...], bytes]:
    """A float32 tensor."""
    array = np.asarray(values, np.float32)
    return GGMLQuantizationType.F32, array.shape, array.tobytes()


__all__ = ["WINDOW", "GGUFValueType", "changed", "contents", "f32", "write_gguf"]
