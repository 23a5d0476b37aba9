# SPDX-License-Identifier: Apache-2.0
"""ONNX folders, read back: ours as checkpoints, and those of other exporters by their numbers.

Does another exporter's graph scale, and does it switch? Exporters write a rotation in many ways, but all of them store
its frequencies: as a vector, as its reciprocal, or as a table of cos and sin whose second row has them. So every
constant of the graph, in branches and functions too, is compared with the frequencies of plain RoPE and of each tier in
config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.artifact.target import Foreign
from lrconvert.checkpoint import read_json
from lrconvert.checkpoint.folder import CONFIG
from lrconvert.checkpoint.onnx_folder import GRAPH, OnnxCheckpoint, is_own, load_graph
from lrconvert.checkpoint.rope_config import read_rope
from lrconvert.families import get_family, read_shape
from lrconvert.rope import Tier, inverse_frequencies

PLACES = ("onnx/model.onnx", "model.onnx", "onnx/decoder_model_merged.onnx", "decoder_model_merged.onnx",
          "decoder_model.onnx")  # fmt: skip
# float16 tables hold a frequency to about 1e-3 of itself; sets that differ do so by more somewhere.
SAME = 5e-3
MOST_ROWS = 2  # of a table that are read
PLAIN = "plain RoPE"


@dataclass(frozen=True)
class FoundRotations:
    """What a graph holds. `names`: which of the known rotations; `factors`: attention factors of its tables."""

    names: tuple[str, ...]
    factors: tuple[float, ...]


def recognises(path: Path) -> bool:
    """A folder with one of our graphs, and no checkpoint beside it."""
    return (path / GRAPH).is_file() and not any(path.glob("*.safetensors"))


def open_artifact(path: Path) -> OnnxCheckpoint:
    """The graph and its data files."""
    return OnnxCheckpoint(path)


def explain(checkpoint: OnnxCheckpoint) -> list[str]:
    """What our own graph does."""
    angles = "float64" if checkpoint.double else "float32 tables"
    return [f"a function in the graph, angles in {angles}, {checkpoint.attention} attention"]


def foreign(folder: Path) -> Foreign | None:
    """A folder with a graph of another exporter; None for anything else."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    if not any(path.is_file() for path in [*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")]):
        return None
    if is_own(folder):
        return None
    path = graph_in(folder)
    if path is None:
        return Foreign(None, None, ["several graphs, and none with a name that exporters give to a decoder"])
    name = path.relative_to(folder).as_posix()
    if not (folder / CONFIG).is_file():
        return Foreign(None, name, ["no config.json beside it, so what it should compute is unknown"])
    config = read_json(folder / CONFIG)
    family = get_family(config.get("model_type"))
    shape = read_shape(config, family)
    found = read_rope(config, shape)
    rotations = find_rotations(path, shape.theta, found.tiers)
    return Foreign(family.name, name, verdict(rotations, found.tiers, scaled=found.scaled))


