# SPDX-License-Identifier: Apache-2.0
"""What the form of a recipe for every runtime costs: perplexity of the same tokens under both.

    python benchmarks/form_cost.py MODEL --recipe RECIPE [--other RECIPE …] --text TEXT … --lengths 4k,32k
        [--windows 4] [--judged 1024]

Each is baked, and its folder's own code runs on the CPU in float32. Written: results/form-RECIPE.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from _common import save

from lrconvert.evals.api import perplexity
from lrconvert.recipe import form_of, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--other", action="append", default=[], help="other recipes to compare with")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--lengths", type=lambda text: [1024 * int(part.rstrip("k")) for part in text.split(",")])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--judged", type=int, default=1024)
    options = parser.parse_args()
    form = form_of(load_recipe(options.recipe))
    if form is None:
        parser.error(f"{options.recipe} has no form")
    told, found = {}, {}
    for recipe in (options.recipe, form, *options.other):
        began = time.monotonic()
        result = perplexity(
            options.model,
            recipe=recipe,
            lengths=options.lengths,
            texts=options.text,
            judged=options.judged,
            excerpts=options.windows,
        ).result
        found[Path(recipe).name] = {"rows": result["rows"], "seconds": round(time.monotonic() - began, 1)}
        told = {key: result[key] for key in ("protocol", "texts", "runtime")}
        print(recipe, [(row["length"], row["perplexity"]) for row in result["rows"]], flush=True)
    save(f"form-{options.recipe}", {**told, "judged": options.judged, "windows": options.windows, "recipes": found})


if __name__ == "__main__":
    main()
