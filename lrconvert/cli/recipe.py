# SPDX-License-Identifier: Apache-2.0
"""`lrconvert recipe`: factor sets, looked at and made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import TOKENS, Number, force_option, model_argument, revision_option

if TYPE_CHECKING:
    from lrconvert.recipe import Recipe

METHODS = ("pi", "ntk", "yarn")


@click.group(name="recipe", short_help="Factor sets: list, show, check, derive, import, plot.")
def command() -> None:
    """Factor sets: list, show, check, derive, import, plot.

    RECIPE is a recipe.json, a folder that holds one, or the name of one that is shipped.
    """


@command.command("list")
@click.argument("folder", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def list_recipes(folder: Path | None, as_json: bool) -> None:
    """The recipes that are shipped, or those in the folders of FOLDER."""
    from lrconvert.errors import LrconvertError
    from lrconvert.recipe import RECIPE_FILE, load_recipe, shipped_recipes

    paths = shipped_recipes() if folder is None else {p.parent.name: p for p in sorted(folder.glob(f"*/{RECIPE_FILE}"))}
    rows = []
    for name, path in paths.items():
        try:
            recipe = load_recipe(path)
        except LrconvertError as error:
            out.warn(str(error))
            continue
        rows.append({
            "name": name,
            "family": recipe.family,
            "original_window": recipe.original_window,
            "window": recipe.tiers[-1].max_length,
            "tiers": len(recipe.tiers),
            "kind": recipe.provenance.kind,
            "method": recipe.provenance.method,
        })  # fmt: skip
    if as_json:
        out.data(rows)
        return
    from rich.table import Table

    table = Table()
    for name in ("name", "family", "original window", "window", "tiers", "made"):
        table.add_column(name)
    for row in rows:
        made = " ".join(filter(None, (row["kind"], row["method"])))
        table.add_row(row["name"], row["family"], *(str(row[k]) for k in ("original_window", "window", "tiers")), made)
    out.console().print(table)


@command.command()
@click.argument("recipe")
@click.option("--json", "as_json", is_flag=True, help="The recipe file itself.")
def show(recipe: str, as_json: bool) -> None:
    """What a recipe is for and how its factors run."""
    from lrconvert.recipe import load_recipe
    from lrconvert.recipe.plotting import sparklines

    loaded = load_recipe(recipe)
    if as_json:
        out.say(loaded.to_json().rstrip())
        return
    out.say(f"{loaded.name}: {loaded.family}, {loaded.rotary_dim} rotated dimensions, θ {loaded.rope_theta:g}")
    out.say(f"original window {loaded.original_window}, reaches {loaded.tiers[-1].max_length}")
    made = loaded.provenance
    described = ", ".join(filter(None, (made.method, made.source, made.licence and f"licence {made.licence}")))
    out.say(f"{made.kind}{': ' + described if described else ''}")
    for note in made.notes:
        out.say(f"note: {note}")
    for line in sparklines(loaded):
        out.say(line)
    for text in loaded.warnings():
        out.warn(text)


@command.command()
@click.argument("recipe")
@click.option("--model", help="Also check that it fits this model.")
def check(recipe: str, model: str | None) -> None:
    """Read a recipe strictly: all that is wrong with it (exit code 3), and what is unusual."""
    from lrconvert.recipe import load_recipe

    loaded = load_recipe(recipe)
    for text in loaded.warnings():
        out.warn(text)
    if model is not None:
        from lrconvert.checkpoint import open_model

        open_model(model).resolve(loaded)
    out.say(f"{loaded.name}: good" + (f", fits {model}" if model else ""))


@command.command()
@model_argument
@click.option("--method", type=click.Choice(METHODS), required=True, help="The analytic interpolation.")
@click.option(
    "--factor", type=Number(0, 1e6), required=True, metavar="S", help="Extension ratio: window / original window."
)
@click.option("--attention-factor", type=Number(0), help="Instead of the method's own.")
@click.option("--uniform", is_flag=True, help="One attention factor for both tiers, for code that knows only one.")
@click.option("--original-window", type=TOKENS, help="Where the model's config is wrong about it.")
@click.option("--name", help="The recipe's name.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="RECIPE", help="Folder or .json file.")
@force_option
@revision_option
def derive(
    model: str,
    method: str,
    factor: float,
    attention_factor: float | None,
    uniform: bool,
    original_window: int | None,
    name: str | None,
    output: Path | None,
    force: bool,
    revision: str | None,
) -> None:
    """An analytic recipe for MODEL; no search needed.

    \b
    lrconvert recipe derive demo --method yarn --factor 8 -o recipes/demo-8x
    """
    from lrconvert.checkpoint import open_checkpoint
    from lrconvert.checkpoint.rope_config import read_rope
    from lrconvert.families import get_family, read_shape
    from lrconvert.recipe import derive_recipe

    checkpoint = open_checkpoint(model, revision=revision)
    family = get_family(checkpoint.config.get("model_type"))
    shape = read_shape(checkpoint.config, family)
    found = read_rope(checkpoint.config, shape)
    if found.scaled:
        out.warn(
            f"{model} already carries {found.kind} scaling; the recipe starts from the plain rotation and its "
            f"original window, {found.original_window}"
        )
    recipe = derive_recipe(
        method,  # type: ignore[arg-type]  # click.Choice has checked it
        factor,
        family=family.name,
        rotary_dim=shape.rotary_dim,
        theta=shape.theta,
        original_window=original_window or found.original_window,
        # A recipe travels: of a local path it keeps the name.
        base_model=checkpoint.path.resolve().name.removesuffix(".gguf") if Path(model).exists() else model,
        name=name,
        attention_factor=attention_factor,
        uniform=uniform,
    )
    _finish(recipe, output, force, model)


@command.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--model", help="The model that the factors fit: fills in what the sources don't say.")
@click.option("--family", help="The model's family, as in model_type.")
@click.option("--theta", type=Number(1), help="The model's rope_theta.")
@click.option("--original-window", type=TOKENS, help="The window the model was trained with.")
@click.option("--name", help="The recipe's name.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="RECIPE", help="Folder or .json file.")
@force_option
def import_(
    sources: tuple[str, ...],
    model: str | None,
    family: str | None,
    theta: float | None,
    original_window: int | None,
    name: str | None,
    output: Path | None,
    force: bool,
) -> None:
    """A recipe from what others published; several SOURCEs become its tiers.

    \b
    A SOURCE is a config.json or model with scaled RoPE (longrope, su, yarn, linear, dynamic, llama3),
    a LongRoPE CSV table (`file.csv` or `file.csv=LENGTH`), a file with short_factor and long_factor,
    or a GGUF that carries factors.

    \b
    lrconvert recipe import phi-3-mini-128k/config.json -o recipes/phi3
    lrconvert recipe import 4k_la2_256k.csv ft_la2_256k.csv --model meta-llama/Llama-2-7b-hf -o recipes/llama2
    """
    from lrconvert.recipe.importing import Base, import_recipe

    recipe, notes = import_recipe(sources, Base(family, theta, original_window, model), name)
    for note in notes:
        out.hint(f"note: {note}")
    _finish(recipe, output, force, model or recipe.base_model or "MODEL")


@command.command()
@click.argument("recipe")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="STEM",
    help="Write STEM.png and STEM.svg; needs matplotlib.",
)
@click.option("--journal", type=click.Path(path_type=Path), metavar="FILE",
              help="Also draw the search that found it: STEM-search.png and STEM-search.svg.")  # fmt: skip
def plot(recipe: str, output: Path | None, journal: Path | None) -> None:
    """Factors by frequency index, every tier beside PI, NTK-aware and YaRN.

    With the journal of a search: its loss against evaluations, and how the factors moved. Without -o, or without
    matplotlib, lines of text.
    """
    from lrconvert.errors import EnvironmentFailure
    from lrconvert.recipe import load_recipe
    from lrconvert.recipe.plotting import plot_recipe, sparklines
    from lrconvert.search.journal import read_journal
    from lrconvert.search.plotting import journal_lines, plot_journal

    loaded = load_recipe(recipe)
    records = read_journal(journal).records if journal is not None else []
    for line in [*sparklines(loaded), *journal_lines(records)]:
        out.say(line)
    if output is None:
        more = f" --journal {journal}" if journal is not None else ""
        out.hint(f"as a picture: lrconvert recipe plot {recipe}{more} -o {loaded.name}")
        return
    stem = output.with_suffix("") if output.suffix in (".png", ".svg") else output
    try:
        paths = plot_recipe(loaded, stem)
        if records:
            paths += plot_journal(records, stem.with_name(f"{stem.name}-search"))
    except EnvironmentFailure as error:
        raise EnvironmentFailure(f"no picture: {error.message}", remedy=error.remedy) from error
    out.say(" ".join(str(path) for path in paths))


def _finish(recipe: Recipe, output: Path | None, force: bool, model: str = "MODEL") -> None:
    """Write the recipe, or print it where no output was named."""
    from lrconvert.recipe import write_recipe

    for text in recipe.warnings():
        out.warn(text)
    if output is None:
        out.say(recipe.to_json().rstrip())
        return
    path = write_recipe(recipe, output, force=force)
    out.say(f"{path}: {len(recipe.tiers)} tiers, up to {recipe.tiers[-1].max_length} tokens")
    out.hint(f"next: lrconvert hf {model} --recipe {output} -o {recipe.name}")
