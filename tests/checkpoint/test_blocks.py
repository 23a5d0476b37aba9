# SPDX-License-Identifier: Apache-2.0
"""Every checkpoint is read by rows: blocks without gaps, in any order, from any thread, and little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import recipe_for
from gguf import GGMLQuantizationType as Ggml
from safetensors.numpy import load_file, save_file
from support import onnx_files
from support.gguf_files import bake, converter_gguf, model_of
from support.onnx_files import export
from support.pico import write_pico

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Checkpoint, Model, open_model
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.checkpoint.base import TensorInfo, numpy_dtype
from lrconvert.checkpoint.blocks import Block, row_blocks, rows_of
from lrconvert.checkpoint.fold import folded
from lrconvert.parity.mutants import unpermuted_qk
from lrconvert.parity.stored import on_stored_weights
from lrconvert.targets import hf

Pico = Callable[..., Model]
SMALL = 300  # values: a few rows of a pico tensor, and no whole number of heads


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrconvert.checkpoint.blocks.BLOCK_VALUES", SMALL)


def in_bfloat16(folder: Path) -> Model:
    """The model stored as bfloat16: a view's arrays are wider."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return open_model(folder)


def with_adapter(model: Model, folder: Path, **options: Any) -> Model:
    """The model with a LoRA on two layers."""
    modules = {f"model.layers.{layer}.self_attn.q_proj": (64, 64) for layer in (0, 1)}
    adapter = folder if folder.exists() else onnx_files.write_adapter(folder, modules)
    return merged(model, open_adapter(adapter), **options)


def kinds(folder: Path, pico: Pico) -> Iterator[tuple[str, Model]]:
    """A model in every kind of checkpoint, and seen through every view."""
    wide = model_of(pico, "llama")
    base = in_bfloat16(write_pico(folder / "base", shards=3))
    yield "folder", base
    for kind in (Ggml.F16, Ggml.Q8_0):
        (folder / kind.name).mkdir()
        yield f"gguf {kind.name}", open_model(converter_gguf(folder / kind.name / "m.gguf", wide, kind=kind))
    parts = converter_gguf(folder / "parts.gguf", model_of(pico, "phi3"), split_every=5)
    yield "gguf in parts", open_model(parts)
    for dtype in ("f16", "int8", "int4"):
        path = export(wide, recipe_for(wide), folder / dtype, dtype=dtype)
        yield f"onnx {dtype}", open_model(path)
        yield f"stored weights {dtype}", on_stored_weights(wide, open_model(path).checkpoint)
    for rounded in (True, False):
        adapted = with_adapter(base, folder / "adapter", rounded=rounded)
        yield f"adapter, rounded={rounded}", adapted
        yield f"fold, rounded={rounded}", folded(base, 0.7, rounded=rounded)
        yield f"fold of an adapter, rounded={rounded}", folded(adapted, 0.7, rounded=rounded)
    yield "adapter on a gguf", with_adapter(open_model(folder / "Q8_0" / "m.gguf"), folder / "adapter")
    yield "mutant", unpermuted_qk(base)


def test_blocks_make_up_every_tensor(tmp_path: Path, pico: Pico, small_blocks: None) -> None:
    """Without gaps, in the order of rows, each with its rows of `read`; the last one first, from several threads."""
    seen = []
    for kind, model in kinds(tmp_path, pico):
        checkpoint = model.checkpoint
        several = 0
        for name, info in checkpoint.tensors.items():
            whole, blocks = checkpoint.read(name), list(checkpoint.blocks(name))
            assert whole.shape == info.shape, (kind, name)
            stops = [0, *(block.stop for block in blocks)]
            assert [block.start for block in blocks] == stops[:-1] and stops[-1] == info.shape[0], (kind, name)
            with ThreadPoolExecutor(4) as pool:
                arrays = list(pool.map(lambda block: block.read(), reversed(blocks)))[::-1]
            for block, array in zip(blocks, arrays, strict=True):
                assert array.dtype == whole.dtype and len(array) == block.rows, (kind, name)
                assert array.tobytes() == whole[block.start : block.stop].tobytes(), (kind, name)
                assert block.read().tobytes() == array.tobytes(), (kind, name)
            several += len(blocks) > 1
            assert len(info.shape) > 1 or len(blocks) == 1, (kind, name)
        assert several > 3, kind
        seen.append(kind)
    assert len(seen) == 18


