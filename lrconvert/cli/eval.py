# SPDX-License-Identifier: Apache-2.0
"""`lrconvert eval`: how well a model or an artifact reads long texts, and answers short questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli._common import TOKENS, text_option
from lrconvert.cli._evals import Table, lengths_option, run, shared_options
from lrconvert.cli.eval_benchmarks import benchmarks
from lrconvert.cli.eval_ruler import ruler

if TYPE_CHECKING:
    from lrconvert.evals.api import Evaluation


@click.group(name="eval", short_help="Long-text perplexity, retrieval of keys, RULER, short benchmarks.")
def command() -> None:
    """Evaluate a model or an artifact on long texts and on short questions.

    A Hugging Face folder runs in transformers, a GGUF in llama.cpp, an ONNX folder in ONNX Runtime.

    Every figure comes with its protocol, its seed, the number of tokens or trials, and a 95 % interval.
    """


command.add_command(benchmarks)
command.add_command(ruler)


@command.command()
@shared_options
@lengths_option
@text_option
@click.option("--judged", type=click.IntRange(64), metavar="N",
              help="Tokens to score, the same ones at every length; default: 1024.")  # fmt: skip
@click.option("--whole", is_flag=True, help="Instead, score all tokens of documents cut at each length.")
@click.option("--sliding-window", "step", type=TOKENS, metavar="TOKENS",
              help="Instead, slide each context over a document by this many tokens.")  # fmt: skip
@click.option("--document-tokens", type=TOKENS, metavar="TOKENS",
              help="With --sliding-window: tokens to read per document; default: the longest length.")  # fmt: skip
@click.option("--windows", "excerpts", type=click.IntRange(1), default=4, show_default=True,
              help="Number of excerpts to score.")  # fmt: skip
def perplexity(**options: Any) -> None:
    """Perplexity at several context lengths; by default, of the same tokens at each of them.

    \b
    lrconvert eval perplexity my-model --text book.txt --lengths 4k,8k,16k
    lrconvert eval perplexity my-model --text books/ --lengths 4k,64k,512k --whole --sliding-window 256k
    """
    from lrconvert.evals.api import perplexity

    def table(found: Evaluation) -> Table:
        rows = [(f"{row.length:,}", str(row.perplexity), f"{row.tokens:,}", str(row.excerpts)) for row in found.rows]
        return ("tokens", "perplexity (95 %)", "judged", "excerpts"), rows

    run(perplexity, table, **options)


def _keys_found(found: Evaluation) -> Table:
    from lrconvert.evals.passkey import by_length

    totals = by_length(found.rows)
    rows = [(f"{total.length:,}", f"{total.hits} of {total.trials}", str(total.share)) for total in totals]
    return ("tokens", "found", "share (95 %)"), rows


@command.command()
@shared_options
@lengths_option
@click.option("--depths", type=click.IntRange(1), default=10, show_default=True,
              help="Depths of the key, from the start of the text to its end.")  # fmt: skip
@click.option("--trials", type=click.IntRange(1), default=1, show_default=True, help="Documents at each depth.")
@click.option("--form", type=click.Path(path_type=Path), metavar="FILE",
              help="passkey.json with the sentences; default: the model's own, or plain English ones.")  # fmt: skip
def passkey(**options: Any) -> None:
    """Find a five-digit key that is hidden in a long text and asked for at its end.

    \b
    lrconvert eval passkey my-model --lengths 4k,16k --depths 10
    """
    from lrconvert.evals.api import passkey

    run(passkey, _keys_found, **options)


@command.command()
@shared_options
@lengths_option
@text_option
@click.option("--keys", type=click.IntRange(2), default=20, show_default=True,
              help="Keys in each text, at even depths from its start to its end.")  # fmt: skip
@click.option("--form", type=click.Path(path_type=Path), metavar="FILE",
              help="passkey.json with labelled sentences; default: the model's, or plain English ones.")  # fmt: skip
def retrieval(**options: Any) -> None:
    """Find many labelled keys in one long text. The text is read once, and every key is asked for behind it.

    \b
    lrconvert eval retrieval my-model --text book.txt --lengths 8k,64k,256k --device cuda --dtype bfloat16
    """
    from lrconvert.evals.api import retrieval

    run(retrieval, _keys_found, **options)
