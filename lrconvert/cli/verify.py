# SPDX-License-Identifier: Apache-2.0
"""`lrconvert verify`: compare an artifact with the reference implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import Precision, Registered, trust_code_option
from lrconvert.cli._progress import show_progress
from lrconvert.runtimes import RUNTIMES, backend_choices
from lrconvert.writing import replace_file

if TYPE_CHECKING:
    from lrconvert.artifact.checks import Row
    from lrconvert.parity import Report


@click.command(name="verify", short_help="Compare an artifact with the reference implementation.")
@click.argument("artifact", metavar="ARTIFACT")
@click.option(
    "--against",
    metavar="MODEL",
    help="Model to compare with, with the manifest's adapter merged; default: the manifest's.",
)
@click.option("--recipe", metavar="RECIPE", help="Recipe to compare with; default: the manifest's.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1 …")
@click.option(
    "--dtype",
    type=Precision(),
    help="What a folder computes in, default: f32; the reference stays in float64 (float32 on a GPU).",
)
@click.option(
    "--code",
    "codes",
    type=Registered(backend_choices),
    multiple=True,
    help="Verify only this backend; may be repeated.",
)
@click.option(
    "--runtime",
    type=Registered(lambda: RUNTIMES),
    help="Runtime for the artifact; default: transformers, llama.cpp for a GGUF, onnxruntime for "
    "an ONNX folder. mlx-lm and vLLM need "
    "their own environments: select one with --python.",
)
@click.option(
    "--profile",
    type=click.Choice(("quick", "full")),
    default="full",
    show_default=True,
    help="quick: one case on each side of every tier boundary and the far end, no search for likely mistakes.",
)
@click.option(
    "--full", is_flag=True, help="Consecutive positions at every length and every decode, regardless of cost."
)
@click.option(
    "--files-only",
    is_flag=True,
    help="Run nothing: compare config, metadata, tokenizer, digests and weights with source and recipe.",
)
@click.option("--python", help="Interpreter for the runtime: another version of transformers, mlx-lm, vLLM.")
@click.option("--llama-library", "library", metavar="PATH", help="libllama for a GGUF; default: an installed one.")
@click.option(
    "--kv", type=Precision("f32", "f16"), default="f32", show_default=True, help="Type of llama.cpp's KV cache."
)
@click.option("--threads", type=click.IntRange(1), help="Threads of the runtime.")
@trust_code_option
@click.option(
    "--lock",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Record the measured values there, or fail where one drifted since.",
)
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Also write JUnit XML.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Also write an HTML page.")
@click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="Also write a Markdown summary.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    artifact: str,
    against: str | None = None,
    recipe: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    codes: tuple[str, ...] = (),
    runtime: str | None = None,
    profile: Literal["quick", "full"] = "full",
    full: bool = False,
    files_only: bool = False,
    python: str | None = None,
    library: str | None = None,
    kv: str = "f32",
    threads: int | None = None,
    trust_code: bool = False,
    lock: Path | None = None,
    junit: Path | None = None,
    html: Path | None = None,
    markdown: Path | None = None,
    as_json: bool = False,
) -> int:
    """Check that ARTIFACT computes what its recipe says.

    ARTIFACT is a path or a Hub id (OWNER/NAME:Q4_K_M for one GGUF of several). Each backend (transformers' native
    code, the artifact's own) runs in a separate process and is compared with the reference on both sides of every
    tier boundary. Exit code 5 means a failed check.

    \b
    lrconvert verify my-model --runtime vllm --python vllm-env/bin/python
    """
    from lrconvert.api.verifying import verify
    from lrconvert.errors import ParityError
    from lrconvert.parity.page import page

    with show_progress(quiet=as_json) as progress:
        report = verify(
            artifact,
            against=against,
            recipe=recipe,
            device=device,
            dtype=dtype,
            codes=codes,
            runtime=runtime,
            profile=profile,
            full=full,
            files_only=files_only,
            python=python,
            library=library,
            kv=kv,
            threads=threads,
            trust_code=trust_code,
            lock=lock,
            progress=progress,
            watch=None if as_json else row_printer(),
        )
    for path, text in ((junit, report.to_junit), (html, partial(page, report)), (markdown, report.to_markdown)):
        if path is not None:
            replace_file(path, text())
    if as_json:
        out.data(report.to_json())
    else:
        show(report)
    return 0 if report.passed else ParityError.exit_code


def row_printer() -> Callable[[Row], None]:
    """Prints rows as they become known, under a header."""
    from lrconvert.parity.report import HEADER, line_of

    seen: list[Row] = []

    def show_row(row: Row) -> None:
        if not seen:
            out.say(HEADER)
        seen.append(row)
        out.say(line_of(row))

    return show_row


def show(report: Report) -> None:
    """What follows the rows: summary, versions, reasons, notes."""
    out.say(f"\n{report.artifact} against {report.against} ({report.reference})")
    for name, info in report.runtimes.items():
        about = ("class", "dtype", "device")
        versions = ", ".join(f"{module} {version}" for module, version in info.items() if module not in about)
        out.say(f"{name}: {info['class']} in {info['dtype']} on {info['device']}, {versions}")
    for loss in report.losses:
        out.say(f"lost: {loss}")
    for row in report.rows:
        if row.reason:
            out.say(f"{row.verdict}: {row.code} code, {row.case}: {row.reason}")
    for note in report.notes:
        out.say(f"note: {note}")
    out.say(report.summary)