def test_the_size_of_blocks_changes_nothing(tmp_path: Path, pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is the same to the last bit, of one row at a time too."""
    models = dict(kinds(tmp_path, pico))
    name = "model.layers.1.self_attn.q_proj.weight"
    for kind, model in models.items():
        name = next(tensor.name for tensor in model.roles.values() if tensor.role in ("q", "qkv") and tensor.layer)
        read = model.checkpoint.read
        whole = read(name)
        for values in (1, SMALL):
            monkeypatch.setattr("lrconvert.checkpoint.blocks.BLOCK_VALUES", values)
            assert read(name).tobytes() == whole.tobytes(), (kind, values)
        monkeypatch.undo()


def test_dtypes_of_views(tmp_path: Path, small_blocks: None) -> None:
    """A view that rounds gives the stored dtype; one that does not is wider where it changes something."""
    base = in_bfloat16(write_pico(tmp_path / "base"))
    touched, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    stored = numpy_dtype("BF16")
    found = {}
    for rounded in (True, False):
        adapted = with_adapter(base, tmp_path / "adapter", rounded=rounded)
        for kind, model in {"adapter": adapted, "fold": folded(base, 0.7, rounded=rounded)}.items():
            assert next(model.checkpoint.blocks(other)).read().dtype == stored
            found[kind, rounded] = next(model.checkpoint.blocks(touched)).read().dtype
    both = folded(with_adapter(base, tmp_path / "adapter", rounded=False), 0.7, rounded=True)
    assert next(both.checkpoint.blocks(touched)).read().dtype == stored
    assert found == {
        ("adapter", True): stored,
        ("adapter", False): np.float32,
        ("fold", True): stored,
        ("fold", False): np.float64,
    }


def test_a_large_tensor_is_never_held_whole(tmp_path: Path) -> None:
    """Blocks of a 16 MB embedding, through a GGUF with interleaved rows, an adapter and a fold: a few MB each."""
    base = open_model(write_pico(tmp_path / "base", hidden_size=2048, num_hidden_layers=1, head_dim=512, vocab_size=8))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert base.checkpoint.tensors[name].nbytes == 2**24
    adapter = onnx_files.write_adapter(tmp_path / "adapter", {name.removesuffix(".weight"): (2048, 2048)})
    file = open_model(bake(base, recipe_for(base, even=True), tmp_path / "m.gguf", type="q8_0"))
    models = {"folder": base, "gguf": file}
    models |= {f"{kind}, adapted and folded": folded(merged(model, open_adapter(adapter)), 0.7, rounded=False)
               for kind, model in models.items()}  # fmt: skip
    for kind, model in models.items():
        tracemalloc.start()
        try:
            total = sum(float(np.abs(block.read()).sum()) for block in model.checkpoint.blocks(name))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert total > 0
        assert peak < 8 * 2**20, (kind, peak)


def test_files_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view reads through its base: each shard's header is read by one."""
    from lrconvert.checkpoint import tensor_file

    opened = []
    header = tensor_file._checked_header
    monkeypatch.setattr(tensor_file, "_checked_header", lambda path: (opened.append(path.name), header(path))[1])
    model = folded(with_adapter(open_model(write_pico(tmp_path / "base", shards=3)), tmp_path / "adapter"), 0.7)
    bake_plan(hf.plan(model, recipe_for(model), tmp_path / "out", hf.Options(dtype="bf16")))
    assert sorted(opened) == sorted({*opened}) and len(opened) == 4


def test_blocks_of_odd_shapes() -> None:
    """A vector is one block whatever its length, a scalar one row; no tensor has no block; a wide row is a block."""
    assert list(row_blocks((2**30,))) == [(0, 2**30)]
    assert list(row_blocks(())) == [(0, 1)]
    assert list(row_blocks((0, 5))) == [(0, 0)]
    assert list(row_blocks((2, 2**20))) == [(0, 1), (1, 2)]
    assert list(row_blocks((3, 2**9, 2**9))) == [(0, 1), (1, 2), (2, 3)]
    assert list(row_blocks((5, 2**17))) == [(0, 2), (2, 4), (4, 5)]
    values = np.arange(10).reshape(5, 2)
    blocks = [Block(start, stop, lambda a=start, b=stop: values[a:b]) for start, stop in ((0, 2), (2, 4), (4, 5))]
    for start in range(5):
        for stop in range(start + 1, 6):
            np.testing.assert_array_equal(rows_of(blocks, start, stop), values[start:stop])


class Memory(Checkpoint):
    """A checkpoint of arrays: what somebody who adds a format has to write."""

    format = "memory"

    def __init__(self, model: Model) -> None:
        self.path, self.config = model.checkpoint.path, model.checkpoint.config
        self._arrays = {tensor.name: model.checkpoint.read(tensor.name) for tensor in model.roles.values()}
        self.tensors = {n: TensorInfo(n, "F32", a.shape, self.path, a.nbytes) for n, a in self._arrays.items()}

    def blocks(self, name: str) -> Iterator[Block]:
        array = self._arrays[name]
        step = 1 if array.ndim > 1 else len(array)
        return (Block(i, i + step, lambda i=i: array[i : i + step]) for i in range(0, len(array), step))

    def weight_files(self) -> list[Path]:
        return []

    def side_files(self) -> dict[str, Path | bytes]:
        return {}


def test_a_checkpoint_with_nothing_but_blocks_becomes_everything(tmp_path: Path, pico: Pico) -> None:
    """All three targets write what they write from a folder; the weights differ in nothing."""
    model = model_of(pico, "llama")
    new = replace(model, checkpoint=Memory(model))
    recipe = recipe_for(model, even=True)
    for kind in ("q8_0", "f32"):
        files = []
        for name, source in {"a": model, "b": new}.items():
            (tmp_path / f"{kind}-{name}").mkdir()
            files.append(bake(source, recipe, tmp_path / f"{kind}-{name}" / "m.gguf", type=kind).read_bytes())
        assert files[0] == files[1]
    for dtype in ("f32", "int4"):
        for name, source in {"a": model, "b": new}.items():
            export(source, recipe, tmp_path / f"onnx-{dtype}-{name}", dtype=dtype)
        data = [(tmp_path / f"onnx-{dtype}-{name}" / onnx_files.DATA).read_bytes() for name in "ab"]
        assert data[0] == data[1]
    for dtype in (None, "bf16"):
        out = tmp_path / f"hf-{dtype}"
        bake_plan(hf.plan(new, recipe, out, hf.Options(dtype=dtype)))
        stored = numpy_dtype("BF16" if dtype else "F32")
        for tensor in model.roles.values():
            wanted = model.checkpoint.read(tensor.name).astype(stored)
            assert open_model(out).checkpoint.read(tensor.name).tobytes() == wanted.tobytes(), tensor.name
