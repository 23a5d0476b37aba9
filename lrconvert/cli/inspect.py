# SPDX-License-Identifier: Apache-2.0
"""`lrconvert inspect`: what a model is, which RoPE it carries, what it can become."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lrconvert.cli import _output as out
from lrconvert.cli import _steps
from lrconvert.cli._common import model_argument, revision_option

if TYPE_CHECKING:
    from lrconvert.api.inspecting import Inspection


@click.command(name="inspect", short_help="Show what a model is, its RoPE, and what it can be converted to.")
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verbose", is_flag=True, help="Show everything known about each engine.")
@revision_option
def command(model: str, as_json: bool, verbose: bool, revision: str | None) -> None:
    """Show what MODEL is, its RoPE, and what it can be converted to."""
    from lrconvert.api.inspecting import inspect

    found = inspect(model, revision=revision)
    if as_json:
        out.data(found.to_json())
    elif found.foreign:
        _show_foreign(found)
    else:
        _show(found, verbose)


def _show(found: Inspection, verbose: bool) -> None:
    from lrconvert.api.inspecting import LONGROPE_KINDS

    shape, rope = found.shape, found.rope
    assert rope is not None
    out.say(
        f"{found.model}: {found.family}, {found.format}, {out.count(found.tensors, 'tensor')} in "
        f"{out.count(found.files, 'file')}, {out.size(found.bytes)}"
    )
    out.say(
        f"{shape['layers']} layers of {shape['hidden']}, {shape['heads']} heads ({shape['kv_heads']} for keys) of "
        f"{shape['head_dim']}, {found.parameters / 1e6:,.1f} M parameters, mostly {found.dtype}"
    )
    out.say(
        f"RoPE: {found.kind}, θ {shape['theta']:g}, {shape['rotary_dim']} of {shape['head_dim']} channels rotate, "
        f"original window {rope.original_window}" + (f", serves {rope.window}" if rope.scaled else "")
    )
    for line in [*found.words, *found.sparklines]:
        out.say(f"  {line}")
    for note in found.notes:
        out.say(f"note: {note}")
    if found.engines:
        out.say("engines:" if rope.kind in LONGROPE_KINDS else "engines, once baked as longrope:")
        out.engines(found.engines, detailed=verbose)
    for name, reason in found.targets.items():
        out.say(f"can become {name}" if reason is None else f"can't become {name}: {reason}")
    if found.manifest:
        made = found.manifest
        out.say(f"baked by lrconvert from {made.model} with {made.recipe}: {made.parity}")
    elif found.targets and (step := _next(found)):
        out.hint(f"next: {step}")


def _next(found: Inspection) -> str | None:
    """What to do with the model: bake a LongRoPE that it carries, else extend what it has; None where it can become
    nothing."""
    from lrconvert.api.inspecting import LONGROPE_KINDS

    target, rope = _steps.other_format(found.targets, found.format), found.rope
    if target is None or rope is None:
        return None
    name = Path(found.model).name.removesuffix(".gguf")
    if found.problems:
        return _steps.bake_step("gguf", found.model, f"{name}-repaired", "RECIPE")
    if rope.kind in LONGROPE_KINDS:
        more = (["--window", "N"] if rope.question else []) + (["--text-only"] if found.part_of else [])
        return _steps.bake_step(target, found.model, name if target == "gguf" else f"{name}-{target}", None, *more)
    ratio = ("--target", str(4 * rope.window)) if rope.scaled else ("--factor", "8")
    return _steps.derive_step(found.model, *ratio)


def _show_foreign(found: Inspection) -> None:
    out.say(f"{found.model}: {found.family or 'an unknown family'}, a graph from another exporter, {found.graph}")
    for line in found.words:
        out.say(f"  {line}")
    out.hint("convert its source checkpoint instead: lrconvert onnx MODEL -o DIR")
