# SPDX-License-Identifier: Apache-2.0
"""What the evaluations share: options, and how a result is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import SEED, TOKENS, OutputName, Precision, Registered, trust_code_option
from lrconvert.cli._progress import show_progress
from lrconvert.runtimes import backend_choices

if TYPE_CHECKING:
    from lrconvert.evals.api import Evaluation

Evaluate = Callable[..., "Evaluation"]
Table = tuple[Sequence[str], Iterable[Sequence[str]]]  # columns and rows


class Lengths(click.ParamType):
    """Several numbers of tokens, with commas between."""

    name = "tokens,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(sorted({TOKENS.convert(part, param, ctx) for part in str(value).split(",")}))


lengths_option = click.option("--lengths", type=Lengths(), required=True, metavar="TOKENS,…",
                        help="Lengths to measure at, in tokens: 4k,8k,16k.")  # fmt: skip


class Names(click.ParamType):
    """Several names, each once, with commas between."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(","))
        if not all(names) or len(set(names)) < len(names):
            self.fail(f"{value!r} is not a comma-separated list of distinct names", param, ctx)
        return names


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every evaluation."""
    options = (
        click.argument("artifact", metavar="MODEL|ARTIFACT"),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of everything random."),
        click.option("--recipe", metavar="RECIPE", help="Evaluate a plain model under this recipe."),
        click.option(
            "--code",
            type=Registered(lambda: [*backend_choices(), "reference"]),
            help="Backend to evaluate: native or custom (folders), or lrconvert's reference "
            "implementation. Default: the artifact's own.",
        ),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …"),
        click.option("--dtype", type=Precision(), help="What a folder computes in; default: f32."),
        click.option("--threads", type=click.IntRange(1), help="Threads of the runtime."),
        click.option("--llama-library", "library", metavar="PATH", help="libllama for a GGUF."),
        trust_code_option,
        click.option(
            "-o", "--output", type=OutputName(".json", ".png"), metavar="STEM", help="Write STEM.json and STEM.png."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def run(evaluate: Evaluate, table: Callable[[Evaluation], Table], *, as_json: bool, **options: Any) -> None:
    """One evaluation with its options, shown as a table or as JSON."""
    with show_progress(quiet=as_json) as progress:
        found = evaluate(options.pop("artifact"), progress=progress, **options)
    for text in found.warnings:
        out.warn(text)
    if as_json:
        out.data(found.result)
    else:
        _show(found, *table(found))
    if found.incomparable is not None:
        raise found.incomparable


def _show(found: Evaluation, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    out.table(columns, rows, title=found.title)
    out.say(found.protocol)
    info = found.result["runtime"]
    versions = ", ".join(f"{key} {value}" for key, value in info.items() if key not in ("class", "dtype", "device"))
    out.say(f"{info['class']} in {info['dtype']} on {info['device']}, {versions}")
