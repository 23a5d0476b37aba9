# SPDX-License-Identifier: Apache-2.0
"""`lrconvert eval benchmarks`: short questions, before and after an extension."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli._common import TOKENS
from lrconvert.cli._evals import Names, Table, run, shared_options

if TYPE_CHECKING:
    from lrconvert.evals.api import Evaluation


@click.command()
@shared_options
@click.option("--tasks", type=Names(), required=True, metavar="NAME,…",
              help="arc_challenge, hellaswag, mmlu, truthfulqa_mc2; without --data, any task of lm-eval.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Folder of JSON lines; default: lm-eval's own data, from the Hub.")  # fmt: skip
@click.option("--shots", type=click.IntRange(0), help="Examples before every question; default: 25, 10, 5, 0.")
@click.option("--limit", type=click.IntRange(2), help="Questions of each task, drawn at random; default: all.")
@click.option("--batch-tokens", type=TOKENS, help="Tokens in a batch; default: 4k on a CPU, 32k on a GPU.")
@click.option("--against", type=click.Path(path_type=Path), metavar="FILE",
              help="JSON of an earlier result: also show the difference from it.")  # fmt: skip
def benchmarks(**options: Any) -> None:
    """Short benchmarks through lm-eval, with the number of examples of the LongRoPE paper.

    \b
    lrconvert eval benchmarks MODEL --tasks arc_challenge,hellaswag --data DIR -o before
    lrconvert eval benchmarks my-model --tasks arc_challenge,hellaswag --data DIR --against before.json
    """
    from lrconvert.evals.api import benchmarks

    run(benchmarks, _table, **options)


def _table(found: Evaluation) -> Table:
    columns = ["task", "shots", "questions", "metric", "score (95 %)"]
    rows = [
        [row.task, str(row.shots), f"{len(row.scores):,}", row.metric, str(row.score)]
        + [str(change.difference) for change in found.differences[at : at + 1]]
        for at, row in enumerate(found.rows)
    ]
    return columns + ["difference (95 %)"] * bool(found.differences), rows
