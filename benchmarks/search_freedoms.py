# SPDX-License-Identifier: Apache-2.0
"""What each freedom of a recipe is worth: start tokens, an attention factor per set, more sets than two.

    python benchmarks/search_freedoms.py MODEL --text A … --held-out B … --folder DIR [--window 8k] [--target 64k]
        [--budget 60] [--seeds 0 1 2] [--device cuda] [--name NAME]

Every search differs from `--for any` (one attention factor, no start tokens, two sets) in one freedom. A search for
four sets has half the evaluations for each. Held-out texts give perplexity of the same last 1,024 tokens of six
excerpts, and up to 20 labelled keys from each text at each length. A, B: token ids (.npy of integers) or texts.
Searches keep their journals in DIR. Written: results/search-freedoms-NAME.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _common import save

import lrconvert
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.cli._common import TOKENS
from lrconvert.evals.in_memory import LoadedSession
from lrconvert.evals.perplexity import measure_perplexity
from lrconvert.evals.protocols import Plan
from lrconvert.evals.retrieval import evaluation_keys, measure_retrieval
from lrconvert.evals.texts import read_texts, sources_of
from lrconvert.training.keys import LabelledForm
from lrconvert.training.loaded import LoadedModel

EXCERPTS, KEYS = 6, 20


def freedoms(window: int, target: int, budget: int) -> dict[str, dict[str, Any]]:
    """Options of each search."""
    lengths = [window]
    while lengths[-1] < target:
        lengths.append(2 * lengths[-1])
    fixed = {"budget": budget}
    return {
        "any": {"runtime": "any", **fixed},
        "start tokens": {"uniform": True, "start_tokens": True, **fixed},
        "an attention factor per set": fixed,
        f"{len(lengths)} sets": {"uniform": True, "tiers": lengths, "budget": budget // 2},
    }


def measured(options: argparse.Namespace, name: str, seed: int, given: dict[str, Any]) -> dict[str, Any]:
    output = options.folder / f"{name.replace(' ', '-')}-{seed}"
    found = lrconvert.search(
        options.model, target=options.target, texts=options.text, output=output, original_window=options.window,
        seed=seed, force=True, device=options.device, **given,
    )  # fmt: skip
    model = open_model(options.model)
    path = model.checkpoint.path
    session = LoadedSession(LoadedModel(model, device=options.device), found.recipe.tiers)
    texts = read_texts(sources_of(options.held_out), lambda: tokenizer_of(path), vocab=model.shape.vocab)
    tokens = [text.tokens for text in texts]
    lengths = [options.window * 2**step for step in range((options.target // options.window).bit_length())]
    rows = measure_perplexity(session, tokens, Plan(tuple(lengths), excerpts=EXCERPTS))
    form = LabelledForm.read(evaluation_keys(path))
    count = min(KEYS, len(form.labels))
    keys = measure_retrieval(session, form, tokenizer_of(path), tokens, lengths, keys=count)
    of = {length: [row for row in keys if row.length == length] for length in lengths}
    hits = {length: [sum(row.hits for row in rows), sum(row.trials for row in rows)] for length, rows in of.items()}
    return {
        "freedom": name,
        "seed": seed,
        "perplexity": {row.length: round(row.perplexity.value, 3) for row in rows},
        "keys": hits,
        "tiers": [[tier.max_length, tier.start_tokens, tier.attention_factor] for tier in found.recipe.tiers],
    }


def main() -> None:
    def tokens(text: str) -> int:
        return TOKENS.convert(text, None, None)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--window", type=tokens, default=8192)
    parser.add_argument("--target", type=tokens, default=65536)
    parser.add_argument("--budget", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default=None)
    parser.add_argument("--name", default="model")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in options.seeds:
        for name, given in freedoms(options.window, options.target, options.budget).items():
            rows.append(measured(options, name, seed, given))
            print(json.dumps(rows[-1]), flush=True)
    save(f"search-freedoms-{options.name}", {"rows": rows})


if __name__ == "__main__":
    main()
