# SPDX-License-Identifier: Apache-2.0
"""Artifacts of models of a published shape, with random weights, verified on a GPU; and mistakes in them.

    python tools/make_shape.py llama2-7b -o llama2-7b [--layers N]
    python benchmarks/true_shape.py llama2-7b --recipe llama2-7b-2048k --to hf --dtype bf16 --out rows/
    python benchmarks/true_shape.py llama2-7b --recipe llama2-7b-2048k --to gguf --type q8_0 --window 8192 --out rows/
    python benchmarks/true_shape.py --collect rows/

The weights of the models can't be redistributed; what size and shape decide does not need them. `--dense` raises the
length up to which positions are consecutive, for models of few layers, and `--decode` that of prompts to decode from.
`--mutants` bakes every mistake of `lrconvert.parity.mutants` too and verifies it in prompts of 512 tokens. `--collect`
adds the rows of many calls to results/true-shape.{json,md}. true_shape_all.py makes all those that
plans/true-shape.toml names.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _common import RESULTS, bounds_away, facts, save, scratch_folder

from lrconvert import parity
from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import LrconvertError
from lrconvert.parity import Options
from lrconvert.parity.cases import SPREAD_TOKENS, Budget
from lrconvert.parity.mutants import RECIPE_MUTANTS, unpermuted_qk
from lrconvert.precision import long_name
from lrconvert.recipe import Recipe, load_recipe
from lrconvert.targets import gguf, hf, onnx, target_of

NAME = "true-shape"
STARTED = time.perf_counter()
KEPT = ("code", "case", "length", "verdict", "kl_mean", "kl_max", "bound", "noise", "reason", "seconds")
MADE = "made.json"  # of tools/make_shape.py: how the weights were drawn
SUFFIX = {"gguf": ".gguf"}
ACROSS = re.compile(r"decode across (\d+)")


@dataclass(frozen=True)
class Dense(Options):
    """Consecutive positions up to `dense` tokens, and prompts up to `decode`, whatever the device is thought to hold;
    0: as usual."""

    dense: int = 0
    decode: int = 0

    @property
    def budget(self) -> Budget:
        usual = super().budget
        dense, decode = self.dense or usual.dense, self.decode or self.dense or usual.decode
        return replace(usual, dense=dense, decode=decode)


class Quick(Options):
    """Every length in 512 tokens, nothing decoded."""

    @property
    def budget(self) -> Budget:
        return Budget(dense=SPREAD_TOKENS, decode=0)


def plan(options: argparse.Namespace, model: Model, recipe: Recipe, output: Path) -> Any:
    window = options.window
    if options.to == "hf":
        return hf.plan(model, recipe, output, hf.Options(window=window, lift=True))
    if options.to == "gguf":
        chosen = gguf.Options(type=options.type, window=window, lossy=True, lift=True, library=options.library)
        return gguf.plan(model, recipe, output, chosen)
    chosen = onnx.Options(dtype=options.type or "f16", window=window, lift=True)
    return onnx.plan(model, recipe, output, chosen)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The row of one artifact."""
    model, recipe = open_model(str(options.model)), load_recipe(options.recipe)
    machine: dict[str, Any] = {"device": options.device, "dtype": long_name(options.dtype), "library": options.library}
    longest = {"dense": options.dense, "decode": options.decode}
    # A folder of its own: what one call left must not stop the next.
    with scratch_folder(options.scratch) as kept, tempfile.TemporaryDirectory(dir=kept) as made:
        scratch = Path(made)
        output = scratch / f"artifact{SUFFIX.get(options.to, '')}"
        started = time.monotonic()
        bake(plan(options, model, recipe, output))
        baked = time.monotonic()
        report = parity.verify(output, target_of(output), options=Dense(**machine, **longest), watch=show)
        done = time.monotonic()
        print(report.summary, flush=True)
        caught = {}
        for name in (*RECIPE_MUTANTS, "unpermuted") if options.mutants else ():
            if (found := mistake(options, model, recipe, name, scratch, machine)) is not None:
                caught[name] = found
                print(name, found, flush=True)
    shape = model.shape
    return {
        "model": options.model.name,
        "layers": shape.layers,
        "recipe": recipe.name,
        "window": options.window or recipe.tiers[-1].max_length,
        "artifact": " ".join(filter(None, (options.to, options.type or options.dtype))),
        "weights": json.loads(made.read_text()) if (made := options.model / MADE).is_file() else None,
        "seconds": {"bake": round(baked - started, 1), "verify": round(done - baked, 1)},
        "passed": report.passed,
        "summary": report.summary,
        "runtimes": report.runtimes,
        "reference": report.reference,
        "cases": [{key: row[key] for key in KEPT if row.get(key) is not None} for row in report.to_json()["rows"]],
        "caught": caught,
    }


