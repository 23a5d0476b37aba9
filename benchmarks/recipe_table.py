# SPDX-License-Identifier: Apache-2.0
"""What a searched recipe is worth: beside the analytic ones and the model as it is, on text it was not searched on.

    python benchmarks/recipe_table.py MODEL --recipe RECIPE --held-out TOKENS.npy … --name NAME
        [--devices cuda:0,cuda:1] [--dtype bfloat16] [--windows 4] [--trials 2] [--sets searched,…] [--keep DIR]
        [--page] [--into]

Every recipe is baked, and its folder's own code runs: perplexity of whole documents at the original window and at 2, 4
and 8 times it, and passkeys at ten depths. Short benchmarks are `lrconvert eval benchmarks` of two of those folders,
which --keep keeps; its results are expected as recipe-NAME-before.json and -after.json. --page writes the page alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
from _common import RESULTS, save

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.evals.figures import difference_figure, share_figure
from lrconvert.evals.passkey import PasskeyFormat, by_length, form_of, measure_passkey
from lrconvert.evals.perplexity import measure_perplexity
from lrconvert.evals.protocols import Plan
from lrconvert.evals.scores import unpack
from lrconvert.recipe import Recipe, derive_recipe, load_recipe, write_recipe
from lrconvert.rope import longrope_attention_factor
from lrconvert.runtimes.transformers import open_session
from lrconvert.targets import hf

HIGHEST = 2.5  # times the searched set's perplexity: where the picture ends
SEARCHED, UNMODIFIED = "searched", "unmodified"


def recipes(model: Model, searched: Recipe) -> dict[str, Recipe]:
    """By the name that the table gives them. All but the searched one leave the original window as it is."""
    shape, window, target = model.shape, searched.original_window, searched.tiers[-1].max_length
    ratio = target / window
    ours = longrope_attention_factor(ratio, window)

    def derived(method: Any, by: float = ratio, attention: float | None = None) -> Recipe:
        made = derive_recipe(
            method, by, family=searched.family, rotary_dim=shape.rotary_dim, theta=shape.theta,
            original_window=window, attention_factor=attention,
        )  # fmt: skip
        return replace(made, tiers=(made.tiers[0], replace(made.tiers[1], max_length=target)))

    plain = derived("pi", attention=1.0)
    same = replace(plain.tiers[0], max_length=target)
    return {
        UNMODIFIED: replace(plain, tiers=(plain.tiers[0], same)),
        "PI": plain,
        "NTK(s)": derived("ntk"),
        "NTK(2s)": derived("ntk", 2 * ratio),
        "NTK(2s), LongRoPE's factor": derived("ntk", 2 * ratio, ours),
        "YaRN": derived("yarn"),
        "YaRN, LongRoPE's factor": derived("yarn", attention=ours),
        SEARCHED: searched,
    }


class Table:
    """Measures sets, each on the first device that is free."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.model = open_model(options.model)
        self.searched = load_recipe(options.recipe)
        window, target = self.searched.original_window, self.searched.tiers[-1].max_length
        self.lengths = tuple(window * 2**power for power in range(20) if window * 2**power <= target)
        self.texts = [np.load(path).astype(np.int64) for path in options.held_out]
        self.plan = Plan(self.lengths, excerpts=options.windows, whole=True)
        self.devices: Queue[str] = Queue()
        for device in options.devices.split(","):
            self.devices.put(device)

    def measure(self) -> dict[str, Any]:
        named = recipes(self.model, self.searched)
        wanted = self.options.sets.split(",") if self.options.sets else list(named)
        folders = {name: self._bake(number, named[name]) for number, name in enumerate(wanted)}
        with ThreadPoolExecutor(self.devices.qsize()) as pool:
            found = dict(zip(wanted, pool.map(lambda name: self._ask(name, folders[name]), wanted), strict=True))
        return {
            "lengths": self.lengths,
            "original_window": self.searched.original_window,
            "protocol": self.plan.sentence,
            "texts": [path.name for path in self.options.held_out],
            "sets": found,
        }

    def _bake(self, number: int, recipe: Recipe) -> Path:
        output = self.folder / f"set{number}-{recipe.name[:20]}"
        if not output.exists():
            bake_plan(hf.plan(self.model, recipe, output))
        return output

    def _ask(self, name: str, folder: Path) -> dict[str, Any]:
        options, device = self.options, self.devices.get()
        try:
            with ExitStack() as stack:
                session = stack.enter_context(open_session(folder, custom=True, device=device, dtype=options.dtype))
                rows = measure_perplexity(session, self.texts, self.plan)
                # Of the model: what is baked from it carries none.
                form, encode = PasskeyFormat.read(form_of(self.model.checkpoint.path)), tokenizer_of(folder)
                keys = measure_passkey(session, form, encode, self.lengths, trials=options.trials)
                runtime = session.info
        finally:
            self.devices.put(device)
        passkeys = {total.length: [total.hits, total.trials] for total in by_length(keys)}
        print(name, [round(row.perplexity.value, 2) for row in rows], passkeys, flush=True)
        return {"perplexity": [asdict(row) for row in rows], "passkeys": passkeys, "runtime": runtime}


# --- the page --------------------------------------------------------------------------------------------


def comparison(result: dict[str, Any]) -> list[str]:
    """The searched set beside the best other one at the longest length, and beside the unmodified model within its
    window; nothing where only some sets were measured."""
    values = {
        name: [row["perplexity"]["value"] for row in found["perplexity"]] for name, found in result["sets"].items()
    }
    if not {SEARCHED, UNMODIFIED} <= values.keys():
        return []
    best = min(values.keys() - {SEARCHED}, key=lambda name: values[name][-1])
    return [
        "",
        f"At {result['lengths'][-1]:,} tokens the searched set has {values[SEARCHED][-1] / values[best][-1]:.3f} of "
        f"the perplexity of the best other one ({best}); within the original window "
        f"{values[SEARCHED][0] / values[UNMODIFIED][0]:.3f} of the unmodified model's.",
    ]


