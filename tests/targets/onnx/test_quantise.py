# SPDX-License-Identifier: Apache-2.0
"""Quantised weights are those of ONNX Runtime's own quantiser, byte for byte, and read back as it dequantises them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import recipe_for
from onnx import TensorProto, helper, numpy_helper
from support.onnx_files import Array, export, graph_of

from lrconvert.api.baking import plan_bake
from lrconvert.checkpoint import Model, blocks, open_model
from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint
from lrconvert.targets import onnx as target
from lrconvert.targets.onnx import tensors
from lrconvert.targets.onnx.nodes import ACCURACY, Nodes
from lrconvert.targets.onnx.tensors import ALIGNMENT, BLOCK, quantise

SHAPES = [(64, 64), (96, 64), (7, 33), (5, 1), (101, 200), (1, 32)]


def by_onnxruntime(values: Array, bits: int) -> dict[str, Array]:
    """What MatMulNBitsQuantizer makes of a product with `values` [out, in]: its initializers, in order."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    rows, columns = values.shape
    weight = numpy_helper.from_array(np.ascontiguousarray(values.T), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=bits)
    quantiser = MatMulNBitsQuantizer(model, bits=bits, block_size=BLOCK, is_symmetric=True, algo_config=config)
    quantiser.process()
    made = quantiser.model.model.graph  # type: ignore[union-attr]
    (node,) = made.node
    assert node.op_type == "MatMulNBits"
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.initializer}
    assert len(node.input) == 3, "symmetric: no zero points"
    return {name: found[name] for name in node.input[1:]}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_onnx_runtimes_quantiser(shape: tuple[int, int], bits: int) -> None:
    """Packed values and scales, for whole and broken blocks of 32, for zeros and for large numbers."""
    rng = np.random.default_rng(shape[0] * bits)
    values = rng.standard_normal(shape).astype(np.float32)
    values[0, : shape[1] // 2] = 0
    values[-1] *= 1e4
    packed, scales = by_onnxruntime(values, bits).values()
    ours, our_scales = quantise(values, bits, BLOCK)
    np.testing.assert_array_equal(ours.reshape(-1), packed.reshape(-1))
    np.testing.assert_array_equal(our_scales.reshape(-1), scales.reshape(-1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_sources_are_widened_first(dtype: str) -> None:
    """A float16 or bfloat16 source gives the bytes of its float32 values."""
    import ml_dtypes

    kind = np.dtype(np.float16) if dtype == "float16" else np.dtype(ml_dtypes.bfloat16)
    values = np.random.default_rng(1).standard_normal((64, 96)).astype(kind)
    for bits in (4, 8):
        for ours, wide in zip(
            quantise(values, bits, BLOCK), quantise(values.astype(np.float32), bits, BLOCK), strict=True
        ):
            np.testing.assert_array_equal(ours, wide)


def matmul(packed: Array, scales: Array, columns: int, bits: int, level: int) -> Array:
    """The weight [out, in] that MatMulNBits multiplies with: its product with the identity."""
    rows = len(packed)
    initializers = [numpy_helper.from_array(packed, "packed"), numpy_helper.from_array(scales, "scales")]
    node = helper.make_node(
        "MatMulNBits", ["x", "packed", "scales"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=bits,
        block_size=BLOCK, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0]).T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (7, 40), (101, 200)])
def test_a_folder_read_back_has_the_weights_that_onnx_runtime_multiplies_with(
    shape: tuple[int, int], bits: int, tmp_path: Path
) -> None:
    """Our dequantisation, the judge's view of the weights, is the operator's: exact in float32 products."""
    values = np.random.default_rng(bits).standard_normal(shape).astype(np.float32)
    packed, scales = quantise(values, bits, BLOCK)
    signed = packed
    if bits == 4:
        signed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], BLOCK)
    ours = ((signed.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]).reshape(len(values), -1)[:, : shape[1]]
    np.testing.assert_allclose(matmul(packed, scales, shape[1], bits, 1), ours, rtol=1e-6, atol=1e-7)
    assert np.linalg.norm(ours - values) / np.linalg.norm(values) < (0.2 if bits == 4 else 0.02)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_what_is_quantised_and_what_is_not(pico: Callable[..., Model], tmp_path: Path, family: str, dtype: str) -> None:
    """Every product is a MatMulNBits; the head always has 8 bits and so has the embedding, once for both where they
    are tied; norms and biases stay float32, and the rotary function is the one of a float32 export."""
    model = pico(family)
    folder = export(model, recipe_for(model, tiers=3, start_tokens=12), tmp_path / "a", dtype=dtype)
    plain = export(model, recipe_for(model, tiers=3, start_tokens=12), tmp_path / "b")
    checkpoint = OnnxCheckpoint(folder)
    bits = 8 if dtype == "int8" else 4
    for tensor in model.roles.values():
        info = checkpoint.tensors[tensor.name]
        wanted = {"embedding": "INT8", "lm_head": "INT8"}.get(
            tensor.role, f"INT{bits}" if len(tensor.shape) == 2 else "F32"
        )
        assert (info.dtype, info.shape) == (wanted, tensor.shape), tensor.name
        values, source = checkpoint.read(tensor.name), model.checkpoint.read(tensor.name)
        if wanted.startswith("INT"):
            packed, scales = quantise(source, int(wanted[3:]), BLOCK)
            np.testing.assert_array_equal(checkpoint._raw(f"{tensor.name}.packed", 0, len(packed)), packed)
            stored = checkpoint._raw(f"{tensor.name}.scales", 0, len(scales))
            np.testing.assert_array_equal(stored, scales.astype(np.float16))
        else:
            np.testing.assert_array_equal(values, source.astype(values.dtype))
    assert ("lm_head.weight" in checkpoint.tensors) != model.shape.tied
    narrow, wide = graph_of(folder), graph_of(plain)
    assert narrow.functions[0] == wide.functions[0]
    assert [n for n in narrow.graph.node if n.domain == "lrconvert"] == [
        n for n in wide.graph.node if n.domain == "lrconvert"
    ]
    kinds = [node.op_type for node in narrow.graph.node]
    assert "Gemm" not in kinds and kinds.count("GatherBlockQuantized") == 1
    saved = 0 if family == "phi3" else 2 * model.shape.layers  # q, k and v are one product
    assert kinds.count("MatMulNBits") + saved == [n.op_type for n in wide.graph.node].count("Gemm")
    for node in narrow.graph.node:
        if node.op_type == "MatMulNBits":
            found: dict[str, Any] = {a.name: a.i for a in node.attribute}
            assert found["accuracy_level"] == ACCURACY and found["block_size"] == BLOCK
    assert open_model(folder).family.name == family


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_q_k_and_v_as_one_product_answer_bit_for_bit(
    pico: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Without biases, with them, and with norms of heads; also where activations are rounded to 8 bits."""
    model = pico(family)
    one = export(model, recipe_for(model), tmp_path / "one", dtype="int4")
    monkeypatch.setattr(Nodes, "can_join", lambda self, roles, layer: False)
    three = export(model, recipe_for(model), tmp_path / "three", dtype="int4")
    counts = [[node.op_type for node in graph_of(folder).graph.node].count("MatMulNBits") for folder in (one, three)]
    assert counts[1] - counts[0] == 2 * model.shape.layers
    tokens = np.arange(2 * 40).reshape(2, 40) % model.shape.vocab
    joined, apart = (answered(folder, model, tokens) for folder in (one, three))
    np.testing.assert_array_equal(joined, apart)
    assert np.isfinite(joined).all()


def answered(folder: Path, model: Model, tokens: np.ndarray) -> np.ndarray:
    """Logits of rows of tokens with empty caches."""
    shape = model.shape
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    empty = np.zeros((len(tokens), shape.kv_heads, 0, shape.head_dim), np.float32)
    feed = {value.name: empty for value in session.get_inputs() if value.name.startswith("past")}
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    feed |= {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": positions}
    return np.asarray(session.run(["logits"], feed)[0])


@pytest.mark.parametrize("values", [2**17, 200], ids=["one block", "blocks"])
@pytest.mark.parametrize("quantised", [2**17, 350], ids=["at once", "in pieces"])
def test_blocks_of_rows_do_not_show(
    pico: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int, quantised: int
) -> None:
    """A tensor that is read and quantised a few rows at a time has the bytes of one that is done at once."""
    model = pico("llama")
    recipe = recipe_for(model)
    whole = export(model, recipe, tmp_path / "whole", dtype="int4")
    monkeypatch.setattr(tensors, "QUANTISED_VALUES", quantised)
    monkeypatch.setattr(blocks, "BLOCK_VALUES", values)
    parts = export(model, recipe, tmp_path / "parts", dtype="int4")
    assert (whole / "onnx/model.onnx_data").read_bytes() == (parts / "onnx/model.onnx_data").read_bytes()
    onnx.checker.check_model(str(whole / "onnx/model.onnx"), full_check=True)


@pytest.mark.parametrize("dtype", ["int4", "int8", "f16"])
def test_no_tensor_is_made_whole(
    pico: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """What is handed over is a block of rows, a padding, or a tensor's scales: the embedding has three pages."""
    model = pico("llama")
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 256)
    planned = target.plan(model, recipe_for(model), tmp_path / "o", target.Options(dtype=dtype))
    for tensor in (tensor for stream in planned.streams for tensor in stream.tensors):
        sizes = [make().nbytes for make, _ in tensor.jobs()]
        assert sum(sizes) == tensor.nbytes
        assert max(sizes) < ALIGNMENT, tensor.name


SMOLLM2 = os.environ.get("LRCONVERT_SMOLLM2_GGUF")


@pytest.mark.skipif(not SMOLLM2, reason="LRCONVERT_SMOLLM2_GGUF names no file")
def test_four_bits_are_smaller_than_a_gguf_of_four_bits(tmp_path: Path) -> None:
    """A small model is mostly its embedding: 91 MB where the Q4_1 file has 98, and 156 with the embedding twice."""
    assert SMOLLM2 is not None
    planned = plan_bake("onnx", SMOLLM2, None, tmp_path / "o", target.Options(dtype="int4"))
    written = sum(size for name, size in planned.sizes.items() if name.startswith("onnx/"))
    assert written < 0.95 * Path(SMOLLM2).stat().st_size
