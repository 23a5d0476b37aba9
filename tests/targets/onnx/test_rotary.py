# SPDX-License-Identifier: Apache-2.0
"""The rotary function alone, against NumPy in float64: in ONNX Runtime and in onnx.reference, at any position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import recipe_for
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support.onnx_files import Array, float32_angles, set_attribute

from lrconvert.rope import RopeSpec, Tier
from lrconvert.targets.onnx import OPSETS, rotary

EXACT = 1e-6
BASE, PAIRS = 10000.0, 32
Cos_sin = tuple[Array, Array]


def spec_of(lengths: Sequence[int], starts: Sequence[int]) -> RopeSpec:
    """Tiers with factors, n̂ and an attention factor of their own each, far enough from each other to be told apart."""
    spread = np.linspace(0.0, 1.0, PAIRS)
    tiers = [
        Tier(length, tuple((1.1 + index + 7 * index * spread).tolist()), start, 1.0 + 0.1 * index)
        for index, (length, start) in enumerate(zip(lengths, starts, strict=True))
    ]
    return RopeSpec("llama", 2 * PAIRS, BASE, lengths[0], lengths[-1], tuple(tiers))


FAR = spec_of((4096, 262144, 2097152), (0, 16, 4))
NEAR = spec_of((64, 200, 512), (0, 12, 5))
SINGLE = spec_of((2097152,), (7,))


def alone(spec: RopeSpec, *, double: bool, to: int = TensorProto.FLOAT, opset: int = 23) -> onnx.ModelProto:
    """A model of nothing but the call, [batch, length] positions to cos and sin."""
    shape = ["batch", "length"]
    graph = helper.make_graph(
        [rotary.call(spec, "position_ids", "sequence_length", to, double=double)],
        "rotary",
        [helper.make_tensor_value_info("position_ids", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info(name, to, [*shape, PAIRS]) for name in ("cos", "sin")],
        [numpy_helper.from_array(np.array(0, np.int64), "sequence_length")],
    )
    # The default may be replaced, as in the whole graph.
    graph.input.append(helper.make_tensor_value_info("sequence_length", TensorProto.INT64, []))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("lrconvert", rotary.VERSION)]
    function = rotary.function(opset, double=double)
    version = helper.find_min_ir_version_for(opsets[:1])
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=version)


def by_onnxruntime(model: onnx.ModelProto) -> Callable[[dict[str, Array]], Cos_sin]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feed: tuple(session.run(None, feed))  # type: ignore[return-value]


def by_evaluator(model: onnx.ModelProto) -> Callable[[dict[str, Array]], Cos_sin]:
    evaluator = ReferenceEvaluator(model)
    return lambda feed: tuple(evaluator.run(None, feed))  # type: ignore[return-value]


RUNTIMES = {"onnxruntime": by_onnxruntime, "onnx.reference": by_evaluator}


@cache
def runner(runtime: str, spec: RopeSpec, double: bool) -> Callable[[dict[str, Array]], Cos_sin]:
    return RUNTIMES[runtime](alone(spec, double=double))


def expected(spec: RopeSpec, row: Sequence[int], length: int | None = None) -> Cos_sin:
    """Written out a second time: angles of a row in float64."""
    length = max(row) + 1 if length is None else length
    tier = next((tier for tier in spec.tiers if length <= tier.max_length), spec.tiers[-1])
    position = np.array(row, np.float64)[:, None]
    plain = spec.base ** (-np.arange(0, spec.rotary_dim, 2) / spec.rotary_dim)
    angles = np.where(position < tier.start_tokens, position * plain, position * plain / np.array(tier.factors))
    return np.cos(angles) * tier.attention_factor, np.sin(angles) * tier.attention_factor


def error(found: Cos_sin, wanted: Cos_sin) -> float:
    return max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(found, wanted, strict=True))


def asked(rows: Sequence[Sequence[int]], **more: int) -> dict[str, Array]:
    return {"position_ids": np.array(rows, np.int64), **{name: np.array(n, np.int64) for name, n in more.items()}}


DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "tables"])
RUNTIME = pytest.mark.parametrize("runtime", RUNTIMES)


@DOUBLE
@RUNTIME
def test_cos_and_sin_are_exact_at_any_position(runtime: str, double: bool) -> None:
    """Within 1e-6 of float64 at both ends of every tier, among start tokens and at two million; float32 angles are off
    by 0.08 there."""
    for name, spec in (("three tiers", FAR), ("one tier", SINGLE)):
        for end in (1, 5, 17, 4096, 4097, 262144, 262145, 2097152):
            row = sorted({*range(min(end, 40)), *range(max(0, end - 70), end)})
            (cos, sin) = runner(runtime, spec, double)(asked([row]))
            assert cos.dtype == sin.dtype == np.float32 and cos.shape == sin.shape == (1, len(row), PAIRS), (name, end)
            assert error((cos[0], sin[0]), expected(spec, row)) <= EXACT, (name, end)


def test_float32_angles_would_be_seen() -> None:
    """The control: the same function with float32 angles is off by far more, beyond 256k and at 4k already."""
    model = alone(FAR, double=True)
    float32_angles(model)
    run = by_onnxruntime(model)
    for end, at_least in ((4096, 10 * EXACT), (262144, 100 * EXACT), (2097152, 1000 * EXACT)):
        row = list(range(end - 70, end))
        (cos, sin) = run(asked([row]))
        assert error((cos[0], sin[0]), expected(FAR, row)) > at_least


@DOUBLE
@RUNTIME
def test_a_row_of_a_batch_has_the_tier_of_its_own_length(runtime: str, double: bool) -> None:
    """Rows in three tiers in one call, one of them padded on the left, one a single decoded token's place."""
    lengths = [64, 65, 200, 201, 9]
    rows = [[max(0, index - (201 - length)) for index in range(201)] for length in lengths]
    cos, sin = runner(runtime, NEAR, double)(asked(rows))
    for index, row in enumerate(rows):
        assert error((cos[index], sin[index]), expected(NEAR, row)) <= EXACT, lengths[index]
    cos, sin = runner(runtime, NEAR, double)(asked([[n] for n in (63, 64, 199, 200, 3)]))
    for index, place in enumerate((63, 64, 199, 200, 3)):
        assert error((cos[index], sin[index]), expected(NEAR, [place])) <= EXACT, place


