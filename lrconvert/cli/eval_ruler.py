# SPDX-License-Identifier: Apache-2.0
"""`lrconvert eval ruler`: RULER's synthetic tasks at many lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli._evals import Names, Table, lengths_option, run, shared_options

if TYPE_CHECKING:
    from lrconvert.evals.api import Evaluation

DEFAULT = "niah_single_1,niah_multikey_2,niah_multikey_3,vt,cwe,fwe"  # they make their own texts


@click.command()
@shared_options
@lengths_option
@click.option("--tasks", type=Names(), default=DEFAULT, show_default=True, metavar="NAME,…",
              help="RULER's tasks. Others (niah_single_2 …, qa_squad, qa_hotpot) fetch texts.")  # fmt: skip
@click.option("--samples", type=click.IntRange(2, 500), default=25, show_default=True,
              help="Samples of each task at each length.")  # fmt: skip
def ruler(**options: Any) -> None:
    """RULER's tasks through lm-eval: needles, variables to trace, words to count. Answers are generated.

    \b
    lrconvert eval ruler my-model --lengths 4k,16k,64k
    lrconvert eval ruler my-model.gguf --tasks niah_multikey_2,vt --lengths 4k,32k --samples 50 -o ruler
    """
    from lrconvert.evals.api import ruler

    def table(found: Evaluation) -> Table:
        rows = [(row.task, f"{row.length:,}", str(len(row.scores)), str(row.score)) for row in found.rows]
        return ("task", "tokens", "samples", "score (95 %)"), rows

    run(ruler, table, **options)
