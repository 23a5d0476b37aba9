# SPDX-License-Identifier: Apache-2.0
"""`lrconvert push`: publish an artifact on the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lrconvert.cli import _output as out
from lrconvert.cli._progress import show_progress

if TYPE_CHECKING:
    from lrconvert.hub.publish import Plan


@click.command(name="push", short_help="Publish an artifact on the Hugging Face Hub.")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("name", metavar="NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--force",
    is_flag=True,
    help="Publish an artifact that failed verification; write into a repository with other content.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be uploaded and deleted, and every difference from the files here; change nothing. "
    "Works without a token and offline.",
)
def command(
    artifacts: tuple[Path, ...], name: str, private: bool = False, force: bool = False, dry_run: bool = False
) -> None:
    """Publish ARTIFACT, a folder or GGUF files that lrconvert wrote, on the Hub as NAME (OWNER/NAME).

    One commit with the artifact's files, its model card with the last parity report, and its manifest without
    local paths. Several GGUF files, at once or one after the other, become quantisations in one repository. Needs a
    token with write access: `hf auth login`.

    \b
    lrconvert push my-model me/my-model --dry-run
    lrconvert push my-model-q8.gguf my-model-q4.gguf me/my-model-GGUF
    """
    from lrconvert import hub

    quiet_client()
    with show_progress() as progress:
        planned = hub.plan(artifacts, name, private=private, force=force, dry=dry_run, progress=progress)
    describe(planned)
    if dry_run:
        for diff in planned.changes.values():
            out.say(diff)
    planned.check(force=force)
    if dry_run:
        out.hint("dry run: nothing was uploaded")
        return
    with show_progress(bar=False) as progress:  # on a terminal the client has bars of its own
        done = hub.upload(planned, force=force, progress=progress)
    out.say(done.url if done.changed else f"{planned.repo} is already up to date: {done.url}")


def describe(planned: Plan) -> None:
    """What would change on the Hub, before anything does."""
    state = "private" if planned.private else "public"
    who = "the Hub was not asked" if planned.account is None else f"with the {planned.account}"
    branch = f", branch {planned.revision}" if planned.revision else ""
    out.say(f"{planned.repo}{branch} ({'new, ' if planned.head is None else ''}{state}), {who}")
    for name, size in planned.sizes.items():
        out.say(f"  {name}: {out.size(size)}")
    for name in planned.deleted:
        out.say(f"  {name}: deleted on the Hub")
    for found in planned.foreign:
        out.warn(f"{planned.repo} holds other content: {found}")
    for warning in planned.warnings:
        out.warn(warning)


def quiet_client() -> None:
    """Silence the client; without a terminal, its progress bars too."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