@DOUBLE
@RUNTIME
def test_a_caller_may_say_how_long_the_sequence_gets(runtime: str, double: bool) -> None:
    """`sequence_length` chooses a later tier than the positions do, never an earlier one."""
    row = list(range(20))
    for said, chosen in ((0, 20), (64, 64), (65, 65), (201, 201), (10**6, 512)):
        cos, sin = runner(runtime, NEAR, double)(asked([row], sequence_length=said))
        assert error((cos[0], sin[0]), expected(NEAR, row, chosen)) <= EXACT, said
    cos, sin = runner(runtime, NEAR, double)(asked([list(range(300))], sequence_length=65))
    assert error((cos[0], sin[0]), expected(NEAR, list(range(300)))) <= EXACT


@RUNTIME
def test_tables_end_in_no_number_rather_than_a_wrong_one(runtime: str) -> None:
    """Beyond the tables every value is NaN, which no later step can hide; up to the window every value is right."""
    for window in (256, 512, 200, 2097152):
        spec = spec_of((64, window), (0, 9))
        end = -(-window // (stride := 2 ** int(np.ceil(np.log2(window) / 2)))) * stride  # of the tables: whole rows
        row = [window - 1, *range(end, end + 40), 10 * window]
        (cos, sin) = runner(runtime, spec, False)(asked([row]))
        assert error((cos[0, :1], sin[0, :1]), expected(spec, row[:1], row[-1])) <= EXACT, window
        assert np.isnan(cos[0, 1:]).all() and np.isnan(sin[0, 1:]).all(), window
        # The last tier goes on in float64, as every program's does.
        cos, sin = runner(runtime, spec, True)(asked([row]))
        assert error((cos[0], sin[0]), expected(spec, row)) <= EXACT, window


@DOUBLE
def test_one_start_token_is_none(double: bool) -> None:
    """n̂ = 1: position 0 has angle 0 in any set; its attention factor is that of its tier all the same."""
    for starts in ((0, 1, 1), (1, 1, 1), (1, 0, 2)):
        spec = spec_of((64, 200, 512), starts)
        run = by_onnxruntime(alone(spec, double=double))
        for end in (64, 200, 512):
            row = list(range(end))
            cos, sin = run(asked([row]))
            assert error((cos[0], sin[0]), expected(spec, row)) <= EXACT, (starts, end)


@DOUBLE
def test_every_opset_computes_the_same(double: bool) -> None:
    """And the result is rounded once, to what the graph computes in."""
    row = list(range(150, 300))
    wanted = expected(NEAR, row)
    for opset in OPSETS:
        for to, bound in ((TensorProto.FLOAT, EXACT), (TensorProto.FLOAT16, 2**-10)):
            model = alone(NEAR, double=double, to=to, opset=opset)
            onnx.checker.check_model(model, full_check=True)
            cos, sin = by_onnxruntime(model)(asked([row]))
            assert error((cos[0], sin[0]), wanted) <= bound, (opset, to)
            if to == TensorProto.FLOAT16:
                assert cos.dtype == np.float16, opset
                rounded = tuple(values.astype(np.float16) for values in wanted)
                assert np.mean(np.concatenate([cos[0] != rounded[0], sin[0] != rounded[1]])) < 1e-3, opset


def test_shapes_and_types_follow_from_the_function() -> None:
    """Strict inference goes through the function: nothing else says what cos and sin are."""
    for double in (True, False):
        for to in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            model = alone(NEAR, double=double, to=to)
            del model.graph.output[:]
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("cos", "sin"))
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
            assert len(inferred.graph.output) == 2
            for output in inferred.graph.output:
                kind = output.type.tensor_type
                assert kind.elem_type == to and len(kind.shape.dim) == 3, (double, to)
                assert kind.shape.dim[2].dim_value == PAIRS, (double, to)


