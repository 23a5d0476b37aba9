# SPDX-License-Identifier: Apache-2.0
"""`inspect` on ONNX folders: what a graph's constants say of its rotation, whoever exported it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import recipe_for

from lrconvert.api.inspecting import inspect
from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model
from lrconvert.cli import run
from lrconvert.rope import RopeSpec, Tier, inverse_frequencies
from lrconvert.targets import hf, onnx

onnx_library = pytest.importorskip("onnx", reason="needs the extra onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

ROWS = 300


def spec_of(model: Model) -> RopeSpec:
    return hf.plan(model, recipe_for(model), Path("unused")).spec


def frequencies(spec: RopeSpec, tier: Tier | None = None) -> np.ndarray:
    plain = inverse_frequencies(spec.rotary_dim, spec.base)
    return plain if tier is None else plain / np.asarray(tier.factors)


def folder_with(
    tmp_path: Path, model: Model, arrays: Sequence[np.ndarray], *, where: str = "initializer", scaled: bool = True
) -> Path:
    """A folder as an exporter leaves it: a graph with these constants, and the config of a longrope model."""
    if scaled:
        bake_plan(hf.plan(model, recipe_for(model), tmp_path / "hf"))
        config = (tmp_path / "hf" / "config.json").read_text()
    else:
        config = json.dumps(model.checkpoint.config)
    tensors = [numpy_helper.from_array(array, f"t{index}") for index, array in enumerate(arrays)]
    nodes, initializers = [helper.make_node("Identity", ["x"], ["y"])], []
    if where == "initializer":
        initializers = tensors
    elif where == "constant":
        nodes += [helper.make_node("Constant", [], [f"c{i}"], value=tensor) for i, tensor in enumerate(tensors)]
    else:  # inside the branches of an If, as onnxruntime-genai's builder has them
        inner = [helper.make_node("Constant", [], [f"c{i}"], value=tensor) for i, tensor in enumerate(tensors)]
        branch = helper.make_graph(inner, "b", [], [helper.make_tensor_value_info("c0", TensorProto.FLOAT, None)])
        condition = numpy_helper.from_array(np.array(True), "condition")
        nodes.append(helper.make_node("If", ["condition"], ["z"], then_branch=branch, else_branch=branch))
        initializers = [condition]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], initializers)
    folder = tmp_path / "exported"
    folder.mkdir(parents=True)
    onnx_library.save(helper.make_model(graph), str(folder / "model.onnx"))
    (folder / "config.json").write_text(config)
    return folder


def words(folder: Path) -> str:
    found = inspect(str(folder))
    assert found.foreign
    return " ".join(found.words)


def tables(frequency: np.ndarray, factor: float, dtype: type = np.float32) -> list[np.ndarray]:
    angles = np.arange(ROWS)[:, None] * frequency
    return [(np.cos(angles) * factor).astype(dtype), (np.sin(angles) * factor).astype(dtype)]


@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
def test_an_unscaled_graph_is_reported(pico, tmp_path: Path, where: str) -> None:
    """Plain frequencies under a longrope config, wherever the graph keeps them."""
    model = pico("llama")
    folder = folder_with(tmp_path, model, [frequencies(spec_of(model)).astype(np.float32)], where=where)
    assert "unscaled" in words(folder)


@pytest.mark.parametrize("shape", [(1, -1, 1), (-1,)])
def test_one_set_is_frozen(pico, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The short set alone is what a traced export leaves, as a vector of any shape; the long one alone is no better."""
    model = pico("llama")
    spec = spec_of(model)
    short, long = (frequencies(spec, tier).astype(np.float32).reshape(shape) for tier in spec.tiers)
    for name, array, tier in zip(("short", "long"), (short, long), spec.tiers, strict=True):
        found = words(folder_with(tmp_path / name, model, [array]))
        assert f"frozen: the set up to {tier.max_length} is baked in" in found


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("where", ["initializer", "branch"])
def test_both_sets_in_tables_are_recognised(pico, tmp_path: Path, where: str, dtype: type) -> None:
    """Tables of cos and sin with the attention factor in them, of both sets; another factor than asked for is told."""
    model = pico("llama")
    spec = spec_of(model)
    arrays = [array for tier in spec.tiers
              for array in tables(frequencies(spec, tier), tier.attention_factor, dtype)]  # fmt: skip
    found = words(folder_with(tmp_path / "right", model, arrays, where=where))
    assert "may switch" in found and "attention factor" not in found
    wrong = [array for tier in spec.tiers for array in tables(frequencies(spec, tier), 1.4, dtype)]
    assert "carry an attention factor of 1.4" in words(folder_with(tmp_path / "wrong", model, wrong, where=where))


def test_reciprocals_are_recognised(pico, tmp_path: Path) -> None:
    """torch's exporter keeps wavelengths."""
    model = pico("llama")
    spec = spec_of(model)
    arrays = [(1 / frequencies(spec, tier)).astype(np.float32) for tier in spec.tiers]
    assert "may switch" in words(folder_with(tmp_path, model, arrays, where="constant"))


def test_plain_models_and_unknown_graphs(pico, tmp_path: Path) -> None:
    """An unscaled config with plain frequencies is in order; a graph without any is not guessed about."""
    model = pico("llama")
    plain = frequencies(spec_of(model)).astype(np.float32)
    assert "plain RoPE, as config.json says" in words(folder_with(tmp_path / "a", model, [plain], scaled=False))
    assert "isn't known" in words(folder_with(tmp_path / "b", model, [np.ones(7, np.float32)]))


def test_ours_is_read_from_the_graph(pico, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiers are those of the graph, whatever config.json says; three tiers with start tokens come back exactly."""
    model = pico("llama")
    recipe = recipe_for(model, tiers=3, start_tokens=5)
    for double in (True, False):
        folder = tmp_path / f"own-{double}"
        bake_plan(onnx.plan(model, recipe, folder, onnx.Options(double=double)))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": None, "longrope": None}))
        found = inspect(str(folder))
        assert found.rope is not None
        for ours, theirs in zip(recipe.tiers, found.rope.tiers, strict=True):
            assert replace(theirs, factors=ours.factors) == ours
            np.testing.assert_allclose(theirs.factors, ours.factors, rtol=1e-14)
        assert run(["inspect", str(folder)]) == 0
        assert ("float64" if double else "tables") in capsys.readouterr().out
