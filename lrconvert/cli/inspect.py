# SPDX-License-Identifier: Apache-2.0
"""`lrconvert inspect`: what a model is, which RoPE it carries, what it can become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import model_argument, revision_option

if TYPE_CHECKING:
    from lrconvert.checkpoint import Checkpoint, Model
    from lrconvert.checkpoint.rope_config import FoundRope

FOREIGN = "foreign onnx"
LONGROPE_KINDS = ("longrope", "su", "lrconvert")  # their config is what an engine reads


@click.command(name="inspect", short_help="What a model is, which RoPE it carries, what it can become.")
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@revision_option
def command(model: str, as_json: bool, revision: str | None) -> None:
    """What MODEL is, which RoPE it carries, what it can become."""
    facts = inspect_graph(model, revision) or inspect(model, revision)
    if as_json:
        out.data(facts)
        return
    if facts["format"] == FOREIGN:
        _show_graph(facts)
        return
    shape, rope = facts["shape"], facts["rope"]
    size = out.size(facts["bytes"])
    out.say(
        f"{model}: {facts['family']}, {facts['format']}, {facts['tensors']} tensors in {facts['files']} files, {size}"
    )
    out.say(
        f"{shape['layers']} layers of {shape['hidden']}, {shape['heads']} heads ({shape['kv_heads']} for keys) of "
        f"{shape['head_dim']}, {facts['parameters'] / 1e6:,.1f} M parameters, mostly {facts['dtype']}"
    )
    out.say(
        f"RoPE: {rope['kind']}, θ {shape['theta']:g}, {shape['rotary_dim']} of {shape['head_dim']} channels rotate, "
        f"original window {rope['original_window']}"
    )
    for line in facts["rope"]["words"]:
        out.say(f"  {line}")
    for line in facts["sparklines"]:
        out.say(f"  {line}")
    for note in facts["notes"]:
        out.say(f"note: {note}")
    if facts["engines"]:
        out.say("engines:" if facts["rope"]["kind"] in LONGROPE_KINDS else "engines, once baked as longrope:")
    for engine in facts["engines"]:
        out.say(f"  {engine['text']}")
    for name, reason in facts["targets"].items():
        out.say(f"can become {name}" if reason is None else f"can't become {name}: {reason}")
    if facts["manifest"]:
        made = facts["manifest"]
        out.say(f"made by lrconvert from {made['model']} with {made['recipe']}: {made['parity']}")
        return
    if not facts["targets"]:
        return
    out.hint(f"next: lrconvert recipe derive {model} --method yarn --factor 8 -o my-recipe")


def _show_graph(facts: dict[str, Any]) -> None:
    out.say(
        f"{facts['model']}: {facts['family'] or 'an unknown family'}, a graph of another exporter, {facts['graph']}"
    )
    for line in facts["rope"]["words"]:
        out.say(f"  {line}")
    out.hint("convert the checkpoint that it was made from: lrconvert onnx MODEL --recipe RECIPE -o DIR")


def inspect_graph(reference: str, revision: str | None = None) -> dict[str, Any] | None:
    """The facts about an ONNX folder that lrconvert did not write; None for anything else."""
    from lrconvert.checkpoint import locate, read_json

    folder = locate(reference, revision=revision)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    if not any(path.is_file() for path in [*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")]):
        return None
    from lrconvert.checkpoint.onnx_folder import is_own
    from lrconvert.checkpoint.rope_config import read_rope
    from lrconvert.errors import require
    from lrconvert.families import get_family, read_shape

    require("onnx", "onnx", "a look into an ONNX graph")
    if is_own(folder):
        return None
    from lrconvert.targets.onnx.explain import find_rotations, graph_in, verdict

    path = graph_in(folder)
    facts: dict[str, Any] = {"model": reference, "format": FOREIGN, "family": None, "rope": {"words": []}}
    words = facts["rope"]["words"]
    facts["graph"] = None if path is None else path.relative_to(folder).as_posix()
    if path is None:
        words.append("several graphs, and none with a name that exporters give to a decoder")
    elif not (folder / "config.json").is_file():
        words.append("no config.json beside it, so what it should compute isn't known")
    else:
        config = read_json(folder / "config.json")
        family = get_family(config.get("model_type"))
        shape = read_shape(config, family)
        found = read_rope(config, shape)
        facts["family"] = family.name
        words += verdict(find_rotations(path, shape.theta, found.tiers), found.tiers, scaled=found.scaled)
    return facts


def assess_found(found: FoundRope, model: Model) -> list[dict[str, Any]]:
    """What engines make of the rotation that a config has; of its keys too, where they are longrope's."""
    from lrconvert.engines.table import assess
    from lrconvert.rope import RopeSpec

    if not found.scaled or model.checkpoint.tiers:
        return []
    shape = model.shape
    spec = RopeSpec(
        model.family.name,
        shape.rotary_dim,
        shape.theta,
        found.original_window,
        found.tiers[-1].max_length,
        found.tiers,
    )
    config = model.checkpoint.config if found.kind in LONGROPE_KINDS and model.checkpoint.gguf is None else None
    return [{**verdict.to_json(), "text": str(verdict)} for verdict in assess(spec, model.family.name, config)]


