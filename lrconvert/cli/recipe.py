# SPDX-License-Identifier: Apache-2.0
"""`lrconvert recipe`: list, show, check, make and plot recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli import _steps
from lrconvert.cli._common import TOKENS, Number, force_option, model_argument, revision_option

if TYPE_CHECKING:
    from lrconvert.recipe import Recipe

METHODS = ("pi", "ntk", "yarn")


@click.group(name="recipe", short_help="Factor sets: list, show, check, derive, import, plot.")
def command() -> None:
    """Factor sets: list, show, check, derive, import, plot.

    RECIPE is a recipe.json, a folder with one in it, or the name of a shipped recipe.
    """


@command.command("list")
@click.argument("folder", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_recipes(folder: Path | None, as_json: bool) -> None:
    """List the shipped recipes, or those in the subfolders of FOLDER."""
    from lrconvert.errors import LrconvertError
    from lrconvert.recipe import load_recipe, recipes_in, shipped_recipes

    recipes = []
    for name, path in (shipped_recipes() if folder is None else recipes_in(folder)).items():
        try:
            recipe = load_recipe(path)
        except LrconvertError as error:
            out.warn(str(error))
            continue
        recipes.append((name, recipe))
    if as_json:
        out.data([{"name": name, **recipe.summary} for name, recipe in recipes])
        return
    rows = []
    for name, recipe in recipes:
        about = recipe.summary
        origin = " ".join(filter(None, (about["kind"], about["method"])))
        rows.append((name, *(str(about[key]) for key in ("family", "original_window", "window", "tiers")), origin))
    out.table(("name", "family", "original window", "window", "tiers", "provenance"), rows, numbers=False)


@command.command()
@click.argument("recipe")
@click.option("--json", "as_json", is_flag=True, help="Print the recipe file.")
def show(recipe: str, as_json: bool) -> None:
    """Show what a recipe is for, where it comes from, and its factors."""
    from lrconvert.recipe import load_recipe
    from lrconvert.recipe.plotting import sparklines

    loaded = load_recipe(recipe)
    if as_json:
        out.say(loaded.to_json().rstrip())
        return
    out.say(f"{loaded.name}: {loaded.family}, {loaded.rotary_dim} rotated dimensions, θ {loaded.rope_theta:g}")
    out.say(f"original window {loaded.original_window}, reaches {loaded.tiers[-1].max_length}")
    origin = loaded.provenance
    details = ", ".join(filter(None, (origin.method, origin.source, origin.licence and f"licence {origin.licence}")))
    out.say(f"{origin.kind}{': ' + details if details else ''}")
    if origin.weights:
        out.say(f"found for {origin.weights}")
    for note in origin.notes:
        out.say(f"note: {note}")
    for line in sparklines(loaded):
        out.say(line)
    for text in loaded.warnings():
        out.warn(text)


@command.command()
@click.argument("recipe")
@click.option("--model", help="Also check that the recipe fits this model.")
def check(recipe: str, model: str | None) -> None:
    """Check a recipe: report everything wrong (exit code 3) or unusual."""
    from lrconvert.recipe import load_recipe

    loaded = load_recipe(recipe)
    for text in loaded.warnings():
        out.warn(text)
    if model is not None:
        from lrconvert.checkpoint import open_model

        open_model(model).resolve(loaded)
    out.say(f"{loaded.name}: valid" + (f", fits {model}" if model else ""))


@command.command()
@model_argument
@click.option("--method", type=click.Choice(METHODS), required=True, help="Interpolation method.")
@click.option("--factor", type=Number(0, 1e6), metavar="S", help="Extension ratio: the new window / the model's.")
@click.option("--target", type=TOKENS, help="The window to reach, instead of --factor: 131072, 128k.")
@click.option("--attention-factor", type=Number(0), help="Attention factor; default: the method's own.")
@click.option("--uniform", is_flag=True, help="Give both tiers one attention factor, for runtimes with one factor.")
@click.option("--original-window", type=TOKENS, help="Override the window that the model's config says it serves.")
@click.option("--from-plain", is_flag=True, help="For a scaled model: start from the plain rotation and the original "
              "window; default: from its own factors and its own window.")  # fmt: skip
@click.option("--name", help="The recipe's name.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="RECIPE", help="Folder or .json file.")
@force_option
@revision_option
def derive(model: str, output: Path | None, force: bool, **options: Any) -> None:
    """Make an analytic recipe for MODEL; no search needed.

    A model that is scaled already keeps its own rotation within its window; beyond it the method's factors multiply
    the model's.

    \b
    lrconvert recipe derive demo --method yarn --factor 8 -o recipes/demo-8x
    lrconvert recipe derive meta-llama/Llama-3.2-1B --method ntk --target 512k -o recipes/llama-512k
    """
    from lrconvert.recipe.models import derive_for

    recipe, notes = derive_for(model, **options)
    for note in notes:
        out.hint(f"note: {note}")
    _finish(recipe, output, force, model)


@command.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--model", help="The model that the factors fit; completes what the sources leave out.")
@click.option("--family", help="The model's family, as in model_type.")
@click.option("--theta", type=Number(1), help="The model's rope_theta.")
@click.option("--original-window", type=TOKENS, help="The window that the model was trained with.")
@click.option("--window", type=TOKENS, help="The window that a config's rotation serves, where it doesn't say or says "
              "otherwise.")  # fmt: skip
@click.option("--name", help="The recipe's name.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="RECIPE", help="Folder or .json file.")
@force_option
def import_(
    sources: tuple[str, ...],
    model: str | None,
    family: str | None,
    theta: float | None,
    original_window: int | None,
    window: int | None,
    name: str | None,
    output: Path | None,
    force: bool,
) -> None:
    """Make a recipe from published factors; several SOURCEs become its tiers.

    \b
    A SOURCE is a config.json or a model with scaled RoPE (longrope, su, yarn, linear, dynamic, llama3),
    a LongRoPE CSV table (`file.csv` or `file.csv=LENGTH`), a file with short_factor and long_factor,
    or a GGUF with factors.

    \b
    lrconvert recipe import phi-3-mini-128k/config.json -o recipes/phi3
    lrconvert recipe import 4k_la2_256k.csv ft_la2_256k.csv --model meta-llama/Llama-2-7b-hf -o recipes/llama2
    """
    from lrconvert.recipe.importing import Base, import_recipe

    recipe, notes = import_recipe(sources, Base(family, theta, original_window, model, window), name)
    for note in notes:
        out.hint(f"note: {note}")
    _finish(recipe, output, force, model or _model_of(sources) or recipe.base_model or "MODEL")


@command.command()
@click.argument("recipe")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="STEM",
    help="Write STEM.png and STEM.svg (needs matplotlib).",
)
@click.option("--journal", type=click.Path(path_type=Path), metavar="FILE",
              help="Also plot the search that found it: STEM-search.png and STEM-search.svg.")  # fmt: skip
def plot(recipe: str, output: Path | None, journal: Path | None) -> None:
    """Plot factors by frequency index, every tier beside PI, NTK-aware and YaRN.

    With the journal of a search, also plot its loss against evaluations and how the factors moved. Without -o, or
    without matplotlib, the plot is printed as text.
    """
    from lrconvert.errors import EnvironmentFailure
    from lrconvert.recipe import load_recipe
    from lrconvert.recipe.plotting import plot_recipe, sparklines
    from lrconvert.searching.journal import read_journal
    from lrconvert.searching.plotting import journal_lines, plot_journal

    loaded = load_recipe(recipe)
    records = read_journal(journal).records if journal is not None else []
    for line in [*sparklines(loaded), *journal_lines(records)]:
        out.say(line)
    if output is None:
        more = f" --journal {journal}" if journal is not None else ""
        out.hint(f"to write a plot: lrconvert recipe plot {recipe}{more} -o {loaded.name}")
        return
    stem = output.with_suffix("") if output.suffix in (".png", ".svg") else output
    try:
        paths = plot_recipe(loaded, stem)
        if records:
            paths += plot_journal(records, stem.with_name(f"{stem.name}-search"))
    except EnvironmentFailure as error:
        raise EnvironmentFailure(f"can't plot: {error.message}", remedy=error.remedy) from error
    out.say(" ".join(str(path) for path in paths))


def _model_of(sources: tuple[str, ...]) -> str | None:
    """The one source, where that is a model and not only its config or a table."""
    path = Path(sources[0])
    if path.name == "config.json":
        path = path.parent
        return str(path) if any(path.glob("*.safetensors")) else None
    return None if len(sources) > 1 or path.suffix in (".json", ".csv") or "=" in path.name else str(path)


def _finish(recipe: Recipe, output: Path | None, force: bool, model: str = "MODEL") -> None:
    """Write the recipe, or print it without an output."""
    from lrconvert.recipe import write_recipe

    for text in recipe.warnings():
        out.warn(text)
    if output is None:
        out.say(recipe.to_json().rstrip())
        return
    path = write_recipe(recipe, output, force=force)
    out.say(f"{path}: {out.count(len(recipe.tiers), 'tier')}, up to {recipe.tiers[-1].max_length} tokens")
    out.hint(f"next: {_steps.bake_step('hf', model, recipe.name, output)}")
