# SPDX-License-Identifier: Apache-2.0
"""What the evaluations share: options, the session, and how a result is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import SEED, OutputName, Registered
from lrconvert.runtimes import backend_choices

if TYPE_CHECKING:
    from lrconvert.evals.subject import Subject


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every evaluation."""
    options = (
        click.argument("artifact", metavar="MODEL|ARTIFACT"),
        click.option("--seed", type=SEED, default=0, show_default=True),
        click.option("--recipe", metavar="RECIPE", help="Evaluate a plain model under this recipe, without baking it."),
        click.option(
            "--code",
            type=Registered(lambda: [*backend_choices(), "reference"]),
            help="Of a folder native or custom, default: its own; of all: our reference implementation.",
        ),
        click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1 …"),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32"),
        click.option("--threads", type=click.IntRange(1), help="Threads of the runtime."),
        click.option("--llama-library", "library", metavar="PATH", help="libllama for a GGUF."),
        click.option(
            "-o", "--output", type=OutputName(".json", ".png"), metavar="STEM", help="Write STEM.json, STEM.png."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def subject_of(shared: dict[str, Any]) -> Subject:
    """What is evaluated; found once, since a Hub id costs a question."""
    from lrconvert.evals.subject import Subject

    if "subject" not in shared:
        shared["subject"] = Subject.of(shared["artifact"], shared["recipe"])
    return shared["subject"]


def opened_session(shared: dict[str, Any], *, text: bool = True):
    """A session on the artifact, its tokenizer (unless no `text` is read), and what reports progress."""
    from lrconvert.errors import require
    from lrconvert.evals.subject import opened

    if shared["output"] is not None:
        require("matplotlib", "plot", "the picture that -o writes")  # said before anything is computed
    return opened(
        subject_of(shared),
        code=shared["code"],
        device=shared["device"],
        dtype=shared["dtype"],
        threads=shared["threads"],
        library=shared["library"],
        progress=out.spinner(quiet=shared["as_json"]),
        text=text,
    )


def report(
    shared: dict[str, Any], info: dict[str, Any], result: dict[str, Any], columns: tuple[str, ...], table: list[Any]
) -> None:
    """The result as JSON, into STEM.json too where one is asked for, or as a table."""
    from lrconvert import __version__

    recipe = subject_of(shared).recipe
    about = {
        "lrconvert": __version__,
        "artifact": Path(shared["artifact"]).name,
        "recipe": None if recipe is None else recipe.name,
        "seed": shared["seed"],
        "runtime": info,
    }
    result = {**about, **result}
    if shared["output"] is not None:
        path = shared["output"].with_name(shared["output"].name + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if shared["as_json"]:
        out.data(result)
        return
    from rich.table import Table

    shown = Table(title=title_of(shared, result["evaluation"]))
    for name in columns:
        shown.add_column(name, justify="right")
    for cells in table:
        shown.add_row(*cells)
    out.console().print(shown)
    out.say(result["protocol"])
    versions = ", ".join(f"{key} {value}" for key, value in info.items() if key not in ("class", "dtype", "device"))
    out.say(f"{info['class']} in {info['dtype']} on {info['device']}, {versions}")


def title_of(shared: dict[str, Any], evaluation: str) -> str:
    """Of a table or a picture."""
    recipe = subject_of(shared).recipe
    under = "" if recipe is None else f" under {recipe.name}"
    return f"{Path(shared['artifact']).name}{under}: {evaluation}, seed {shared['seed']}"


def plotted(shared: dict[str, Any], plot: Callable[[Path], None]) -> None:
    """STEM.png, where it is asked for."""
    if shared["output"] is not None:
        plot(shared["output"].with_name(shared["output"].name + ".png"))
