# SPDX-License-Identifier: Apache-2.0
"""Perplexity of the last tokens of each of some texts: of a model as it is, and of its extension at several lengths.

    python benchmarks/prose_perplexity.py MODEL --recipe RECIPE --text IDS.npy … --name NAME
        [--lengths 8192,65536,262144] [--judged 8000]

A gain on the kind of text that was trained on is partly adaptation; other prose shows what an extension costs.
Written: results/prose-NAME.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from _common import save

from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.extending.task import ADAPTER
from lrconvert.recipe import load_recipe, recipe_folder
from lrconvert.rope import Tier, serving
from lrconvert.training.loaded import LoadedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")],
                        default=[8192, 65536, 262144])  # fmt: skip
    parser.add_argument("--judged", type=int, default=8000)
    options = parser.parse_args()
    model, recipe = open_model(options.model), load_recipe(options.recipe)
    texts = {path.stem: np.load(path).astype(np.int64) for path in options.text}
    extended = merged(model, open_adapter(recipe_folder(options.recipe) / ADAPTER))
    rows = {"before": perplexities(model, recipe.tiers[:1], texts, options.lengths[:1], options.judged),
            "after": perplexities(extended, recipe.tiers, texts, options.lengths, options.judged)}  # fmt: skip
    save(f"prose-{options.name}", {"judged": options.judged, "perplexity": rows})


def perplexities(
    model: Model, tiers: tuple[Tier, ...], texts: dict[str, np.ndarray], lengths: list[int], judged: int
) -> dict[str, dict[str, float]]:
    """By text and length; each text's own last `length` tokens are the context."""
    loaded = LoadedModel(model)
    found: dict[str, dict[str, float]] = {name: {} for name in texts}
    for name, ids in texts.items():
        for length in (length for length in lengths if length <= len(ids)):
            loaded.rotation = serving(tiers, length)
            (losses,) = loaded.losses(ids[None, -length:], (length - 1 - judged, length - 1))
            found[name][str(length)] = round(float(np.exp(losses[-judged:].mean())), 3)
            print(name, length, found[name][str(length)], flush=True)
    return found


if __name__ == "__main__":
    main()
