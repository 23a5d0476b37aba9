# SPDX-License-Identifier: Apache-2.0
"""ONNX folders for tests: exported from pico models, and changed afterwards, the graph or the data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.manifest import MANIFEST
from lrconvert.checkpoint import Model
from lrconvert.recipe import Provenance, Recipe
from lrconvert.rope import Tier
from lrconvert.targets import onnx as target

GRAPH = "onnx/model.onnx"
DATA = "onnx/model.onnx_data"
Array = np.ndarray[Any, Any]


def export(model: Model, recipe: Recipe, output: Path, **options: Any) -> Path:
    """The folder; options as `target.Options` has them."""
    bake_plan(target.plan(model, recipe, output, target.Options(**options)))
    return output


def command(model: Path | str, recipe: Path, output: Path, *more: object) -> tuple[object, ...]:
    """Arguments of `lrconvert onnx`."""
    return ("onnx", model, "--recipe", recipe, "-o", output, *more)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recipe_with(model: Model, lengths: Sequence[int], *, starts: Sequence[int] | int = 0) -> Recipe:
    """Tiers of these lengths, the first one the original window, each with factors, an attention factor and, if
    `starts` says so, start tokens of its own."""
    shape, tiers = model.shape, []
    counts = [starts] * len(lengths) if isinstance(starts, int) else starts
    spread = np.linspace(0.0, 1.0, shape.rotary_dim // 2)
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        ratio = length / lengths[0]
        factors = 1.05 + 0.1 * index + (ratio - 1) * spread
        tiers.append(Tier(length, tuple(factors.tolist()), count, 1.0 + 0.05 * (index + 1)))
    return Recipe(
        schema_version=1,
        name="tiers",
        family=model.family.name,
        original_window=lengths[0],
        rope_theta=shape.theta,
        rotary_dim=shape.rotary_dim,
        tiers=tuple(tiers),
        provenance=Provenance("published", source="a test"),
    )


def tensors_of(model: Model) -> dict[str, Array]:
    """Every tensor that has a role, as it is stored."""
    return {tensor.name: model.checkpoint.read(tensor.name) for tensor in model.roles.values()}


def write_adapter(folder: Path, modules: dict[str, tuple[int, int]], rank: int = 4) -> Path:
    """A LoRA adapter in PEFT's layout, random, for modules of these shapes."""
    rng, found = np.random.default_rng(3), {}
    for module, (rows, columns) in modules.items():
        found[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((rank, columns)).astype(np.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = 0.1 * rng.standard_normal((rows, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(found, folder / "adapter_model.safetensors")
    names = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# --- changes to an exported folder -----------------------------------------------------------------------


def graph_of(folder: Path) -> onnx.ModelProto:
    """The graph, without its weights."""
    return onnx.load(str(folder / GRAPH), load_external_data=False)


def changed(folder: Path, output: Path, change: Callable[[onnx.ModelProto], None] | None) -> Path:
    """A copy without its manifest, whose digests would tell, after `change` has worked on its graph."""
    shutil.copytree(folder, output)
    (output / MANIFEST).unlink()
    if change is None:
        return output
    model = graph_of(output)
    before = model.SerializeToString(deterministic=True)
    change(model)
    after = model.SerializeToString(deterministic=True)
    assert after != before
    (output / GRAPH).write_bytes(after)
    return output


def call_of(model: onnx.ModelProto) -> onnx.NodeProto:
    """The node that calls the rotary function."""
    (node,) = [node for node in model.graph.node if node.domain == "lrconvert"]
    return node


def attribute(model: onnx.ModelProto, name: str) -> Array:
    """A table that the call hands to the rotary function."""
    (found,) = [each for each in call_of(model).attribute if each.name == name]
    return numpy_helper.to_array(found.t)


def set_attribute(model: onnx.ModelProto, name: str, values: Array) -> None:
    (found,) = [each for each in call_of(model).attribute if each.name == name]
    found.t.CopyFrom(numpy_helper.from_array(values, name))


def nodes_named(model: onnx.ModelProto, *names: str) -> list[onnx.NodeProto]:
    """Nodes of the graph by their names, all of which must be there."""
    found = [node for node in model.graph.node if node.name in names]
    assert {node.name for node in found} == set(names)
    return found


def float32_angles(model: onnx.ModelProto) -> None:
    """The function with angles in float32, as most exporters make them."""
    (function,) = model.functions
    nodes = []
    for node in function.node:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        for each in made.attribute:
            if each.name == "to" and each.i == TensorProto.DOUBLE:
                each.i = TensorProto.FLOAT
        nodes.append(made)
        if node.op_type == "Where" or (node.op_type == "Gather" and node.input[0] == "attention_factors"):
            wide = f"{node.output[0]}_wide"
            made.output[0] = wide
            nodes.append(helper.make_node("Cast", [wide], [node.output[0]], to=TensorProto.FLOAT))
    del function.node[:]
    function.node.extend(nodes)


def with_weights_of(folder: Path, other: Path, output: Path) -> Path:
    """A copy without manifest that has the data file of another export."""
    shutil.copytree(folder, output)
    (output / MANIFEST).unlink()
    shutil.copy(other / DATA, output / DATA)
    return output
