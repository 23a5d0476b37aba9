# SPDX-License-Identifier: Apache-2.0
"""GGUF files for tests: written as other converters do, baked from pico models, and written again with one thing
changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.gguf_header import read_header
from lrconvert.families.base import GGUF_INTERLEAVED
from lrconvert.recipe import Recipe
from lrconvert.targets import gguf as target
from lrconvert.targets.gguf.layout import Planned, Raw, header_of, padding

Tensors = dict[str, tuple[GGMLQuantizationType, tuple[int, ...], bytes]]  # type, shape in NumPy's order, data
Change = Callable[[dict[str, Any], Tensors], None]
Edit = Callable[[gguf.GGUFWriter], None]
WINDOW = 256  # llama.cpp makes contexts in steps of this: a boundary below it is none
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # K-quants make blocks of 256
SHORT, LONG, STATIC = "rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"


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


def changed(source: Path, output: Path, change: Change) -> Path:
    """The file written again, after `change` has worked on its metadata and tensors."""
    metadata, tensors = contents(source)
    change(metadata, tensors)
    return write_gguf(output, metadata, tensors)


def fields(path: Path) -> dict[str, tuple[str, Any]]:
    """Every key with its type (an array's with that of its items) and its value, as gguf-py reads them."""
    return {
        name: (" ".join(kind.name for kind in field.types), field.contents())
        for name, field in gguf.GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Type and float32 values of every tensor, as gguf-py reads and dequantises them."""
    found = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type)) for t in found}


def as_f32(values: Any) -> np.ndarray[Any, Any]:
    return np.asarray(values, np.float32)


def f32(values: Any) -> tuple[GGMLQuantizationType, tuple[int, ...], bytes]:
    """A float32 tensor."""
    array = as_f32(values)
    return GGMLQuantizationType.F32, array.shape, array.tobytes()


def model_of(pico: Callable[..., Model], family: str, **more: Any) -> Model:
    """A pico model whose boundary llama.cpp can see."""
    extra = {"original_max_position_embeddings": WINDOW} if family == "phi3" else {}
    return pico(family, max_position_embeddings=WINDOW, **extra, **more)


def bake(model: Model, recipe: Recipe, output: Path, **options: Any) -> Path:
    """The file to open: the first part of a split one. Options as `target.Options` has them."""
    planned = target.plan(model, recipe, output, target.Options(**options))
    bake_plan(planned)
    return output.parent / planned.names[0]


def command(model: Path, recipe: Path, output: Path, *more: object) -> tuple[object, ...]:
    """Arguments of `lrconvert gguf`."""
    return ("gguf", model, "--recipe", recipe, "-o", output, *more)


def interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of q and k rows."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def converter_gguf(
    path: Path,
    model: Model,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    edit: Edit | None = None,
    split_every: int = 0,
    drop: tuple[str, ...] = (),
) -> Path:
    """The model as llama.cpp's converter writes it, by gguf-py: the family's own architecture, no factors.

    The file to open: the first of the parts with `split_every` tensors each. `drop`: names of what is left out.
    """
    family, shape = model.family, model.shape
    a = family.gguf_architecture
    writer = gguf.GGUFWriter(path, a, split_max_tensors=split_every)
    rows = {row.role: row for row in family.rows}
    numbers: Mapping[str, int] = {
        "block_count": shape.layers,
        "context_length": shape.window,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "rope.dimension_count": shape.rotary_dim,
        "vocab_size": shape.vocab,
    }
    if shape.experts is not None:
        writer.add_expert_count(shape.experts.count)
        writer.add_expert_used_count(shape.experts.used)
        writer.add_expert_feed_forward_length(shape.experts.ffn)
    for key, value in numbers.items():
        writer.add_uint32(f"{a}.{key}", value)
    writer.add_float32(f"{a}.attention.layer_norm_rms_epsilon", shape.norm_eps)
    writer.add_float32(f"{a}.rope.freq_base", shape.theta)
    writer.add_name("converter")
    writer.add_tokenizer_model("none")
    if edit:
        edit(writer)
    for tensor in model.roles.values():
        role = tensor.role
        name = rows[role].gguf.replace("{layer}", str(tensor.layer))
        values = model.checkpoint.read(tensor.name).astype(np.float32)
        if tensor.expert:
            continue
        if tensor.expert is not None:
            parts = [t for t in model.roles.values() if (t.role, t.layer) == (role, tensor.layer)]
            values = np.stack([model.checkpoint.read(part.name).astype(np.float32) for part in parts])
        if a in GGUF_INTERLEAVED and role in ("q", "k", "q_bias", "k_bias"):
            values = np.ascontiguousarray(interleaved(values, shape.heads if role[0] == "q" else shape.kv_heads))
        if name in drop:
            continue
        if values.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        elif kind == GGMLQuantizationType.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))[0] if split_every else path


def write_matrix(
    path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], *, kind: str = "imatrix", without: str = ""
) -> Path:
    """An importance matrix as llama-imatrix writes it, of the tensors `<name>.in_sum2` and `<name>.counts`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()  # llama-imatrix writes no architecture
    values: dict[str, Callable[[str], None]] = {
        "general.type": lambda key: writer.add_string(key, kind),
        "imatrix.datasets": lambda key: writer.add_array(key, ["wiki.txt", "code.txt"]),
        "imatrix.chunk_count": lambda key: writer.add_uint32(key, 125),
        "imatrix.chunk_size": lambda key: writer.add_uint32(key, 512),
    }
    for key, add in values.items():
        if key != without:
            add(key)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
