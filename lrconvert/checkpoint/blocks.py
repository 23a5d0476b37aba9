# SPDX-License-Identifier: Apache-2.0
"""A tensor of any checkpoint in blocks of rows, each a function that some thread may call, in the dtype asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.checkpoint.adapter import Part, row_blocks
from lrconvert.checkpoint.base import Checkpoint, CheckpointView, numpy_dtype
from lrconvert.checkpoint.tensor_file import TensorFile
from lrconvert.errors import InputError, UnsupportedError


class BlockReader:
    """Reads blocks of rows: from the file where it holds them as they are, else through the view that changes them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[Path, TensorFile] = {}

    def parts(self, name: str, shape: tuple[int, ...]) -> list[Part]:
        """The blocks of a tensor in order, as the checkpoint stores them or wider (what a view has changed)."""
        source = self.checkpoint
        if isinstance(source, CheckpointView):
            if name in source.touched:
                return list(source.parts(name))
            source = source.base
        if source.format != "safetensors":
            return [partial(source.read, name)]
        path = source.tensors[name].file
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return [partial(self._files[path].rows, name, start, stop) for start, stop in row_blocks(shape)]


def cast_block(values: np.ndarray[Any, Any], dtype: str, name: str, source: Path) -> np.ndarray[Any, Any]:
    """A block in another dtype (safetensors name). What float16 can't hold is an error: `InputError` for values that
    are not finite, `UnsupportedError` for those beyond its range."""
    with np.errstate(over="ignore"):
        cast = values.astype(numpy_dtype(dtype), copy=False)
    if dtype == "F16" and values.dtype != cast.dtype and not np.isfinite(cast).all():
        if not np.isfinite(values.astype(np.float32)).all():
            raise InputError(f"{source}: {name} holds values that are not finite")
        raise UnsupportedError(f"{name} holds values beyond float16's range", remedy="Use --dtype bf16 or f32")
    return np.ascontiguousarray(cast)
