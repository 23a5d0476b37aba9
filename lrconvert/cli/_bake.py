# SPDX-License-Identifier: Apache-2.0
"""What all bake commands share: options, and plan → bake → verify in that order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import TOKENS, force_option, model_argument, revision_option
from lrconvert.cli._progress import show_progress
from lrconvert.cli._steps import MOST_NAME, SUFFIXES

if TYPE_CHECKING:
    from lrconvert.artifact.plan import Plan


RECIPE_HELP = (
    "Recipe file, folder or shipped name; or a config.json, a model or a Hub id whose rotation to take. "
    "Default: the rotation that MODEL carries."
)


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Model, recipe, adapter, window, embedding and --text-only; --dry-run, --verify, --force, --verbose."""
    options = (
        model_argument,
        click.option("--recipe", metavar="RECIPE", help=RECIPE_HELP),
        click.option("--adapter", metavar="PATH|HUB_ID", help="Merge this LoRA adapter; default: the recipe's."),
        click.option("--window", type=TOKENS, help="Stop at this window instead of the recipe's last tier."),
        click.option(
            "--lift-sliding-window",
            "lift",
            is_flag=True,
            help="Let every layer attend to every token, where the model's own attend to the last ones only.",
        ),
        click.option(
            "--pad-embedding", "pad", is_flag=True, help="Add rows to an embedding that is smaller than the tokenizer."
        ),
        click.option(
            "--text-only", is_flag=True, help="Convert only the language model of one that reads images or sound too."
        ),
        click.option("--dry-run", is_flag=True, help="Print what would be written; write nothing."),
        click.option("--verify", "verify_too", is_flag=True, help="Run `lrconvert verify` on the artifact."),
        click.option("--verbose", is_flag=True, help="Show every file, edit and engine."),
        force_option,
        revision_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def run(
    target: str,
    options: Any,
    shared: dict[str, Any],
    *,
    link: bool | None = None,
    before: Callable[[Plan], None] | None = None,
    describe: Callable[[Plan, bool], None] | None = None,
) -> int | None:
    """Plan, describe and bake, then verify if requested; the exit code of `verify`, None without.

    `before` may refuse after all other checks have passed; `describe` adds to the output about the plan.
    """
    from lrconvert.api.baking import plan_bake
    from lrconvert.artifact.bake import bake, check_name, check_place

    force, dry = shared["force"], shared["dry_run"]
    shared["output"] = shared["output"] or default_output(target, shared["model"], shared["recipe"])
    if not dry:
        check_name(shared["output"], force=force)
    plan = plan_bake(
        target,
        shared["model"],
        shared["recipe"],
        shared["output"],
        options,
        adapter=shared["adapter"],
        revision=shared["revision"],
        text_only=shared["text_only"],
    )
    if not dry:
        check_place(plan, force=force)
        if before is not None:
            before(plan)
    show(plan, detailed=dry or shared["verbose"])
    if describe is not None:
        describe(plan, dry or shared["verbose"])
    warn(plan)
    if dry:
        out.hint("dry run: nothing was written")
        return None
    with show_progress() as progress:
        manifest = bake(plan, force=force, link=link, progress=progress)
    total = sum(record.size for record in manifest.files.values())
    linked = sum(record.linked for record in manifest.files.values())
    shares = f", {linked} of them hard links to the source (editing one edits both)" if linked else ""
    out.say(f"{shared['output']}: {out.count(len(manifest.files), 'file')}, {out.size(total)}{shares}")
    if not shared["verify_too"]:
        out.hint(f"not verified yet: lrconvert verify {plan.opens}")
        return None
    from lrconvert.cli.verify import command as verify_command

    library = {"library": options.library} if getattr(options, "library", None) else {}
    return click.get_current_context().invoke(verify_command, artifact=plan.opens, **library)


def show(plan: Plan, *, detailed: bool) -> None:
    """What will be written: one line, and with `detailed` every edit and file."""
    spec = plan.spec
    out.say(f"{plan.model.reference} ({spec.family}): {spec.original_window} → {spec.window} tokens, {plan.headline}")
    if not detailed:
        edited = Counter(edit.file for edit in plan.edits)
        counted = [f"{out.count(number, 'edit')} in {name}" for name, number in edited.items()]
        if counted:
            out.say(f"  {', '.join(counted)} (--verbose lists them)")
        return
    for edit in plan.edits:
        out.say(f"  {edit}")
    for name, size in plan.sizes.items():
        how = "generated" if name in plan.texts else "copied" if name in plan.copies else "converted"
        out.say(f"  {name}: {out.size(size)}, {how}")


def warn(plan: Plan) -> None:
    """What the artifact does not do, and what its user must know."""
    from lrconvert.engines.ways_out import to_form

    for loss in plan.dropped:
        out.warn(f"dropped: {loss}")
    for loss in plan.losses:
        out.warn(f"without trust_remote_code: {loss}")
    if plan.losses and (way := to_form(plan.recipe)):
        out.hint(f"without trust_remote_code, {way}")
    for note in plan.notes:
        out.warn(note)


def output_option(metavar: str, text: str) -> Callable[..., Any]:
    """-o; without it the output is named for what it is made from."""
    text = f"{text}  [default: MODEL-RECIPE in the current folder]"
    return click.option("-o", "--output", type=click.Path(path_type=Path), metavar=metavar, help=text)


def default_output(target: str, model: str, recipe: str | None) -> Path:
    """The name of an artifact in the current folder: its model's and its recipe's. It is never the model itself."""
    names = [_stem(each) for each in (model, recipe) if each is not None]
    name = "-".join([*names, *(["onnx"] if target == "onnx" else [])])[:MOST_NAME] + SUFFIXES.get(target, "")
    path = Path(name)
    if path.resolve() == Path(model).resolve():
        path = path.with_name(f"{path.name.removesuffix(path.suffix)}-{target}{SUFFIXES.get(target, '')}")
    return path


def _stem(reference: str) -> str:
    """Of a folder, a file or a Hub id, its own name."""
    from lrconvert.recipe import RECIPE_FILE

    # Not where a link leads: in a cache that is a digest.
    path = Path(os.path.normpath(Path.cwd() / reference))
    named = path.parent if path.name in (RECIPE_FILE, "config.json") else path
    return (named.stem if named.suffix in (".gguf", ".json") else named.name).replace(":", "-")  # OWNER/NAME:Q4_K_M
