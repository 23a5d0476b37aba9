# SPDX-License-Identifier: Apache-2.0
"""`lrconvert eval`: what a model or an artifact does with long texts, and with short questions."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import TOKENS, text_option
from lrconvert.cli._evals import opened_session, plotted, report, shared_options, subject_of, title_of
from lrconvert.cli.eval_benchmarks import benchmarks

LENGTHS = "the lengths to measure at, in tokens: 4k,8k,16k"


class Lengths(click.ParamType):
    """Several numbers of tokens, with commas between."""

    name = "tokens,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(sorted({TOKENS.convert(part, param, ctx) for part in str(value).split(",")}))


_lengths = click.option("--lengths", type=Lengths(), required=True, metavar="TOKENS,…", help=f"{LENGTHS}.")


@click.group(name="eval", short_help="Long-text perplexity, passkey retrieval, short benchmarks.")
def command() -> None:
    """What a model or an artifact does with long texts and short questions.

    A Hugging Face folder runs in transformers, a GGUF in llama.cpp, an ONNX folder in ONNX Runtime.

    Every figure comes with its protocol, seed, number of tokens or trials, and a 95 % interval.
    """


command.add_command(benchmarks)


@command.command()
@shared_options
@_lengths
@text_option
@click.option("--judged", type=click.IntRange(64), metavar="N",
              help="Tokens that count, the same at every length; default: 1024.")  # fmt: skip
@click.option("--whole", is_flag=True, help="Instead: documents cut at each length, all of whose tokens count.")
@click.option("--sliding-window", "step", type=TOKENS, metavar="TOKENS",
              help="Instead: contexts that move by so many tokens over each document.")  # fmt: skip
@click.option("--document-tokens", type=TOKENS, metavar="TOKENS",
              help="With --sliding-window: how much of a document is read; default: the longest length.")  # fmt: skip
@click.option("--windows", type=click.IntRange(1), default=4, show_default=True,
              help="How many ends of contexts, or documents.")  # fmt: skip
def perplexity(texts: tuple[str, ...], **shared: Any) -> None:
    """Perplexity behind contexts of several lengths: by default of the same tokens.

    \b
    lrconvert eval perplexity my-model --text book.txt --lengths 4k,8k,16k
    lrconvert eval perplexity my-model --text books/ --lengths 4k,64k,512k --whole --sliding-window 256k
    """
    from lrconvert.checkpoint.tokenizer import tokenizer_of
    from lrconvert.evals.perplexity import measure_perplexity
    from lrconvert.evals.plotting import plot_perplexity
    from lrconvert.evals.protocols import Plan
    from lrconvert.evals.texts import read_texts, sources_of

    plan = Plan(**{name: shared[name] for name in ("lengths", "judged", "windows", "whole", "step", "document_tokens")})
    sources, subject = sources_of(texts), subject_of(shared)
    read = read_texts(sources, lambda: tokenizer_of(subject.artifact), vocab=subject.vocab(), tokens=plan.needed)
    plan.check([len(text.tokens) for text in read])
    for text in subject.searched_on(read):
        out.warn(f"{text.name}: the recipe was searched on this text: the figure flatters it")
    with opened_session(shared, text=False) as (session, _, say):
        rows = measure_perplexity(session, [text.tokens for text in read], plan, seed=shared["seed"], progress=say)
        info = session.info
    result = {
        "evaluation": "perplexity",
        "protocol": plan.sentence,
        "texts": [text.described() for text in read],
        "rows": [asdict(row) for row in rows],
    }
    table = [(f"{row.length:,}", str(row.perplexity), f"{row.tokens:,}", str(row.windows)) for row in rows]
    report(shared, info, result, ("tokens", "perplexity (95 %)", "judged", "windows"), table)
    title = title_of(shared, "perplexity")
    plotted(shared, lambda path: plot_perplexity(rows, path, title=title, protocol=plan.sentence))


@command.command()
@shared_options
@_lengths
@click.option("--depths", type=click.IntRange(1), default=10, show_default=True, help="Places of the key.")
@click.option("--trials", type=click.IntRange(1), default=1, show_default=True, help="Documents a place.")
@click.option("--form", type=click.Path(path_type=Path), metavar="FILE",
              help="passkey.json with the sentences; default: the model's own, else plain English.")  # fmt: skip
def passkey(depths: int, trials: int, form: Path | None, **shared: Any) -> None:
    """A five-digit key hidden in a long text and asked for at its end.

    \b
    lrconvert eval passkey my-model --lengths 4k,16k --depths 10
    """
    from lrconvert.evals.passkey import PROTOCOL, PasskeyFormat, by_length, form_of, measure_passkey
    from lrconvert.evals.plotting import plot_passkey

    path = form or form_of(subject_of(shared).artifact)
    sentences = PasskeyFormat.read(path)
    with opened_session(shared) as (session, encode, say):
        rows = measure_passkey(
            session,
            sentences,
            encode,
            shared["lengths"],
            depths=depths,
            trials=trials,
            seed=shared["seed"],
            progress=say,
        )
        info = session.info
    totals = by_length(rows)
    result = {
        "evaluation": "passkey",
        "protocol": PROTOCOL,
        "form": {"name": path.name, "sha256": sha256(path.read_bytes()).hexdigest()},
        "lengths": [total.to_json() for total in totals],
        "rows": [row.to_json() for row in rows],
    }
    table = [(f"{total.length:,}", f"{total.hits} of {total.trials}", str(total.share)) for total in totals]
    report(shared, info, result, ("tokens", "found", "share (95 %)"), table)
    title = title_of(shared, "passkey")
    plotted(shared, lambda path: plot_passkey(rows, path, title=title, protocol=PROTOCOL))