def targets_of(model: Model) -> dict[str, str | None]:
    """Every target with the reason why it can't be written, None where it can."""
    if model.checkpoint.tiers:
        return {}
    from lrconvert.errors import UnsupportedError
    from lrconvert.families import longrope_architecture

    gguf = None
    try:
        longrope_architecture(model.family)
    except UnsupportedError as error:
        gguf = error.message
    return {"hf": None, "gguf": gguf, "onnx": None}


def _words(checkpoint: Checkpoint) -> list[str]:
    """What an ONNX graph does, and a GGUF makes llama.cpp do; a config has its engines below."""
    from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint

    if isinstance(checkpoint, OnnxCheckpoint):
        angles = "float64" if checkpoint.double else "float32 tables"
        return [f"a function in the graph, angles in {angles}, {checkpoint.attention} attention"]
    if checkpoint.format != "gguf":
        return []
    from lrconvert.checkpoint.gguf import GgufCheckpoint
    from lrconvert.targets.gguf.explain import explain

    assert isinstance(checkpoint, GgufCheckpoint)
    return explain(checkpoint)


def inspect(reference: str, revision: str | None = None) -> dict[str, Any]:
    """The facts as plain data."""
    import dataclasses
    import math

    from lrconvert.artifact.manifest import Manifest, manifest_path
    from lrconvert.checkpoint import open_model
    from lrconvert.recipe import Provenance, Recipe
    from lrconvert.recipe.plotting import sparklines

    model = open_model(reference, revision=revision, tolerant=True)
    checkpoint, shape = model.checkpoint, model.shape
    found = model.rope
    recipe = Recipe(
        schema_version=1,
        name="found",
        family=model.family.name,
        original_window=found.original_window,
        rope_theta=shape.theta,
        rotary_dim=shape.rotary_dim,
        tiers=found.tiers,
        provenance=Provenance("published"),
    )
    files = checkpoint.weight_files()
    manifest = None
    if manifest_path(checkpoint.path).is_file():
        read = Manifest.read(checkpoint.path)
        parity = (read.parity or {}).get("summary", "not verified yet")
        if checkpoint.path.is_dir() or checkpoint.path.name in read.files:  # else that of a file of a similar name
            manifest = {"model": read.source["model"], "recipe": read.recipe["name"], "parity": parity}
    tensors = checkpoint.tensors
    return {
        "model": reference,
        "family": model.family.name,
        "format": checkpoint.format,
        "tensors": len(tensors),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "dtype": model.dtype,
        "shape": dataclasses.asdict(shape),
        "rope": {
            "kind": "broken" if checkpoint.rope_problems else found.kind,
            "original_window": found.original_window,
            "words": _words(checkpoint),
            "problems": list(checkpoint.rope_problems),
            "tiers": [dataclasses.asdict(tier) for tier in found.tiers],
        },
        "sparklines": sparklines(recipe) if found.scaled else [],
        "engines": assess_found(found, model),
        "notes": [*model.notes, *found.notes, *(recipe.warnings() if found.scaled else [])],
        "targets": targets_of(model),
        "manifest": manifest,
    }
