# SPDX-License-Identifier: Apache-2.0
"""A folder of plain weights from a quantised model, its rotation untouched: for programs that lack the quantiser."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

from lrconvert.artifact.prefetch import prefetch
from lrconvert.checkpoint import Model
from lrconvert.machine import check_disk
from lrconvert.targets.hf.config import TORCH_NAMES, json_bytes
from lrconvert.targets.hf.shards import plan_shards
from lrconvert.targets.hf.weights import lay_out, stream


def write_plain(model: Model, folder: Path) -> None:
    """The model's config, tokenizer and weights, the latter in the dtype that `hf` writes them in. `folder` exists."""
    checkpoint = model.checkpoint
    dtype = checkpoint.dense_dtype or model.dtype
    _, shards, texts = lay_out(model, dtype, plan_shards)
    nbytes = sum(tensor.nbytes for _, tensors in shards for tensor in tensors)
    check_disk(folder, nbytes, f"{model.reference} with plain weights", remedy="Make room, or name another TMPDIR")
    config = {**checkpoint.config, "torch_dtype": TORCH_NAMES[dtype], "tie_word_embeddings": model.shape.tied}
    for key in ("dtype", "auto_map"):  # the code that auto_map names does not come along
        config.pop(key, None)
    for name, content in {**checkpoint.side_files(), **texts, "config.json": json_bytes(config, "config.json")}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)
    for name, tensors in shards:
        planned = stream(checkpoint, name, tensors)
        jobs = (job for tensor in planned.tensors for job in tensor.jobs())
        with (folder / name).open("wb") as file, closing(prefetch(jobs)) as blocks:
            file.write(planned.header)
            file.writelines(blocks)