def graph_in(folder: Path) -> Path | None:
    """The graph of a folder that an exporter wrote, or None."""
    known = [folder / place for place in PLACES if (folder / place).is_file()]
    if known:
        return known[0]
    found = sorted(path for path in [*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")] if path.is_file())
    return found[0] if len(found) == 1 else None


def find_rotations(path: Path, theta: float, tiers: tuple[Tier, ...]) -> FoundRotations:
    """Which of plain RoPE and the tiers a graph has the frequencies of. A tier of ones is plain RoPE."""
    plain = inverse_frequencies(2 * len(tiers[0].factors), theta)
    wanted = {PLAIN: plain, **{f"the set up to {t.max_length}": plain / np.asarray(t.factors) for t in tiers}}
    names: list[str] = []
    factors: list[float] = []
    for array in _constants(load_graph(path), path.parent, len(plain)):
        if array.ndim == 2 and len(array) == MOST_ROWS:
            first, second = array
            if np.allclose(first, first[0], rtol=1e-3) and first[0] > 0.1:
                factors.append(float(first[0]))  # cos 0, times the attention factor
                continue
            if np.any(first != 0):
                continue
            # sin of one step; the attention factor that it carries is that of a table of cos beside it.
            candidates = [np.arcsin(np.clip(second / factor, -1, 1)) for factor in (*factors[-1:], 1.0)]
        else:
            vector = array.reshape(-1)
            with np.errstate(divide="ignore"):
                candidates = [vector, 1 / vector]
        names += [name for name, right in wanted.items() if any(_same(right, found) for found in candidates)]
    return FoundRotations(tuple(dict.fromkeys(names)), tuple(dict.fromkeys(round(factor, 5) for factor in factors)))


def verdict(found: FoundRotations, tiers: tuple[Tier, ...], *, scaled: bool) -> list[str]:
    """In words. `scaled`: config.json asks for a scaled rotation."""
    sets = [f"the set up to {tier.max_length}" for tier in tiers]
    present = [name for name in sets if name in found.names]
    unscaled = PLAIN in found.names
    if not found.names:
        return ["no known rotation was found among the graph's constants, so what it computes isn't known"]
    if not scaled:
        return ["plain RoPE, as config.json says" if unscaled else f"it rotates with {', '.join(found.names)}"]
    if not present:
        return ["unscaled: the graph rotates with plain RoPE, regardless of config.json"]
    # A short set of ones is plain RoPE: its presence says nothing about scaling.
    if len(sets) > 1 and sets[-1] not in present:
        also = " (which is plain RoPE)" if set(tiers[0].factors) == {1.0} else ""
        return [f"frozen: {present[0]}{also} is baked in for every length; sequences beyond it are wrong"]
    if len(present) < len(sets):
        return [f"frozen: {present[0]} is baked in for every length; {', '.join(set(sets) - set(present))} is missing"]
    lines = [f"the graph has {' and '.join(present)}, so it may switch between them"]
    wanted = {round(tier.attention_factor, 5) for tier in tiers}
    if odd := [factor for factor in found.factors if all(abs(factor - right) > 1e-3 for right in wanted)]:
        expected = ", ".join(f"{value:g}" for value in sorted(wanted))
        lines.append(f"its tables carry an attention factor of {odd[0]:g}; config.json asks for {expected}")
    return lines


def _same(right: np.ndarray, found: np.ndarray) -> bool:
    return found.shape == right.shape and bool(np.all(np.abs(found - right) <= SAME * right))


def _constants(model: Any, folder: Path, half: int) -> Iterator[np.ndarray]:
    """Every constant with `half` values, and the first rows of every table of so many columns; float64."""
    for tensor in _tensors(model):
        dims = list(tensor.dims)
        count = int(np.prod(dims, dtype=np.int64)) if dims else 1
        is_table = len(dims) == 2 and dims[1] == half and dims[0] >= MOST_ROWS
        if tensor.data_type not in (1, 10, 11) or not (count == half or is_table):
            continue
        array = _read(tensor, folder, min(count, MOST_ROWS * half))
        if array is not None and np.isfinite(array).all():
            yield array.reshape(MOST_ROWS, half) if is_table else array


def _tensors(model: Any) -> Iterator[Any]:
    functions = [node for function in model.functions for node in function.node]
    yield from _of_graph(model.graph)
    for node in functions:
        yield from _of_node(node)


def _of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            yield from _of_graph(graph)


def _read(tensor: Any, folder: Path, count: int) -> np.ndarray | None:
    """The first values of a tensor; None where they lie outside of the folder, or not at all."""
    dtype: np.dtype[Any] = np.dtype({1: np.float32, 10: np.float16, 11: np.float64}[tensor.data_type])
    if tensor.data_location != 1:
        from onnx import numpy_helper

        try:
            return numpy_helper.to_array(tensor).reshape(-1)[:count].astype(np.float64)
        except (ValueError, TypeError):
            return None
    place: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / place.get("location", "")
    if Path(place.get("location", "")).name != place.get("location"):
        return None
    try:
        if not file.is_file():
            return None
        values = np.fromfile(file, dtype, count, offset=int(place.get("offset", 0)))
    except (OSError, ValueError):
        return None
    return values.astype(np.float64) if len(values) == count else None
