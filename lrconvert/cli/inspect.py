# SPDX-License-Identifier: Apache-2.0
"""`lrconvert inspect`: what a model is, which RoPE it carries, what it can become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import model_argument, revision_option

if TYPE_CHECKING:
    from lrconvert.checkpoint import Checkpoint, Model
    from lrconvert.targets.hf.spelling import FoundRope

LONGROPE_KINDS = ("longrope", "su", "lrconvert")  # their config is what an engine reads


@click.command(name="inspect", short_help="What a model is, which RoPE it carries, what it can become.")
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@revision_option
def command(model: str, as_json: bool, revision: str | None) -> None:
    """What MODEL is, which RoPE it carries, what it can become."""
    facts = inspect(model, revision)
    if as_json:
        out.data(facts)
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
    out.hint(f"next: lrconvert recipe derive {model} --method yarn --factor 8 -o my-recipe")


def assess_found(found: FoundRope, model: Model) -> list[dict[str, Any]]:
    """What engines make of the rotation that a config has; of its keys too, where they are longrope's."""
    from lrconvert.engines import assess
    from lrconvert.rope import RopeSpec

    if not found.scaled:
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
    config = model.checkpoint.config if found.kind in LONGROPE_KINDS and model.checkpoint.format != "gguf" else None
    return [{**verdict.to_json(), "text": str(verdict)} for verdict in assess(spec, model.family.name, config)]


def targets_of(model: Model) -> dict[str, str | None]:
    """Every target with the reason why it can't be written, None where it can."""
    from lrconvert.errors import UnsupportedError
    from lrconvert.families import longrope_architecture

    try:
        longrope_architecture(model.family)
    except UnsupportedError as error:
        return {"hf": None, "gguf": error.message}
    return {"hf": None, "gguf": None}


def _words(checkpoint: Checkpoint) -> list[str]:
    """What a GGUF makes llama.cpp do; a config has its engines below."""
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

    from lrconvert.checkpoint import open_model
    from lrconvert.output import Manifest, manifest_path
    from lrconvert.plotting import sparklines
    from lrconvert.recipe import Provenance, Recipe
    from lrconvert.targets.hf.spelling import read_rope

    model = open_model(reference, revision=revision, tolerant=True)
    checkpoint, shape = model.checkpoint, model.shape
    found = read_rope(checkpoint.config, shape)
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
