# SPDX-License-Identifier: Apache-2.0
"""`lrconvert demo`: the whole path on the embedded model."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import force_option
from lrconvert.cli._progress import show_progress
from lrconvert.progress import Steps

RECIPE = "demo-8x"
LENGTHS = (4096, 8192, 16384)
DEPTHS = {4096: (0.1, 0.5, 0.9), 8192: (0.1, 0.5, 0.9), 16384: (0.1, 0.5, 0.9)}  # passkey trials: one per depth


@dataclass(frozen=True)
class Measured:
    """One model at one length."""

    length: int
    perplexity: float
    passkey: float | None


@click.command(name="demo", short_help="Run the whole path on the embedded model, in about three minutes.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("lrconvert-demo"), show_default=True, metavar="DIR"
)
@force_option
@click.pass_context
def command(ctx: click.Context, output: Path, force: bool) -> int:
    """Bake a searched recipe into the embedded model, verify the artifact, and show what it gained.

    It runs offline, in about three minutes on two cores, and leaves its results in a folder.
    """
    from lrconvert.api.verifying import verify
    from lrconvert.artifact.manifest import MANIFEST
    from lrconvert.cli.hf import command as hf_command
    from lrconvert.cli.verify import row_printer, show
    from lrconvert.errors import ParityError, UsageError, require
    from lrconvert.recipe import load_recipe
    from lrconvert.recipe.plotting import plot_recipe

    for module in ("torch", "transformers", "matplotlib"):
        require(module, "demo", "the demo")
    artifact = output / "demo-32k"
    if output.exists() and not force:
        raise UsageError(f"{output} exists", remedy="Name another folder with -o, or replace it with --force")
    started = time.monotonic()
    _step(f"lrconvert hf demo --recipe {RECIPE} -o {artifact}")
    force_artifact = force and (artifact / MANIFEST).exists()
    ctx.invoke(hf_command, model="demo", recipe=RECIPE, output=artifact, copy=True, force=force_artifact)
    _step(f"lrconvert verify {artifact}")
    with show_progress() as progress:
        report = verify(artifact, progress=progress, watch=row_printer())
    show(report)
    _step(f"lrconvert recipe plot {RECIPE} -o {output / 'factors'}")
    out.say(" ".join(str(path) for path in plot_recipe(load_recipe(RECIPE), output / "factors")))
    _step("before and after: held-out text and passkeys (the same last 1,024 tokens at every length)")
    with show_progress() as progress:
        steps = Steps("measurements", progress)
        for length in LENGTHS * 2:
            steps.expect(_cost(length))
        results = {"before": _measure(None, steps), "after": _measure(artifact, steps)}
        steps.finish()
    _show_results(results)
    plain = {name: [vars(row) for row in rows] for name, rows in results.items()}
    (output / "results.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    out.say(f"\n{output}: demo-32k/ (the artifact), factors.png, factors.svg, results.json")
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


def _cost(length: int) -> int:
    """Tokens read at a length."""
    return length * (1 + len(DEPTHS.get(length, ())))


def _measure(artifact: Path | None, steps: Steps) -> list[Measured]:
    """Perplexity and passkey of the artifact's own code, or of the unmodified model."""
    from lrconvert.checkpoint import locate
    from lrconvert.checkpoint.tokenizer import tokenizer_of
    from lrconvert.evals.passkey import PasskeyFormat, passkey_accuracy
    from lrconvert.evals.perplexity import same_token_perplexity
    from lrconvert.runtimes.transformers import open_session

    source = locate("demo")
    encode, form = tokenizer_of(source), PasskeyFormat.read(source / "passkey.json")
    text = encode((source / "heldout.txt").read_text(encoding="utf-8"))
    rows = []
    with open_session(artifact or source, custom=artifact is not None) as session:
        for length in LENGTHS:
            steps.start(f"{'after' if artifact else 'before'}, {length:,} tokens", _cost(length))
            passkey = passkey_accuracy(session, form, encode, length, DEPTHS[length]) if length in DEPTHS else None
            rows.append(Measured(length, same_token_perplexity(session, text, length), passkey))
    return rows


def _show_results(results: dict[str, list[Measured]]) -> None:
    from rich.table import Table

    table = Table(title="The embedded model (window 4096), before and after")
    for name in ("tokens", "perplexity before", "after", "passkey before", "after"):
        table.add_column(name, justify="right")
    for before, after in zip(results["before"], results["after"], strict=True):
        trials = len(DEPTHS.get(before.length, ()))
        cells = [f"{before.perplexity:.1f}", f"{after.perplexity:.1f}"]
        scores = [None if row.passkey is None else round(row.passkey * trials) for row in (before, after)]
        cells += ["" if score is None else f"{score} of {trials}" for score in scores]
        table.add_row(f"{before.length:,}", *cells)
    out.console().print(table)
