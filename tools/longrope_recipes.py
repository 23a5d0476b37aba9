# SPDX-License-Identifier: Apache-2.0
"""Write the recipes of the LongRoPE paper's models from the tables that its authors published.

    git clone https://github.com/microsoft/LongRoPE && git -C LongRoPE checkout 3a046008d7270cc808fc560b466936a4e5c1a17f
    python tools/longrope_recipes.py LongRoPE/cube-new/longrope_scale

For each fine-tuned model (of 128k and of 256k tokens) its recovery tables, the table that it was fine-tuned with and
those of the second search become the tiers of one recipe. Start tokens are not published with the tables: none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrconvert.data import RECIPES
from lrconvert.recipe import Provenance, write_recipe
from lrconvert.recipe.importing import Base, import_recipe

REPOSITORY, FOLDER = "microsoft/LongRoPE", "cube-new/longrope_scale"
COMMIT = "3a046008d7270cc808fc560b466936a4e5c1a17f"  # of the branch dev/starmys, whose licence is MIT
THETA, ORIGINAL_WINDOW = 10000.0, 4096


@dataclass(frozen=True)
class Tables:
    """The tables of one fine-tuned model: `{N}k_{label}.csv`, and `ft_{label}.csv` for its own length."""

    recipe: str
    family: str
    model: str
    label: str

    @property
    def tuned(self) -> str:
        return self.label.rpartition("_")[2]


PUBLISHED = (
    Tables("llama2-7b-2048k", "llama", "meta-llama/Llama-2-7b-hf", "la2_256k"),
    Tables("llama2-7b-2048k-ft128k", "llama", "meta-llama/Llama-2-7b-hf", "la2_128k"),
    Tables("mistral-7b-2048k", "mistral", "mistralai/Mistral-7B-v0.1", "mis_256k"),
    Tables("mistral-7b-2048k-ft128k", "mistral", "mistralai/Mistral-7B-v0.1", "mis_128k"),
)


def write(tables: Tables, folder: Path) -> Path:
    """One recipe, from the tables in a folder; its file."""
    tuned = f"ft_{tables.label}.csv"
    lengths = {path.name: 1024 * int(path.name.partition("k_")[0]) for path in folder.glob(f"*k_{tables.label}.csv")}
    lengths[tuned] = 1024 * int(tables.tuned[:-1])
    names = sorted(lengths, key=lengths.__getitem__)
    sources = [f"{folder / name}={lengths[name]}" for name in names]
    recipe, _ = import_recipe(
        sources, Base(family=tables.family, theta=THETA, original_window=ORIGINAL_WINDOW), tables.recipe
    )
    provenance = Provenance(
        kind="published",
        source=f"{REPOSITORY} @ {COMMIT}, {FOLDER}: {', '.join(names)}",
        licence="MIT",
        weights=f"{tables.model} fine-tuned at {tables.tuned} tokens by the paper's authors",
        notes=(
            "start tokens are not published with the tables: none",
            "attention factors by LongRoPE's formula, for each table's own length",
        ),
    )
    return write_recipe(
        replace(recipe, base_model=tables.model, provenance=provenance), RECIPES / tables.recipe, force=True
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the recipes of the LongRoPE paper's models.")
    parser.add_argument("folder", type=Path, help=f"{FOLDER} of {REPOSITORY} at commit {COMMIT[:12]}")
    for tables in PUBLISHED:
        print(write(tables, parser.parse_args(arguments).folder))


if __name__ == "__main__":
    main()
