# SPDX-License-Identifier: Apache-2.0
"""`lrconvert eval benchmarks`: short questions, before and after an extension."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import TOKENS
from lrconvert.cli._evals import opened_session, plotted, report, shared_options, subject_of

if TYPE_CHECKING:
    from lrconvert.evals.earlier import Difference
    from lrconvert.evals.scores import BenchmarkRow


class Names(click.ParamType):
    """Several names, each once, with commas between."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(","))
        if not all(names) or len(set(names)) < len(names):
            self.fail(f"{value!r} is not a list of different names with commas between", param, ctx)
        return names


@click.command()
@shared_options
@click.option("--tasks", type=Names(), required=True, metavar="NAME,…",
              help="arc_challenge, hellaswag, mmlu, truthfulqa_mc2; without --data any of lm-eval's.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Read JSON lines from this folder; default: lm-eval's own data, from the Hub.")  # fmt: skip
@click.option("--shots", type=click.IntRange(0), help="Examples before every question; default: 25, 10, 5, 0.")
@click.option("--limit", type=click.IntRange(2), help="So many questions a task, drawn by the seed; default: all.")
@click.option("--batch-tokens", type=TOKENS, help="Tokens in a batch; default: 4k, with CUDA 32k.")
@click.option("--against", type=click.Path(path_type=Path), metavar="FILE",
              help="The JSON of an earlier result: also the difference from it.")  # fmt: skip
def benchmarks(
    tasks: tuple[str, ...],
    data: Path | None,
    shots: int | None,
    limit: int | None,
    batch_tokens: int | None,
    against: Path | None,
    **shared: Any,
) -> None:
    """Short benchmarks through lm-eval, with the shots of the LongRoPE paper.

    \b
    lrconvert eval benchmarks MODEL --tasks arc_challenge,hellaswag --data DIR -o before
    lrconvert eval benchmarks my-model --tasks arc_challenge,hellaswag --data DIR --against before.json
    """
    from lrconvert.errors import require

    subject = subject_of(shared)  # what is wrong with it is said before lm-eval is imported, which takes seconds
    lm_eval = require("lm_eval", "eval", "an evaluation on benchmarks")
    from lrconvert.evals.benchmarks import measure_benchmarks, protocol, session_model
    from lrconvert.evals.earlier import changed_prompts, check_comparable, differences, read_earlier
    from lrconvert.evals.plotting import plot_benchmarks
    from lrconvert.evals.tasks import prepare

    seed = shared["seed"]
    earlier = None if against is None else read_earlier(against)
    with out.spinner(quiet=shared["as_json"]) as say:
        say("questions")
        asked = prepare(tasks, folder=data, shots=shots, limit=limit, seed=seed)
    files = {name: digest for benchmark in asked for name, digest in benchmark.files.items()}
    if earlier is not None:
        check_comparable(earlier, asked, files, seed)
    if shots and (fixed := [found.name for found in asked if found.shots != shots]):
        out.warn(f"--shots does not apply to {', '.join(fixed)}, which has examples of its own")
    with opened_session(shared) as (session, _, say):
        most = batch_tokens or _batch_tokens(shared["device"])
        model = session_model(session, subject.artifact, most, progress=say)
        rows = measure_benchmarks(model, asked, seed)
        info = session.info
    refused = changed_prompts(earlier, rows) if earlier else None
    found = differences(earlier, rows) if earlier and not refused else []
    if earlier and earlier.truncated != model.effort.truncated:
        out.warn(f"{earlier.truncated} prompts were cut at its window then, {model.effort.truncated} now")
    result = {
        "evaluation": "benchmarks",
        "protocol": protocol(asked, limit),
        "lm_eval": lm_eval.__version__,
        "files": files,
        "window": model.window,
        **asdict(model.effort),
        "rows": [row.to_json() for row in rows],
    }
    if found and earlier:
        result["against"] = {"artifact": earlier.artifact, "rows": [asdict(difference) for difference in found]}
    columns, table = _table(rows, found)
    report(shared, info, result, columns, table)
    plotted(shared, lambda path: plot_benchmarks(rows, path))
    if refused:
        raise refused


def _batch_tokens(device: str) -> int:
    from lrconvert.evals.benchmarks import BATCH_TOKENS

    return BATCH_TOKENS["cuda" if device.startswith("cuda") else "cpu"]


def _table(rows: list[BenchmarkRow], found: list[Difference]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = ("task", "shots", "questions", "metric", "score (95 %)") + (("difference (95 %)",) if found else ())
    table = [
        (row.task, str(row.shots), f"{len(row.scores):,}", row.metric, str(row.score))
        + ((str(found[at].difference),) if found else ())
        for at, row in enumerate(rows)
    ]
    return columns, table
