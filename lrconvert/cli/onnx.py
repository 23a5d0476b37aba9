# SPDX-License-Identifier: Apache-2.0
"""`lrconvert onnx`: bake a recipe into an ONNX folder."""

from __future__ import annotations

from pathlib import Path

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import (
    adapter_option,
    dry_run_option,
    force_option,
    model_argument,
    recipe_option,
    revision_option,
    verify_option,
    window_option,
)


@click.command(name="onnx", short_help="Bake a recipe into an ONNX folder.")
@model_argument
@recipe_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The folder.")
@click.option("--dtype", type=click.Choice(["f32", "f16", "bf16", "int8", "int4"]), default="f32", show_default=True,
              help="int8 and int4 quantise the weights of products; the rotation stays exact.")  # fmt: skip
@click.option("--attention", type=click.Choice(["gqa", "standard"]), default="gqa", show_default=True,
              help="ONNX Runtime's fused operator, or the standard one: slower, for left-padded batches and "
              "other runtimes.")  # fmt: skip
@adapter_option
@window_option
@click.option("--opset", type=int, default=23, show_default=True, help="Version of the standard operators.")
@click.option("--no-double", "no_double", is_flag=True, help="Angles from float32 tables, for execution providers "
              "without float64.")  # fmt: skip
@click.option("--genai-rewind", is_flag=True, help="Have onnxruntime-genai read the sequence anew where it crosses "
              "the original window (4096 or 8192 tokens).")  # fmt: skip
@dry_run_option
@verify_option
@force_option
@revision_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    recipe: str,
    output: Path,
    dtype: str,
    attention: str,
    adapter: str | None,
    window: int | None,
    opset: int,
    no_double: bool,
    genai_rewind: bool,
    dry_run: bool,
    verify_too: bool,
    force: bool,
    revision: str | None,
) -> int | None:
    """Bake RECIPE into MODEL: an ONNX folder that ONNX Runtime, onnxruntime-genai, optimum and transformers.js run.

    The rotation is a function of standard operators inside the graph: no library has to be installed for it.

    \b
    lrconvert recipe derive demo --method yarn --factor 8 -o demo-8x
    lrconvert onnx demo --recipe demo-8x -o demo-onnx
    """
    from lrconvert.artifact.staging import check_output
    from lrconvert.checkpoint import open_model
    from lrconvert.checkpoint.adapter import choose_adapter, open_adapter
    from lrconvert.recipe import load_recipe, recipe_folder
    from lrconvert.targets import onnx

    options = onnx.Options(
        window=window,
        dtype=dtype,
        attention=attention,
        opset=opset,
        double=not no_double,
        genai_rewind=genai_rewind,
    )
    baked = load_recipe(recipe)
    chosen = choose_adapter(adapter, baked.adapter, recipe_folder(recipe))
    if not dry_run:
        check_output(output, force=force)
    planned = onnx.plan(
        open_model(model, revision=revision),
        baked,
        output,
        options,
        adapter=None if chosen is None else open_adapter(chosen),
    )
    _describe(planned, detailed=dry_run)
    if dry_run:
        out.hint("dry run: nothing was written")
        return None
    with out.byte_progress() as progress:
        manifest = onnx.write(planned, force=force, progress=progress)
    total = sum(record.size for record in manifest.files.values())
    out.say(f"{output}: {len(manifest.files)} files, {out.size(total)}")
    if verify_too:
        from lrconvert.cli.verify import command as verify_command

        return ctx.invoke(verify_command, artifact=output)
    out.hint(f"not verified yet: lrconvert verify {output}")
    return None


def _describe(planned, *, detailed: bool) -> None:
    spec, options = planned.spec, planned.options
    tiers = ", ".join(str(tier.max_length) for tier in spec.tiers)
    out.say(
        f"{planned.model.reference} ({spec.family}): {spec.original_window} → {spec.window} tokens, tiers up to "
        f"{tiers}; {options['dtype']}, {options['attention']} attention"
    )
    if detailed:
        for edit in planned.edits:
            out.say(f"  {edit}")
        for name, size in planned.sizes.items():
            out.say(f"  {name}: {out.size(size)}")
    for note in planned.notes:
        out.warn(note)
