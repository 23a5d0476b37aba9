# SPDX-License-Identifier: Apache-2.0
"""A finished extension as a shipped recipe with its record.

    python benchmarks/extension_record.py OUT --name NAME [--method PLAN] [--on NAME] [--also OTHER]
        [--base PERPLEXITY.json]

OUT is the recipe that `lrconvert extend -o OUT` wrote, OUT.work beside it. Stages of a recipe that it began with are in
the work folder of that one, or in a record that is kept already; `--on` is the name that it is shipped under. OTHER is
another such recipe, of the same stages but for the evaluation: what it measured is added. `--base` is a measurement of
the model before. Written: recipes/NAME with recipe and adapter (its README is written by hand),
results/search/recipes/NAME-STAGE.journal.jsonl of every search, results/extension-NAME.json (stages, logs,
measurements), -NAME.png, and the table on the terminal, to be put into the README.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from _common import RESULTS

from lrconvert.checkpoint.adapter import WEIGHTS
from lrconvert.extending.plan import LENGTHS
from lrconvert.extending.run import RESULT
from lrconvert.extending.task import ADAPTER, JOURNAL
from lrconvert.recipe import Recipe, load_recipe, write_recipe
from lrconvert.recipe.plotting import new_pyplot, plain_log_scale, save
from lrconvert.training.tuning import LOG

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
JOURNALS = RESULTS / "search" / "recipes"
EVERY = 10  # steps of a log that are kept
USED_BY = {"keys": "retrieval", "depths": "passkey"}  # options of an evaluation, and what they are for
KINDS = {"perplexity": "perplexity", "retrieval": "keys behind one text", "passkey": "passkeys"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--method", help="the plan's name, where the run's own file had another")
    parser.add_argument("--on", help="the name of the recipe that it began with")
    parser.add_argument("--also", type=Path)
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    recipe = named(load_recipe(options.out), options.name, options.method, options.on)
    if options.also:
        if not same_adapter(options.out, options.also):
            raise SystemExit(f"{options.also} has another adapter than {options.out}")
        recipe = with_measurements(recipe, load_recipe(options.also))
    if options.base:
        recipe = with_base(recipe, json.loads(options.base.read_text()))
    shipped = RECIPES / options.name
    write_recipe(recipe, shipped, force=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (shipped / ADAPTER).mkdir(exist_ok=True)
        shutil.copyfile(options.out / ADAPTER / name, shipped / ADAPTER / name)
    record = {"date": date.today().isoformat(),
              "command": f"lrconvert extend … --plan {recipe.provenance.method} -o {options.name}",
              "stages": [stage_record(stage, options.out.parent, options.name)
                         for stage in recipe.provenance.stages],
              "evaluation": recipe.evaluation}  # fmt: skip
    (RESULTS / f"extension-{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    assert recipe.evaluation is not None
    measured = recipe.evaluation["measured"]
    plot(measured, recipe, RESULTS / f"extension-{options.name}.png")
    print(table(measured))


def named(recipe: Recipe, name: str, method: str | None, on: str | None) -> Recipe:
    origin = recipe.provenance
    search = {key: value for key, value in (origin.search or {}).items() if key != "on"} | ({"on": on} if on else {})
    stages = tuple({**stage, "name": f"{number}-{stage['options']['kind']}"}
                   for number, stage in enumerate(origin.stages, 1))  # fmt: skip
    return replace(recipe, name=name, provenance=replace(origin, method=method or origin.method, search=search,
                                                            stages=stages))  # fmt: skip


def same_adapter(one: Path, other: Path) -> bool:
    first, second = ((folder / ADAPTER / WEIGHTS).read_bytes() for folder in (one, other))
    return first == second


def with_measurements(recipe: Recipe, other: Recipe) -> Recipe:
    """Also in the stage that evaluates: its lengths, and its time. Raises `ValueError` where the other one has other
    sets, or another adapter."""
    if other.tiers != recipe.tiers:
        raise ValueError(f"{other.name} has other sets than {recipe.name}")
    *earlier, mine = recipe.provenance.stages
    theirs = other.provenance.stages[-1]
    lengths = {key: sorted({*mine["options"][key], *theirs["options"][key]}) for key in LENGTHS}
    own = {key: theirs["options"][key] for key in ("keys", "depths") if not mine["options"][USED_BY[key]]}
    together = {**mine, "seconds": round(mine["seconds"] + theirs["seconds"], 1),
                "options": {**mine["options"], **lengths, **own}}  # fmt: skip
    recipe = replace(recipe, provenance=replace(recipe.provenance, stages=(*earlier, together)))
    assert recipe.evaluation is not None and other.evaluation is not None
    measured = {**recipe.evaluation["measured"], **other.evaluation["measured"]}
    return replace(recipe, evaluation={**recipe.evaluation, "measured": measured})


def with_base(recipe: Recipe, measured: dict[str, Any]) -> Recipe:
    """With the perplexity of the model before its extension."""
    assert recipe.evaluation is not None
    base = {f"base perplexity@{recipe.original_window}": measured}
    return replace(recipe, evaluation={**recipe.evaluation, "measured": {**recipe.evaluation["measured"], **base}})


def is_kept(journal: Path) -> bool:
    """Whether it is there already: another recipe began with this stage."""
    return any(path.read_bytes() == journal.read_bytes() for path in JOURNALS.glob("*.journal.jsonl"))


def stage_record(stage: dict[str, Any], beside: Path, name: str) -> dict[str, Any]:
    """The stage as the recipe has it, with its log; its journal is copied. Of a stage whose work folder is not among
    those `beside` the recipe, what a kept record says."""
    found = [path.parent for path in beside.glob(f"*.work/*-{stage['digest'][:8]}/{RESULT}")]
    if not found:
        records = [json.loads(path.read_text()) for path in RESULTS.glob("extension-*-2048k*.json")]
        kept = [old for record in records for old in record["stages"] if old["digest"] == stage["digest"]]
        return {**kept[0], "name": stage["name"]}
    folder = found[0]
    assert json.loads((folder / RESULT).read_text())["digest"] == stage["digest"]
    if (folder / JOURNAL).is_file() and not is_kept(folder / JOURNAL):
        shutil.copyfile(folder / JOURNAL, JOURNALS / f"{name}-{stage['name']}.journal.jsonl")
    log = (folder / LOG).read_text().splitlines() if (folder / LOG).is_file() else []
    return {**stage, "log": [json.loads(line) for line in log[::EVERY]]} if log else stage


# --- table and picture -----------------------------------------------------------------------------------


def tokens_short(length: int) -> str:
    return f"{length // 1024}k"


def by_kind(measured: dict[str, Any], kind: str) -> dict[int, dict[str, Any]]:
    return {int(key.partition("@")[2]): found for key, found in measured.items() if key.startswith(f"{kind}@")}


def table(measured: dict[str, Any]) -> str:
    """In Markdown: a row for every length."""
    found = {kind: by_kind(measured, kind) for kind in KINDS}
    lines = ["| tokens | " + " | ".join(KINDS.values()) + " |", "|---|" + "---:|" * len(KINDS)]
    for length in sorted({length for rows in found.values() for length in rows}):
        cells = [cell(found[kind].get(length)) for kind in KINDS]
        lines.append(f"| {tokens_short(length)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['perplexity']['value']:.1f}" if "perplexity" in found else f"{found['hits']} of {found['trials']}"


def plot(measured: dict[str, Any], recipe: Recipe, path: Path) -> None:
    """Perplexity, and the share of keys found, against length, with 95 % intervals and the boundaries of the tiers."""
    figure, (left, right) = new_pyplot().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    lines = [(left, "perplexity", "perplexity"), (right, "retrieval", "share"), (right, "passkey", "share")]
    for axis, kind, key in lines:
        rows = by_kind(measured, kind)
        if rows:
            values = [found[key]["value"] for found in rows.values()]
            low = [found[key]["value"] - found[key]["low"] for found in rows.values()]
            high = [found[key]["high"] - found[key]["value"] for found in rows.values()]
            axis.errorbar(list(rows), values, yerr=[low, [max(h, 0) for h in high]], marker="o", capsize=3,
                          label=KINDS[kind])  # fmt: skip
    base = next(found["perplexity"]["value"] for key, found in measured.items() if key.startswith("base"))
    left.axhline(base, color="grey", linestyle=":", label=f"before, at {tokens_short(recipe.original_window)}")
    plain_log_scale(left, [found["perplexity"][end] for found in by_kind(measured, "perplexity").values()
                           for end in ("low", "high")])  # fmt: skip
    lengths = sorted({int(key.partition("@")[2]) for key in measured})
    for axis, words in ((left, "perplexity of the same last tokens"), (right, "share of keys found")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [tokens_short(length) for length in lengths], fontsize=7, rotation=45)
        axis.set_xlabel("tokens of context")
        axis.set_ylabel(f"{words}, 95 % interval")
        axis.grid(alpha=0.3)
        for tier in recipe.tiers:
            axis.axvline(tier.max_length, color="black", linewidth=0.5, linestyle="--")
        axis.legend(fontsize=8)
    right.set_ylim(-0.03, 1.03)
    figure.suptitle(f"{recipe.name} (dashed: the sets' windows)", fontsize=10)
    save(figure, path)


if __name__ == "__main__":
    main()
