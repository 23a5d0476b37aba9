# SPDX-License-Identifier: Apache-2.0
"""`lrconvert extend`: search, fine-tune and search again, up to a window many times the model's own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import (
    SEED,
    TOKENS,
    OutputName,
    Precision,
    Registered,
    force_option,
    model_argument,
    revision_option,
    text_option,
)
from lrconvert.cli._progress import show_progress
from lrconvert.engines.capability import SEARCHABLE

if TYPE_CHECKING:
    from lrconvert.extending.api import ExtendResult
    from lrconvert.extending.estimate import Estimate
    from lrconvert.extending.run import Finished

PIPED_SECONDS = 30.0  # between two lines of progress where no terminal shows a bar: stages take minutes


@click.command(name="extend", short_help="Fine-tune and search a recipe for a much longer window.")
@model_argument
@text_option
@click.option("-o", "--output", type=OutputName(), required=True, metavar="RECIPE",
              help="Folder for the recipe and its adapter.")  # fmt: skip
@click.option("--plan", default="small", show_default=True, metavar="PLAN",
              help="The stages: a .toml file, or a built-in plan (paper, small, demo; with --on also small-far, "
              "small-any, demo-far, demo-any, demo-calibrate).")  # fmt: skip
@click.option("--target", type=TOKENS, help="Stop at this window instead of the plan's last one: 512k.")
@click.option("--on", metavar="RECIPE",
              help="Begin with the sets and adapter of this recipe, not with the model as it is.")  # fmt: skip
@click.option("--held-out", multiple=True, metavar="TEXT",
              help="Text to evaluate on, like --text; default: the last tenth of each text.")  # fmt: skip
@click.option("--for", "runtime", type=Registered(lambda: SEARCHABLE),
              help="Only sets that this runtime can express; any: all can. Default: what Hugging Face folders and ONNX "
              "can.")  # fmt: skip
@click.option("--until", metavar="STAGE", help="Stop after this stage: 2-tune.")
@click.option("--from", "again", metavar="STAGE", help="Repeat this stage and all later ones.")
@click.option("--work", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder for the results of the stages; default: RECIPE.work.")  # fmt: skip
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of everything random.")
@click.option("--name", help="The recipe's name; default: the output's.")
@click.option("--device", help="cpu, cuda, cuda:1 …; default: a GPU if there is one.")
@click.option("--dtype", type=Precision("f32", "bf16"), help="Default: bf16 on a GPU, f32 on a CPU.")  # fmt: skip
@click.option("--attention", type=click.Choice(["cudnn", "flash", "efficient", "math"]),
              help="Attention kernel on a GPU; default: the fastest measured.")  # fmt: skip
@click.option("--context-parallel", type=click.IntRange(1), default=1, metavar="N",
              help="Split each row over N of torchrun's processes.")  # fmt: skip
@click.option("--shard-weights", is_flag=True, help="Split the weights over torchrun's processes (FSDP).")
@click.option("--dry-run", is_flag=True, help="Print time and memory of every stage, estimated on this device.")
@force_option
@revision_option
def command(model: str, output: Path, dry_run: bool, **options: Any) -> None:
    """Extend MODEL by the stages of a plan: search, fine-tune, search again, recover the short window, evaluate.

    Every stage leaves its result. After an interruption the same command continues from there.

    \b
    lrconvert extend MODEL --text books/ -o recipes/my-model-2048k
    lrconvert extend MODEL --text books/ --plan plan.toml --until 2-tune -o recipes/my-model-256k
    lrconvert extend MODEL --text books/ --on recipes/my-model-2048k --plan small-any --for any -o my-model-any
    """
    from lrconvert.extending.api import estimate_extension, extend
    from lrconvert.training.devices import is_leading

    if dry_run:
        given = {key: value for key, value in options.items() if key not in ("seed", "name", "force")}
        with show_progress() as progress:
            found = estimate_extension(model, output=output, progress=progress, **given)
        if is_leading():
            column = "memory, at least" if any(stage.least for stage in found) else "GPU memory"
            _stages(f"{output.name}: estimated", found, column)
        return
    try:
        with show_progress(every=PIPED_SECONDS) as progress:
            found = extend(model, output=output, progress=progress, **options)
    except KeyboardInterrupt:
        out.hint("\nfinished stages and the state of the last one are kept. To continue, run the same command again:")
        out.hint(shlex.join(["lrconvert", *sys.argv[1:]]))
        raise
    if not found.leading:
        return
    _summary(found)
    if found.path is None:
        out.hint(f"stopped after {found.stages[-1].name}; omit --until to go on")
        return
    out.say(f"{found.path}: {out.count(len(found.recipe.tiers), 'tier')}, up to {found.recipe.tiers[-1].max_length:,}")
    baked = f"{output.name}-model"
    out.hint(f"next: {shlex.join(['lrconvert', 'hf', model, '--recipe', str(output), '-o', baked])}")


def _stages(title: str, stages: Sequence[Estimate | Finished], column: str = "GPU memory") -> None:
    memory = any(stage.memory for stage in stages)
    rows = [
        (
            stage.name,
            out.duration(stage.seconds),
            *([out.size(stage.memory) if stage.memory else ""] if memory else []),
        )
        for stage in stages
    ]
    out.table(("stage", "time", *([column] if memory else [])), rows, title=title)
    out.say(f"in total {out.duration(sum(stage.seconds for stage in stages))}")


def _summary(found: ExtendResult) -> None:
    for note in found.notes:
        out.warn(note)
    _stages(f"{found.recipe.name}: stages", found.stages)
    measured = (found.recipe.evaluation or {}).get("measured", {})
    for key, value in measured.items():
        kind, _, length = key.partition("@")
        shown = (
            f"{value['perplexity']['value']:.4g}" if "perplexity" in value else f"{value['hits']} of {value['trials']}"
        )
        out.say(f"{kind} at {int(length):,}: {shown}")
