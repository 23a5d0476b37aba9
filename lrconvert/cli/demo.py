# SPDX-License-Identifier: Apache-2.0
"""`lrconvert demo`: the whole path on the embedded model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import force_option
from lrconvert.cli._progress import show_progress
from lrconvert.machine import check_disk
from lrconvert.progress import Steps
from lrconvert.recipe import Recipe
from lrconvert.writing import replace_file

RECIPE = "demo-2048k"
LENGTHS = (4096, 8192, 16384)
ALL_LENGTHS = (*LENGTHS, 32768)
DISK = 25_000_000  # bytes: the artifact twice, since it is baked beside its place
KEYS = 16  # labelled keys hidden in one text, each asked for behind it


@dataclass(frozen=True)
class Measured:
    """One model at one length: perplexity of the same last tokens, and how many of `KEYS` keys it found."""

    length: int
    perplexity: float
    keys: int


@click.command(name="demo", short_help="Run the whole path on the embedded model, in about a minute.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("lrconvert-demo"), show_default=True, metavar="DIR",
    help="Folder for the results.",
)  # fmt: skip
@click.option("--full", is_flag=True, help="Verify every case, and measure up to 32k: a few minutes.")
@force_option
@click.pass_context
def command(ctx: click.Context, output: Path, full: bool, force: bool) -> int:
    """Bake an extension to two million tokens into the embedded model, verify the artifact, and show what it gained.

    It runs offline, in about a minute on two cores, and leaves its results in a folder. What two cores can't measure in
    that time is shown from the recipe's record.
    """
    from lrconvert.api.verifying import verify
    from lrconvert.artifact.manifest import MANIFEST
    from lrconvert.cli.hf import command as hf_command
    from lrconvert.cli.verify import row_printer, show
    from lrconvert.errors import ParityError, UsageError, require
    from lrconvert.evals.plotting import plot_before_after
    from lrconvert.recipe import load_recipe
    from lrconvert.recipe.plotting import plot_recipe

    for module in ("torch", "transformers", "matplotlib"):
        require(module, "demo", "the demo")
    artifact = output / RECIPE
    if output.exists() and not force:
        raise UsageError(f"{output} exists", remedy="Name another folder with -o, or replace it with --force")
    check_disk(output, DISK, "the demo")
    started = time.monotonic()
    _step(f"lrconvert hf demo --recipe {RECIPE} -o {artifact}")
    force_artifact = force and (artifact / MANIFEST).exists()
    ctx.invoke(hf_command, model="demo", recipe=RECIPE, output=artifact, copy=True, force=force_artifact)
    profile = "full" if full else "quick"
    _step(f"lrconvert verify {artifact} --profile {profile}")
    with show_progress() as progress:
        report = verify(artifact, profile=profile, progress=progress, watch=row_printer())
    show(report)
    _step(f"lrconvert recipe plot {RECIPE} -o {output / 'factors'}")
    recipe = load_recipe(RECIPE)
    out.say(" ".join(str(path) for path in plot_recipe(recipe, output / "factors")))
    _step(f"before and after: held-out text (the same last 1,024 tokens at every length) and {KEYS} keys hidden in it")
    lengths = ALL_LENGTHS if full else LENGTHS
    with show_progress() as progress:
        steps = Steps("measurements", progress)
        for length in lengths * 2:
            steps.expect(length)
        results = {"before": _measure(None, lengths, steps), "after": _measure(artifact, lengths, steps)}
        steps.finish()
    _show_results(results)
    _show_record(recipe)
    plot_before_after(results, output / "before-after.png", title=f"The embedded model, before and after {RECIPE}")
    plain = {name: [vars(row) for row in rows] for name, rows in results.items()}
    replace_file(output / "results.json", json.dumps(plain, indent=2) + "\n")
    out.say(f"\n{output}: {RECIPE}/ (the artifact), before-after.png, factors.png, factors.svg, results.json")
    out.say(report.summary)
    out.hint(
        f"{time.monotonic() - started:.0f} s. Next, on your own model: lrconvert inspect MODEL; "
        "lrconvert search MODEL --target 64k --text book.txt -o my-recipe (or, without a search: lrconvert recipe "
        "derive MODEL --method yarn --factor 8 -o my-recipe); lrconvert hf MODEL --recipe my-recipe -o my-model "
        "(or gguf, onnx)"
    )
    return 0 if report.passed else ParityError.exit_code


def _step(text: str) -> None:
    out.say(f"\n$ {text}")


def _measure(artifact: Path | None, lengths: Sequence[int], steps: Steps) -> list[Measured]:
    """Perplexity and keys of the artifact's own code, or of the unmodified model. A text is read once for all keys."""
    import numpy as np

    from lrconvert.checkpoint import locate
    from lrconvert.checkpoint.tokenizer import tokenizer_of
    from lrconvert.evals.perplexity import same_token_perplexity
    from lrconvert.evals.retrieval import evaluation_keys, measure_retrieval
    from lrconvert.runtimes.transformers import open_session
    from lrconvert.training.keys import LabelledForm

    source = locate("demo")
    encode, form = tokenizer_of(source), LabelledForm.read(evaluation_keys(source))
    text = np.asarray(encode((source / "heldout.txt").read_text(encoding="utf-8")))
    rows = []
    with open_session(artifact or source, custom=artifact is not None) as session:
        for length in lengths:
            steps.start(f"{'after' if artifact else 'before'}, {length:,} tokens", length)
            perplexity = same_token_perplexity(session, text, length)
            found = measure_retrieval(session, form, encode, [text], [length], keys=KEYS)
            rows.append(Measured(length, perplexity, sum(row.hits for row in found)))
    return rows


def _show_results(results: dict[str, list[Measured]]) -> None:
    rows = []
    for before, after in zip(results["before"], results["after"], strict=True):
        cells = [f"{before.perplexity:.1f}", f"{after.perplexity:.1f}"]
        cells += [f"{row.keys} of {KEYS}" for row in (before, after)]
        rows.append((f"{before.length:,}", *cells))
    columns = ("tokens", "perplexity before", "after", "keys before", "after")
    out.table(columns, rows, title="The embedded model (window 4096), before and after")


def _show_record(recipe: Recipe) -> None:
    """What the recipe says that a GPU measured, up to its whole window."""
    found = (recipe.evaluation or {}).get("measured", {})
    base = next(row["perplexity"]["value"] for key, row in found.items() if key.startswith("base"))
    before = f"{base:.1f} before, at {recipe.original_window:,}"
    lines = []
    for length in sorted({row["length"] for row in found.values()}):
        cells = [f"{found[f'perplexity@{length}']['perplexity']['value']:.1f}"]
        rows = (found[f"{kind}@{length}"] for kind in ("retrieval", "passkey"))
        lines.append((f"{length:,}", *cells, *(f"{row['hits']} of {row['trials']}" for row in rows)))
    title = f"From {recipe.name}'s record, measured on a GPU, of other excerpts than above ({before})"
    out.table(("tokens", "perplexity", "keys", "passkeys"), lines, title=title)
    out.say("perplexity: the same last 1,024 tokens of four excerpts; keys: all behind one text; passkeys: one by one")
