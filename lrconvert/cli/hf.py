# SPDX-License-Identifier: Apache-2.0
"""`lrconvert hf`: bake a recipe into a Hugging Face folder."""

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


@click.command(name="hf", short_help="Bake a recipe into a Hugging Face folder.")
@model_argument
@recipe_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The artifact.")
@adapter_option
@window_option
@click.option("--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="Convert the weights; default: as they are.")
@click.option("--portable", is_flag=True, help="Bake what engines get right: the attention factor folded into q and k.")
@click.option("--allow-lossy", "lossy", is_flag=True, help="With --portable: give up what engines can't do.")
@dry_run_option
@click.option(
    "--copy/--link", "copy", default=None, help="Copy weights, or insist on hard links; default: link if possible."
)
@verify_option
@click.option(
    "--push-to-hub", "name", metavar="NAME", help="Then publish it on the Hub as NAME, unless --verify fails."
)
@click.option("--private", is_flag=True, help="With --push-to-hub: make the repository private.")
@force_option
@revision_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    recipe: str,
    output: Path,
    adapter: str | None,
    window: int | None,
    dtype: str | None,
    portable: bool,
    lossy: bool,
    dry_run: bool,
    copy: bool | None,
    verify_too: bool,
    name: str | None,
    private: bool,
    force: bool,
    revision: str | None,
) -> int | None:
    """Bake RECIPE into MODEL: a Hugging Face folder that runs anywhere.

    Native code runs it without remote code where two tiers suffice; with trust_remote_code=True its own
    modeling_longrope.py computes the recipe exactly, and generate() stays right across a tier boundary.

    \b
    lrconvert hf demo --recipe demo-yarn-8x -o demo-32k
    """
    from lrconvert.artifact.staging import check_output
    from lrconvert.checkpoint import open_model
    from lrconvert.checkpoint.adapter import choose_adapter, open_adapter
    from lrconvert.errors import UsageError
    from lrconvert.recipe import load_recipe, recipe_folder
    from lrconvert.targets import hf

    if private and name is None:
        raise UsageError("--private is about --push-to-hub, which is not given")
    if lossy and not portable:
        raise UsageError("--allow-lossy is about --portable, which is not given")
    if not dry_run:
        check_output(output, force=force)
        if name is not None:  # who can't publish learns it before the work
            from lrconvert.hub.access import sign_in

            sign_in(name)
    baked = load_recipe(recipe)
    chosen = choose_adapter(adapter, baked.adapter, recipe_folder(recipe))
    planned = hf.plan(
        open_model(model, revision=revision),
        baked,
        output,
        window=window,
        dtype=dtype,
        adapter=None if chosen is None else open_adapter(chosen),
        portable=portable,
        lossy=lossy,
    )
    _describe(planned, detailed=dry_run)
    if dry_run:
        out.hint("dry run: nothing was written" + (f", nothing published as {name}" if name else ""))
        return None
    with out.byte_progress() as progress:
        manifest = hf.write(planned, force=force, link=None if copy is None else not copy, progress=progress)
    linked = sum(record.linked for record in manifest.files.values())
    total = sum(record.size for record in manifest.files.values())
    out.say(
        f"{output}: {len(manifest.files)} files, {out.size(total)}"
        + (f", {linked} of them hard links to the source (editing one edits both)" if linked else "")
    )
    if verify_too:
        from lrconvert.cli.verify import command as verify_command

        code = ctx.invoke(verify_command, artifact=output)
        if code or name is None:
            return code
    else:
        out.hint(f"not verified yet: lrconvert verify {output}")
    if name is not None:
        from lrconvert.cli.push import command as push_command

        ctx.invoke(push_command, artifact=output, name=name, private=private)
    return None


def _describe(planned, *, detailed: bool) -> None:
    from lrconvert.engines.table import assess

    spec = planned.spec
    tiers = ", ".join(str(tier.max_length) for tier in spec.tiers)
    out.say(
        f"{planned.model.reference} ({spec.family}): {spec.original_window} → {spec.window} tokens, tiers up to {tiers}"
    )
    for edit in planned.edits:
        out.say(f"  {edit}")
    if detailed:
        for name, size in planned.sizes.items():
            how = "made" if name in planned.texts else "kept" if name in planned.kept else "converted"
            out.say(f"  {name}: {out.size(size)}, {how}")
    for verdict in assess(spec, spec.family):
        out.say(f"  {verdict}")
    for loss in planned.given_up:
        out.warn(f"given up: {loss}")
    for loss in planned.losses:
        out.warn(f"without trust_remote_code: {loss}")
    for note in planned.notes:
        out.warn(note)
