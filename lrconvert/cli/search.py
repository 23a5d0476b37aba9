# SPDX-License-Identifier: Apache-2.0
"""`lrconvert search`: find the factor sets of a recipe."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import (
    SEED,
    TOKENS,
    Number,
    OutputName,
    Precision,
    Registered,
    force_option,
    model_argument,
    optional_text_option,
    revision_option,
)
from lrconvert.cli._progress import show_progress
from lrconvert.engines.capability import SEARCHABLE
from lrconvert.progress import Progress, Step

if TYPE_CHECKING:
    from lrconvert.recipe import Recipe
    from lrconvert.searching.api import Watch
    from lrconvert.searching.plan import SearchPlan
    from lrconvert.searching.run import Progress as Evaluated

PIPED_SECONDS = 60.0  # between two lines of progress where no terminal shows a bar: a search takes hours


class WeightedLengths(click.ParamType):
    """Lengths with weights: 8k:0.5,64k:0.5. The weight is 1 where none is given."""

    name = "tokens:weight,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[int, float]:
        if isinstance(value, dict):
            return value
        found: dict[int, float] = {}
        for part in str(value).split(","):
            matched = re.fullmatch(r"([^:]+)(?::(\d+\.?\d*|\.\d+))?", part.strip())
            if not matched or not 0 < (weight := float(matched[2] or 1)) < math.inf:
                self.fail(f"{part!r} is not a length with a weight above 0; 8k:0.5 is", param, ctx)
            if (length := TOKENS.convert(matched[1], param, ctx)) < 2:
                self.fail("a length of 1 has no token to predict", param, ctx)
            found[length] = weight
        return found


class TierLength(click.ParamType):
    """`short`, `long`, or a number of tokens."""

    name = "short|long|tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        return value if value in ("short", "long") else TOKENS.convert(value, param, ctx)


@click.command(name="search", short_help="Find a recipe's factor sets on your own text.")
@model_argument
@click.option("--target", type=TOKENS, required=True, help="The window to reach, in tokens: 64k.")
@optional_text_option
@click.option("-o", "--output", type=OutputName(".journal.jsonl"), required=True, metavar="RECIPE",
              help="Folder or .json file for the recipe.")  # fmt: skip
@click.option("--algorithm", type=click.Choice(["guided", "evolution"]), default="guided", show_default=True,
              help="evolution is the LongRoPE paper's; guided needs fewer evaluations.")  # fmt: skip
@click.option("--space", type=click.Choice(["longrope", "longrope2"]), default="longrope", show_default=True,
              help="Candidates: the factor sets of the LongRoPE paper or of LongRoPE2.")  # fmt: skip
@click.option("--objective", type=click.Choice(["perplexity", "needle", "mixed"]), default="perplexity",
              show_default=True, help="What to minimise: the loss of texts, of hidden keys, or of both.")  # fmt: skip
@click.option("--lengths", type=WeightedLengths(), metavar="TOKENS:WEIGHT,…",
              help="Lengths to evaluate at, with weights: 8k:0.5,64k:0.5; default: the target alone.")  # fmt: skip
@click.option("--documents", type=click.IntRange(1), default=1, show_default=True,
              help="Documents of the target's length in one evaluation; the paper uses 5.")  # fmt: skip
@click.option("--tier", "tiers", type=TierLength(), multiple=True,
              help="Which set to search: short (original window), long (target) or a length. May be repeated; "
              "default: short and long.")  # fmt: skip
@click.option("--budget", type=click.IntRange(1), metavar="EVALS",
              help="Evaluations for the long set; the short one gets a quarter. Default: the algorithm's.")  # fmt: skip
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of everything random.")
@click.option("--start-from", metavar="RECIPE",
              help="Start from this recipe's sets, and keep those not searched.")  # fmt: skip
@click.option("--for", "runtime", type=Registered(lambda: SEARCHABLE),
              help="Only sets that this runtime can express; any: all can. Default: what Hugging Face folders and ONNX "
              "can.")  # fmt: skip
@click.option("--on", metavar="RECIPE",
              help="Search on top of this recipe, which the model has already, with its adapter.")  # fmt: skip
@click.option("--from-plain", is_flag=True, help="For a scaled model: start from the plain rotation and the original "
              "window; default: from its own factors and its own window.")  # fmt: skip
@click.option(
    "--row-length",
    type=TOKENS,
    help="Evaluate rows of this many tokens whose positions jump over the target; for models trained on such rows.",
)
@click.option("--journal", type=click.Path(path_type=Path), metavar="FILE",
              help="Where to record every evaluation; default: RECIPE.journal.jsonl.")  # fmt: skip
@click.option("--attention-factor", type=Number(0),
              help="Attention factor of the long set; default: LongRoPE's formula.")  # fmt: skip
@click.option("--start-tokens", is_flag=True, help="Search the number of start tokens too; default: there are none.")
@click.option("--uniform", is_flag=True,
              help="Give all sets the long set's attention factor, for runtimes with one factor.")  # fmt: skip
@click.option("--allow-concatenate", is_flag=True, help="Join texts that are shorter than the target.")
@click.option("--form", type=click.Path(path_type=Path), metavar="FILE",
              help="passkey.json with the sentences of needle documents.")  # fmt: skip
@click.option("--original-window", type=TOKENS, help="Override the window that the model's config says it serves.")
@click.option("--name", help="The recipe's name; default: the output's.")
@click.option("--device", help="cpu, cuda, cuda:1 …; default: a GPU if there is one.")
@click.option("--dtype", type=Precision(), help="Default: bf16 on a GPU, f32 on a CPU.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of PyTorch on a CPU; default: PyTorch's own number.")
@click.option("--attention", type=click.Choice(["cudnn", "flash", "efficient", "math"]),
              help="Attention kernel on a GPU; default: the fastest measured.")  # fmt: skip
@click.option("--context-parallel", type=click.IntRange(1), default=1, metavar="N",
              help="Split each document over N of torchrun's processes.")  # fmt: skip
@click.option("--shard-weights", is_flag=True, help="Split the weights over torchrun's processes (FSDP).")
@click.option("--adapter", metavar="PATH|HUB_ID", help="Merge this LoRA adapter for the search.")
@click.option("--dry-run", is_flag=True, help="Print what would be evaluated and what it costs.")
@force_option
@revision_option
def command(model: str, output: Path, dry_run: bool, row_length: int | None, **options: Any) -> None:
    """Find factor sets for MODEL that keep its loss low up to the target window.

    Every evaluation is recorded in the journal. After an interruption the same command continues from there.

    \b
    lrconvert search MODEL --target 64k --text book.txt -o recipes/my-model-64k
    lrconvert search MODEL --target 64k --text books/ --algorithm evolution --documents 5 -o recipes/paper
    torchrun --nproc-per-node 8 --no-python lrconvert search MODEL --target 256k --text books/ -o recipes/long
    """
    from lrconvert.recipe import check_output
    from lrconvert.searching.api import search
    from lrconvert.searching.journal import journal_path
    from lrconvert.searching.objective import JumpingRows
    from lrconvert.searching.plan import plan_search
    from lrconvert.searching.request import SearchRequest
    from lrconvert.training.devices import is_leading

    options["rows"] = None if row_length is None else JumpingRows(row_length)

    if dry_run:
        check_output(output, force=True)
        given = {field.name: options[field.name] for field in fields(SearchRequest) if field.name in options}
        place = {name: options[name] for name in ("device", "dtype", "threads")}
        _show_cost(plan_search(SearchRequest(model=model, output=output, **given)), place)
        return
    try:
        with _watching() as watch:
            found = search(model, output=output, watch=watch, **options)
    except KeyboardInterrupt:
        journal = options["journal"] or journal_path(output)
        if journal.is_file() and is_leading():
            out.hint(f"\nevery evaluation so far is in {journal}. To continue, run the same command again:")
            out.hint(shlex.join(["lrconvert", *sys.argv[1:]]))
        raise
    if not found.leading:
        return
    recipe = found.recipe
    for text in recipe.warnings():
        out.warn(text)
    _summary(recipe)
    out.say(f"{found.path}: {out.count(len(recipe.tiers), 'tier')}, up to {recipe.tiers[-1].max_length} tokens")
    baked = recipe.name if output.resolve() != Path(recipe.name).resolve() else f"{recipe.name}-model"
    out.hint(f"next: {shlex.join(['lrconvert', 'hf', model, '--recipe', str(output), '-o', baked])}")


# --- output --------------------------------------------------------------------------------------------------


def _show_cost(plan: SearchPlan, place: dict[str, Any]) -> None:
    from lrconvert.errors import require
    from lrconvert.searching.plan import costs

    for note in plan.notes:
        out.warn(note)
    found = costs(plan)
    for cost in found:
        documents = f"{out.count(cost.documents, 'document')}, {cost.tokens:,} tokens"
        out.say(
            f"set for {cost.length:,} tokens: {out.count(cost.evaluations, 'evaluation')} of {documents} and "
            f"{cost.operations / 1e12:.3g} TFLOP each"
        )
    total = sum(cost.evaluations * cost.operations for cost in found)
    for module in ("torch", "transformers"):
        require(module, "search", "measuring how fast this device is")
    from lrconvert.searching.estimate import measured_device

    device = measured_device(plan, **place)
    rows = " and ".join(f"{length:,}" for length in device.rows)
    out.say(
        f"in total {total / 1e15:.3g} PFLOP: about {out.duration(device.seconds(plan))} on {device.name}, "
        f"by what rows of {rows} tokens took"
    )


def _summary(recipe: Recipe) -> None:
    rows = []
    for tier in (recipe.evaluation or {}).get("tiers", []):
        for key, loss in tier["losses"].items():
            starts = {name: losses[key] for name, losses in tier["starts"].items() if key in losses}
            best = min(starts, key=lambda name: starts[name], default="")
            rows.append((f"{tier['max_length']:,}", key, f"{loss:.4f}", best, f"{starts[best]:.4f}" if best else ""))
    columns = ("set for", "length", "searched", "start", "best start's loss")
    out.table(columns, rows, title=f"{recipe.name}: losses on the text of the search (nats per token)")


@contextlib.contextmanager
def _watching() -> Iterator[Watch]:
    """Shows notes, and progress from the first evaluation on."""
    from lrconvert.searching.api import Note

    with contextlib.ExitStack() as stack:
        show: Progress | None = None

        def watch(event: Any) -> None:
            nonlocal show
            if isinstance(event, Note):
                (out.warn if event.warning else out.hint)(event.text)
                return
            if show is None:
                show = stack.enter_context(show_progress(every=PIPED_SECONDS))
            show(_step(event))

        yield watch


def _step(now: Evaluated) -> Step:
    """Evaluations differ in cost: the budget says how much is done, and what one took how long the rest takes."""
    left = None if now.seconds is None else now.seconds * (now.budget - now.spent)
    what, share = f"best loss {now.best:.4f}", now.spent / now.budget
    return Step(f"set for {now.length:,} tokens", what, now.evaluations, unit="evaluations", share=share, left=left)
