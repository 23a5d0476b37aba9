# SPDX-License-Identifier: Apache-2.0
"""`lrconvert hf`: bake a recipe into a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _bake
from lrconvert.cli import _output as out
from lrconvert.cli._common import Precision

if TYPE_CHECKING:
    from lrconvert.artifact.plan import Plan


@click.command(name="hf", short_help="Bake a recipe into a Hugging Face folder.")
@_bake.shared_options
@_bake.output_option("DIR", "Output folder.")
@click.option("--dtype", type=Precision(), help="Convert the weights; default: as stored.")
@click.option("--portable", is_flag=True, help="Write only what other engines compute correctly too; the attention "
              "factor is folded into q and k.")  # fmt: skip
@click.option("--allow-lossy", "lossy", is_flag=True, help="With --portable: drop what other engines can't express.")
@click.option(
    "--copy/--link", "copy", default=None, help="Copy weights, or require hard links; default: link if possible."
)
@click.option("--push-to-hub", "name", metavar="NAME", help="Publish it on the Hub as NAME, unless --verify fails.")
@click.option("--private", is_flag=True, help="With --push-to-hub: make the repository private.")
def command(
    dtype: str | None, portable: bool, lossy: bool, copy: bool | None, name: str | None, private: bool, **shared: Any
) -> int | None:
    """Bake RECIPE into MODEL: a Hugging Face folder that runs without lrconvert.

    transformers' native code runs it, with up to two tiers. With trust_remote_code=True the folder's own
    modeling_longrope.py computes the recipe exactly, and generate() stays right across a tier boundary.

    \b
    lrconvert hf demo --recipe demo-yarn-8x -o demo-32k
    """
    from lrconvert.errors import UsageError
    from lrconvert.targets.hf import Options

    if private and name is None:
        raise UsageError("--private needs --push-to-hub")
    if lossy and not portable:
        raise UsageError("--allow-lossy needs --portable")
    options = Options(window=shared["window"], dtype=dtype, portable=portable, lossy=lossy, lift=shared["lift"],
                      pad=shared["pad"])  # fmt: skip
    link = None if copy is None else not copy
    code = _bake.run("hf", options, shared, link=link, before=_signed_in(name), describe=_engines)
    if name is not None and shared["dry_run"]:
        out.hint(f"nothing was published as {name}")
    if code or name is None or shared["dry_run"]:
        return code
    from lrconvert.cli.push import command as push_command

    click.get_current_context().invoke(push_command, artifacts=(shared["output"],), name=name, private=private)
    return code


def _signed_in(name: str | None) -> Callable[[Plan], None] | None:
    """Who can't publish learns it before the work."""
    if name is None:
        return None

    def check(plan: Plan) -> None:
        from lrconvert.hub.access import sign_in

        sign_in(name)

    return check


def _engines(plan: Plan, detailed: bool) -> None:
    """Which engines run the artifact right."""
    from lrconvert.engines.table import assess

    family = plan.record.written_as or plan.spec.family
    out.engines(assess(plan.spec, family, shape=plan.model.shape), detailed=detailed)
