# SPDX-License-Identifier: Apache-2.0
"""`lrconvert gguf`: bake a recipe into a GGUF for llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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

_UNITS = {"m": 10**6, "g": 10**9}


class Bytes(click.ParamType):
    """A size: 2G or 500M (powers of ten, as llama.cpp's gguf-split counts)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        matched = re.fullmatch(r"(\d{1,6})([mg])", str(value).strip().lower())
        if not matched or int(matched[1]) == 0:
            self.fail(f"{value!r} is not a size; 2G and 500M are", param, ctx)
        return int(matched[1]) * _UNITS[matched[2]]


@click.command(name="gguf", short_help="Bake a recipe into a GGUF for llama.cpp.")
@model_argument
@recipe_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The GGUF.")
@click.option("--type", "kind", metavar="TYPE", help="f32, f16, bf16, q8_0, q4_k_m and all others of llama.cpp; "
              "default: as stored.")  # fmt: skip
@adapter_option
@window_option
@click.option("--tokenizer-pre", "pre", metavar="NAME", help="What llama.cpp calls the tokenizer's way to split text.")
@click.option("--split-max-size", "split", type=Bytes(), help="Write several files of at most this size: 2G, 500M.")
@click.option("--fold-attention-factor", "fold", is_flag=True, help="Put the attention factor into q and k: exact, "
              "and it survives context shifts.")  # fmt: skip
@click.option("--static-long", "static", is_flag=True, help="The long factors alone, for every length.")
@click.option("--imatrix", type=click.Path(path_type=Path), metavar="FILE", help="Importance matrix (GGUF form).")
@click.option(
    "--llama-library", "library", metavar="PATH", help="libllama to quantise with; default: an installed one."
)
@click.option("--modelfile", is_flag=True, help="Also write an Ollama Modelfile with the right num_ctx.")
@click.option("--allow-lossy", "lossy", is_flag=True, help="Give up what llama.cpp can't do, and record it.")
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
    kind: str | None,
    adapter: str | None,
    window: int | None,
    pre: str | None,
    split: int | None,
    fold: bool,
    static: bool,
    imatrix: Path | None,
    library: str | None,
    modelfile: bool,
    lossy: bool,
    dry_run: bool,
    verify_too: bool,
    force: bool,
    revision: str | None,
) -> int | None:
    """Bake RECIPE into MODEL: a GGUF that llama.cpp, Ollama and LM Studio run with the recipe's factors.

    A GGUF as MODEL is re-baked: it gets factors and metadata, and no byte of its weights changes. That also repairs
    files whose rope scaling is incomplete.

    \b
    lrconvert recipe derive demo --method yarn --factor 8 --uniform -o demo-8x
    lrconvert gguf demo --recipe demo-8x --type q8_0 -o demo-32k.gguf
    """
    from lrconvert.checkpoint import open_model
    from lrconvert.checkpoint.adapter import choose_adapter, open_adapter
    from lrconvert.recipe import load_recipe, recipe_folder
    from lrconvert.targets import gguf

    options = gguf.Options(
        window=window,
        type=kind,
        static=static,
        fold=fold,
        lossy=lossy,
        tokenizer_pre=pre,
        split=split,
        imatrix=imatrix,
        modelfile=modelfile,
    )
    baked = load_recipe(recipe)
    chosen = choose_adapter(adapter, baked.adapter, recipe_folder(recipe))
    found = _library(library)
    planned = gguf.plan(
        open_model(model, revision=revision, tolerant=True),
        baked,
        output,
        options,
        adapter=None if chosen is None else open_adapter(chosen),
        library=found,
    )
    if not dry_run:
        from lrconvert.artifact.file_staging import check_files

        check_files(output, planned.names, force=force)
    _describe(planned, detailed=dry_run)
    if dry_run:
        out.hint("dry run: nothing was written")
        return None
    with out.byte_progress() as progress:
        manifest = gguf.write(planned, library=found, force=force, progress=progress)
    total = sum(record.size for record in manifest.files.values())
    out.say(f"{', '.join(str(output.parent / name) for name in manifest.files)}: {out.size(total)}")
    if verify_too:
        from lrconvert.cli.verify import command as verify_command

        return ctx.invoke(verify_command, artifact=output.parent / planned.names[0], library=library)
    out.hint(f"not verified yet: lrconvert verify {output.parent / planned.names[0]}")
    return None


def _library(path: str | None):
    """llama.cpp's library: the one named, an installed one, or None (whoever needs it says so)."""
    from lrconvert.errors import EnvironmentFailure
    from lrconvert.runtimes.llama_library import find_library

    try:
        return find_library(path)
    except EnvironmentFailure:
        if path is not None:
            raise
        return None


def _describe(planned, *, detailed: bool) -> None:
    spec = planned.spec
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(planned.types.items()))
    scheme = "weights as they are" if planned.scheme is None else planned.scheme.name
    out.say(
        f"{planned.model.reference} ({spec.family}): {spec.original_window} → {spec.window} tokens, {scheme}: {kinds}"
    )
    for key, value in planned.rope.items():
        out.say(f"  {key} = {value}")
    if detailed:
        for name, size in planned.sizes.items():
            out.say(f"  {name}: {out.size(size)}")
    for loss in planned.given_up:
        out.warn(f"given up: {loss}")
    for note in planned.notes:
        out.warn(note)
