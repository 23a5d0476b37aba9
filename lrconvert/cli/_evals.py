# SPDX-License-Identifier: Apache-2.0
"""What the evaluations share: options, the session, and how a result is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import _output as out


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every evaluation."""
    options = (
        click.argument("artifact", metavar="MODEL|ARTIFACT"),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--code", type=click.Choice(["native", "custom"]), help="Of a folder; default: its own code."),
        click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1 …"),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32"),
        click.option("--threads", type=click.IntRange(1), help="Threads of the runtime."),
        click.option("--llama-library", "library", metavar="PATH", help="libllama for a GGUF."),
        click.option(
            "-o", "--output", type=click.Path(path_type=Path), metavar="STEM", help="Write STEM.json, STEM.png."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def opened_session(shared: dict[str, Any]):
    """A session on the artifact, its tokenizer, and what reports progress."""
    from lrconvert.evals.subject import opened

    return opened(
        shared["artifact"],
        code=shared["code"],
        device=shared["device"],
        dtype=shared["dtype"],
        threads=shared["threads"],
        library=shared["library"],
        progress=out.spinner(quiet=shared["as_json"]),
    )


def report(
    shared: dict[str, Any], info: dict[str, Any], result: dict[str, Any], columns: tuple[str, ...], table: list[Any]
) -> None:
    """The result as JSON, into STEM.json too where one is asked for, or as a table."""
    from lrconvert import __version__

    about = {
        "lrconvert": __version__,
        "artifact": Path(shared["artifact"]).name,
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

    shown = Table(title=f"{about['artifact']}: {result['evaluation']}, seed {shared['seed']}")
    for name in columns:
        shown.add_column(name, justify="right")
    for cells in table:
        shown.add_row(*cells)
    out.console().print(shown)
    out.say(result["protocol"])
    versions = ", ".join(f"{key} {value}" for key, value in info.items() if key not in ("class", "dtype", "device"))
    out.say(f"{info['class']} in {info['dtype']} on {info['device']}, {versions}")


def plotted(shared: dict[str, Any], plot: Callable[[Path], None]) -> None:
    """STEM.png, where it is asked for."""
    if shared["output"] is not None:
        plot(shared["output"].with_name(shared["output"].name + ".png"))
