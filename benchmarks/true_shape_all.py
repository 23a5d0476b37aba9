# SPDX-License-Identifier: Apache-2.0
"""Every artifact of plans/true-shape.toml, verified on a GPU by true_shape.py: those that are not on record yet.

    python benchmarks/true_shape_all.py --out rows/ --scratch DIR [--library LIBLLAMA] [--seconds N] [--list]
    python benchmarks/true_shape.py --collect rows/

Shapes are made in DIR as they are needed, and removed when the last row of one is done. Each row is a process of its
own, and is kept as soon as it is known: the same command goes on. `--seconds`: after so many no row is begun, and one
that still runs is stopped: the next call begins it again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import RESULTS
from true_shape import NAME, row_key

from lrconvert.recipe import load_recipe

PLAN = Path(__file__).parent / "plans" / "true-shape.toml"
HERE = Path(__file__).parent
MAKE = HERE.parent / "tools" / "make_shape.py"


@dataclass(frozen=True)
class Wanted:
    """One row to measure."""

    shape: str
    layers: int | None
    widen: float
    recipe: str
    to: str
    kind: str  # type of a GGUF or an ONNX folder, or what a folder computes in
    window: int
    mutants: bool
    decode: int  # tokens of the longest prompt; 0: as the device's budget has it

    @property
    def model(self) -> str:
        """The folder's name, as rows have it."""
        return self.shape if self.layers is None else f"{self.shape}-{self.layers}"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.model, self.recipe, self.window, f"{self.to} {self.kind}"

    def is_in(self, row: dict[str, Any]) -> bool:
        """Whether a row of a record is this one: with mistakes and as long prompts, where such are wanted."""
        mistakes = bool(row["caught"]) or not self.mutants
        return row_key(row) == self.key and mistakes and row.get("decode", 0) >= self.decode

    def command(self, folder: Path, options: argparse.Namespace) -> list[str]:
        """What measures it, on a model in a folder."""
        kind = ["--dtype" if self.to == "hf" else "--type", self.kind]
        more = ["--mutants"] if self.mutants else []
        more += ["--decode", str(self.decode)] if self.decode else []
        more += ["--library", options.library] if options.library and self.to == "gguf" else []
        if self.window != load_recipe(self.recipe).tiers[-1].max_length:
            more += ["--window", str(self.window)]
        script = [sys.executable, str(HERE / "true_shape.py"), str(folder)]
        places = ["--scratch", str(options.scratch), "--out", str(options.out)]
        return [*script, "--recipe", self.recipe, "--to", self.to, *kind, *more, "--device", options.device, *places]


def wanted(path: Path) -> Iterator[Wanted]:
    """The rows of the plan, in its order."""
    for row in tomllib.loads(path.read_text())["row"]:
        kinds = row["dtypes"] if row["to"] == "hf" else row["types"]
        for shape, named, kind in itertools.product(row["shapes"], row["recipes"], kinds):
            recipe = named.format(shape=shape)
            for window in row.get("windows", [load_recipe(recipe).tiers[-1].max_length]):
                more = {
                    "layers": row.get("layers"),
                    "widen": row.get("widen", 3.0),
                    "mutants": row.get("mutants", False),
                    "decode": row.get("decode", 0),
                }
                yield Wanted(shape, recipe=recipe, to=row["to"], kind=kind, window=window, **more)


def on_record(out: Path) -> list[dict[str, Any]]:
    """Rows that passed."""
    kept = RESULTS / f"{NAME}.json"
    rows = json.loads(kept.read_text())["rows"] if kept.is_file() else []
    rows += [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    return [row for row in rows if row["passed"]]


def missing(plan: Path, out: Path) -> list[Wanted]:
    """In the plan's order, those of one shape together."""
    known = on_record(out)
    return sorted((row for row in wanted(plan) if not any(map(row.is_in, known))), key=lambda row: row.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--library", help="libllama")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--list", action="store_true", help="what is missing, and nothing else")
    options = parser.parse_args()
    left = missing(options.plan, options.out)
    for row in left:
        print(*row.key, "with mistakes" if row.mutants else "", flush=True)
    if options.list:
        return
    if options.scratch is None:
        parser.error("--scratch is needed: shapes are made there")
    ends = time.monotonic() + options.seconds
    for model, rows in itertools.groupby(left, key=lambda row: row.model):
        folder = options.scratch / model
        for row in rows:
            remaining = ends - time.monotonic()
            if remaining <= 0:
                sys.exit(75)
            layers = [] if row.layers is None else ["--layers", str(row.layers)]
            made = [sys.executable, str(MAKE), row.shape, "-o", str(folder), "--widen", str(row.widen), *layers]
            subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
            limit = None if remaining == float("inf") else remaining
            try:
                subprocess.run(row.command(folder, options), timeout=limit)
            except subprocess.TimeoutExpired:
                sys.exit(75)
        shutil.rmtree(folder, ignore_errors=True)
    if failed := missing(options.plan, options.out):
        sys.exit("failed: " + ", ".join(" ".join(map(str, row.key)) for row in failed))


if __name__ == "__main__":
    main()