def test_only_standard_operators_and_no_double_in_the_tables() -> None:
    """No library is needed; without --no-double's promise a provider that lacks float64 could not run the graph."""
    for double in (True, False):
        function = rotary.function(23, double=double)
        assert {node.domain for node in function.node} == {""}
        casts = [a.i for node in function.node for a in node.attribute if node.op_type == "Cast" and a.name == "to"]
        assert (TensorProto.DOUBLE in casts) == double
        used = {a.ref_attr_name for node in function.node for a in node.attribute if a.ref_attr_name}
        kinds = {
            a.t.data_type
            for a in rotary.call(NEAR, "p", "s", 1, double=double).attribute
            if a.name in used and a.t.name
        }
        assert (TensorProto.DOUBLE in kinds) == double


def test_the_tiers_of_a_recipe_are_its_attributes(pico: Callable[..., Any]) -> None:
    """Tables of another tier would be seen: an exchange changes the answer."""
    model = pico("llama")
    recipe = recipe_for(model, tiers=3, start_tokens=12)
    spec = RopeSpec("llama", model.shape.rotary_dim, BASE, 64, 256, recipe.tiers)
    call = rotary.call(spec, "p", "s", TensorProto.FLOAT, double=True)
    tables = {a.name: numpy_helper.to_array(a.t) for a in call.attribute if a.t.name}
    np.testing.assert_array_equal(tables["tier_lengths"], [64, 128, 256])
    np.testing.assert_array_equal(tables["start_tokens"], [12, 12, 12])
    np.testing.assert_array_equal(tables["attention_factors"], [tier.attention_factor for tier in recipe.tiers])
    ratio = tables["inverse_frequencies"] / tables["scaled_inverse_frequencies"]
    np.testing.assert_allclose(ratio, [tier.factors for tier in recipe.tiers], rtol=1e-15)
    whole = alone(NEAR, double=True)
    right = by_onnxruntime(whole)(asked([[70]]))
    scaled = numpy_helper.to_array(next(a.t for a in whole.graph.node[0].attribute if a.name.startswith("scaled_inv")))
    set_attribute(whole, "scaled_inverse_frequencies", scaled[::-1].copy())
    assert error(by_onnxruntime(whole)(asked([[65]])), tuple(np.asarray(v, np.float64) for v in right)) > 0.1  # type: ignore[arg-type]