def page(result: dict[str, Any], before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    lengths = result["lengths"]
    runtime = next(iter(result["sets"].values()))["runtime"]
    lines = [
        f"# {result['name']}: the searched recipe beside analytic ones",
        "",
        f"{result['date']}, {runtime['device']}, {runtime['dtype']}, transformers {runtime['transformers']}, torch "
        f"{runtime['torch']}; the artifacts' own code. Command: `{result['command']}`.",
        "",
        f"Measured: {result['protocol']}. Texts, none of them searched on: {', '.join(result['texts'])}. "
        "95 % intervals are in the JSON beside this page.",
        "",
        "| set | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "|---" + "|---:" * len(lengths) + "|",
    ]
    for name, found in result["sets"].items():
        cells = [f"{row['perplexity']['value']:.2f}" for row in found["perplexity"]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        *comparison(result),
        "",
        "Passkeys found, and the 95 % interval of their share:",
        "",
        "| set | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "|---" + "|---:" * len(lengths) + "|",
    ]
    for name, found in result["sets"].items():
        cells = []
        for hits, trials in found["passkeys"].values():
            figure = share_figure(hits, trials)
            cells.append(f"{hits} of {trials} ({figure.low:.2f} … {figure.high:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if before and after:
        lines += ["", *benchmarks(before, after)]
    return "\n".join(lines) + "\n"


def benchmarks(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    lines = [
        f"Short benchmarks, within the original window. Protocol: {after['protocol']}.",
        "",
        "| task | shots | questions | unmodified | searched | difference, paired |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    earlier = {row["task"]: row for row in before["rows"]}
    for row in after["rows"]:
        old = earlier[row["task"]]
        change, error = difference_figure(unpack(old["scores"]), unpack(row["scores"]))
        values = [f"{found['score']['value']:.4f} ± {found['stderr']:.4f}" for found in (old, row)]
        paired = f"{change.value:+.4f} ± {error:.4f}"
        lines.append(f"| {row['task']} | {row['shots']} | {row['questions']} | {values[0]} | {values[1]} | {paired} |")
    return [*lines, "", "± is one standard error."]


def picture(result: dict[str, Any], path: Path) -> None:
    """Perplexity against length, both in powers; the worst sets leave it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axis = pyplot.subplots(figsize=(8.5, 4.2))
    low, high = [], []
    for name, found in result["sets"].items():
        values = [row["perplexity"] for row in found["perplexity"]]
        thick = name == SEARCHED
        lengths = [row["length"] for row in found["perplexity"]]
        style: dict[str, Any] = {"linewidth": 2.5, "color": "black", "zorder": 3} if thick else {"linewidth": 1.2}
        axis.plot(lengths, [value["value"] for value in values], marker="o", markersize=3, label=name, **style)
        if thick:
            low, high = ([value[end] for value in values] for end in ("low", "high"))
            axis.fill_between(lengths, low, high, color="black", alpha=0.12)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    if low:
        axis.set_ylim(0.85 * min(low), HIGHEST * max(high))
    axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
    axis.yaxis.set_minor_formatter(ticker.ScalarFormatter())
    axis.set_xticks(result["lengths"], [f"{length // 1024}k" for length in result["lengths"]])
    axis.axvline(result["original_window"], color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("tokens of context; dotted: the original window")
    axis.set_ylabel("perplexity, held-out text")
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def summary(result: dict[str, Any], before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    """What the recipe itself says of all this."""
    lengths = [str(length) for length in result["lengths"]]
    found: dict[str, Any] = {
        "protocol": result["protocol"],
        "texts": result["texts"],
        "perplexity": {
            name: {length: round(row["perplexity"]["value"], 3) for length, row in zip(lengths, rows, strict=True)}
            for name, rows in ((name, values["perplexity"]) for name, values in result["sets"].items())
        },
        "passkeys, found of trials": result["sets"][SEARCHED]["passkeys"],
    }
    if before and after:
        found["short benchmarks, unmodified and searched, standard errors"] = {
            new["task"]: [round(row[key], 4) for row in ({**old, **old["score"]}, {**new, **new["score"]})
                          for key in ("value", "stderr")]
            for old, new in zip(before["rows"], after["rows"], strict=True)
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--held-out", type=Path, nargs="*", default=[])
    parser.add_argument("--name", required=True)
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--sets", help="with commas; default: all")
    parser.add_argument("--keep", type=Path, help="where the baked folders stay")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--into", action="store_true", help="write what was found into the recipe as well")
    options = parser.parse_args()
    path = RESULTS / f"recipe-{options.name}.json"
    if not options.page:
        with tempfile.TemporaryDirectory() as folder:
            save(path.stem, {"name": options.name, **Table(options, options.keep or Path(folder)).measure()})
    result = json.loads(path.read_text())
    parts = [path.with_name(f"{path.stem}-{when}.json") for when in ("before", "after")]
    before, after = (json.loads(part.read_text()) if part.exists() else None for part in parts)
    path.with_suffix(".md").write_text(page(result, before, after), encoding="utf-8")
    picture(result, path.with_suffix(".png"))
    if options.into:
        recipe = load_recipe(options.recipe)
        evaluation = {**(recipe.evaluation or {}), "held_out": summary(result, before, after)}
        write_recipe(replace(recipe, evaluation=evaluation), Path(options.recipe), force=True)


if __name__ == "__main__":
    main()