def show(row: parity.Row) -> None:
    """A line for a row when it is known."""
    value = "" if row.kl_mean is None else f"{row.kl_mean:.1e}"
    seconds = f"{time.perf_counter() - STARTED:9.1f}"
    print(seconds, row.code, row.case, row.length, row.verdict, value, row.reason, flush=True)


def mistake(
    options: argparse.Namespace, model: Model, right: Recipe, name: str, scratch: Path, machine: dict[str, Any]
) -> dict[str, float] | None:
    """What failed of an artifact with a mistake, and how many bounds away it is (0: not by its logits); None where the
    mistake does not exist for this recipe, or the format can't have it."""
    wrong = right if name == "unpermuted" else RECIPE_MUTANTS[name](right)
    if wrong is None:
        return None
    output = scratch / f"{name.replace(' ', '-')}{SUFFIX.get(options.to, '')}"
    source = unpermuted_qk(model) if name == "unpermuted" else model
    try:
        bake(plan(options, source, wrong, output))
    except LrconvertError:
        return None
    against = {"against": str(options.model), "recipe": right}
    report = parity.verify(output, target_of(output), options=Quick(**machine), **against)
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    return bounds_away(report)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """In Markdown: a row for each artifact."""
    lines = [
        "| model | layers | recipe, window | artifact | bake | verify | cases | decoded across "
        "| closest to its bound | mistakes caught |",
        "|---|---:|---|---|---:|---:|---:|---|---|---:|",
    ]
    for row in rows:
        judged = [case for case in row["cases"] if case.get("bound") and "kl_mean" in case]
        closest = max(judged, key=lambda case: case["kl_mean"] / case["bound"], default=None)
        near = "" if closest is None else (
            f"{closest['kl_mean'] / closest['bound']:.2f} ({closest['code']}, {closest['case']})"
        )  # fmt: skip
        mutants = f"{sum(map(bool, row['caught'].values()))} of {len(row['caught'])}" if row["caught"] else ""
        cells = (
            row["model"],
            row["layers"],
            f"{row['recipe']}, {row['window']}",
            row["artifact"],
            f"{row['seconds']['bake']} s",
            f"{row['seconds']['verify']} s",
            f"{len(judged)} {'passed' if row['passed'] else 'FAILED'}",
            crossed(row),
            near,
            mutants,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def crossed(row: dict[str, Any]) -> str:
    """The boundaries that were decoded across, and how many were not."""
    asked, passed = set(), set()
    for case in row["cases"]:
        if found := ACROSS.match(case["case"]):
            asked.add(int(found[1]))
            if case["verdict"] == "pass":
                passed.add(int(found[1]))
    left = f"; {len(asked - passed)} not" if asked - passed else ""
    return ", ".join(f"{boundary // 1024}k" for boundary in sorted(passed)) + left


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of."""
    return row["model"], row["recipe"], row["window"], row["artifact"]


def collect(folder: Path, note: str) -> None:
    """Rows that were kept before stay, but for those that were measured again."""
    kept = RESULTS / f"{NAME}.json"
    before = json.loads(kept.read_text())["rows"] if kept.is_file() else []
    new = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = {(*row_key(row), row.get("dense", 0)): row for row in [*before, *new]}
    rows = sorted(found.values(), key=lambda row: (row["layers"], *map(str, row_key(row))))
    result = json.loads(save(NAME, {"rows": rows}).read_text())
    devices = sorted({info["device"] for row in rows for info in row["runtimes"].values()})
    head = [
        f"Models of published shapes, random weights with q and k widened, on {', '.join(devices)}. {result['date']}.",
        "Command: `python benchmarks/true_shape.py` with the options of each row.",
        "",
        *([note, ""] if note else []),
    ]
    (RESULTS / f"{NAME}.md").write_text("\n".join([*head, *table(rows)]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--collect", type=Path)
    parser.add_argument("--note", default="", help="of --collect: a paragraph above the table")
    parser.add_argument("--recipe")
    parser.add_argument("--window", type=int)
    parser.add_argument("--to", choices=("hf", "gguf", "onnx"), default="hf")
    parser.add_argument("--type", help="of a GGUF or an ONNX folder; default: as stored")
    parser.add_argument("--dtype", default="f32", help="what a folder computes in")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dense", type=int, default=0)
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("--mutants", action="store_true")
    parser.add_argument("--library", help="libllama")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.collect:
        collect(options.collect, options.note)
        return
    row = {**measured(options), "dense": options.dense, "decode": options.decode}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        row = {**facts(), **row}  # of where it was measured
        parts = (row["model"], row["recipe"], row["window"], row["artifact"], options.dtype, options.dense)
        (options.out / ("-".join(map(str, parts)).replace(" ", "-") + ".json")).write_text(json.dumps(row, indent=1))
    print("\n".join(table([row])))


if __name__ == "__main__":
    main()
