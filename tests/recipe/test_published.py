# SPDX-License-Identifier: Apache-2.0
"""The shipped recipes of the LongRoPE paper's models: the published numbers, and the models that they fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import longrope_recipes
import numpy as np
import pytest
from conftest import Result
from longrope_recipes import PUBLISHED, Tables
from support.pico import write_pico
from support.verifying import verify

from lrconvert.parity import Options
from lrconvert.parity.cases import SPREAD_TOKENS, Budget
from lrconvert.recipe import load_recipe

Cli = Callable[..., Result]

# By the names of the tables: 4k, 8k, 16k and 32k recover short sequences, 128k or 256k was fine-tuned.
WINDOWS = {
    "llama2-7b-2048k": (4, 8, 16, 32, 256, 512, 1024, 2048),
    "llama2-7b-2048k-ft128k": (4, 8, 16, 32, 128, 256, 512, 1024, 2048),
    "mistral-7b-2048k": (4, 8, 256, 512, 1024, 2048),
    "mistral-7b-2048k-ft128k": (4, 8, 128, 256, 512, 1024, 2048),
}
each = pytest.mark.parametrize("tables", PUBLISHED, ids=lambda tables: tables.recipe)


class Short(Options):
    """Every length in 512 tokens, nothing decoded."""

    @property
    def budget(self) -> Budget:
        return Budget(dense=SPREAD_TOKENS, decode=0)


def make_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """What decides a rotation as in a 7B: head size 128, θ, window; the rest is tiny."""
    changes = {"max_position_embeddings": 4096, "num_hidden_layers": 1, "head_dim": 128, **changes}
    changes = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False, **changes}
    return write_pico(folder, family, **changes)


@each
def test_it_says_where_every_number_comes_from(tables: Tables) -> None:
    recipe = load_recipe(tables.recipe)
    assert [tier.max_length for tier in recipe.tiers] == [1024 * count for count in WINDOWS[tables.recipe]]
    origin = recipe.provenance
    assert (origin.kind, origin.licence) == ("published", "MIT")
    assert origin.source is not None and longrope_recipes.COMMIT in origin.source
    assert origin.source.count(".csv") == len(recipe.tiers)
    assert origin.weights is not None and f"fine-tuned at {tables.tuned}" in origin.weights
    for tier in recipe.tiers:  # the authors' loader: sqrt(ln(length) / ln(4096))
        assert tier.attention_factor == pytest.approx(math.sqrt(math.log(tier.max_length) / math.log(4096)), rel=1e-15)
        assert tier.start_tokens == 0
        inverse = 10000.0 ** (-np.arange(64) / 64) / np.array(tier.factors)
        assert (np.diff(inverse) < 0).all()


@each
def test_it_has_the_published_numbers(tables: Tables, published_factors: Path) -> None:
    """Bit for bit those of a second, independent collection, wherever that has the table."""
    collected = {}
    model, tuned = tables.recipe.split("-2048k")[0], tables.tuned
    for path in published_factors.glob(f"longrope-{model}-*-{tuned}.json"):
        values = json.loads(path.read_text())
        collected[values["target_length"]] = tuple(values["short_factor"] or values["long_factor"])
    shipped = {tier.max_length: tier.factors for tier in load_recipe(tables.recipe).tiers}
    assert {length: shipped[length] for length in collected} == collected
    assert len(collected) >= len(shipped) - 1


def test_the_tool_makes_a_recipe_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written from rows as the authors lay them out, it is the shipped one again; a number that changed is not."""
    shipped = load_recipe("llama2-7b-2048k")
    assert shipped.provenance.source is not None
    names = shipped.provenance.source.partition(": ")[2].split(", ")
    for name, tier in zip(names, shipped.tiers, strict=True):
        (tmp_path / name).write_text("\n".join(",".join(map(repr, tier.factors)) for _ in range(32)))
    monkeypatch.setattr(longrope_recipes, "RECIPES", tmp_path / "recipes")
    assert load_recipe(longrope_recipes.write(PUBLISHED[0], tmp_path)) == shipped
    text = (tmp_path / "8k_la2_256k.csv").read_text()
    (tmp_path / "8k_la2_256k.csv").write_text(text.replace(repr(shipped.tiers[1].factors[9]), "1.5"))
    assert load_recipe(longrope_recipes.write(PUBLISHED[0], tmp_path)) != shipped


@pytest.mark.parametrize(("name", "family", "window"), [("llama2-7b-2048k", "llama", 4096),
                                                        ("mistral-7b-2048k", "mistral", 32768)])  # fmt: skip
def test_one_command_bakes_it_and_the_artifact_computes_it(
    name: str, family: str, window: int, tmp_path: Path, cli: Cli
) -> None:
    """The artifact's own code passes, up to two million tokens; against the other fine-tuned model's sets it fails."""
    model = make_model(tmp_path / "model", family, max_position_embeddings=window)
    lift = ("--lift-sliding-window",) if family == "mistral" else ()
    done = cli("hf", model, "--recipe", name, *lift, "-o", tmp_path / "baked")
    assert done.code == 0, done.err
    assert "fine-tuned at 256k tokens" in done.err
    options = Short(backends=("custom",))
    report = verify(tmp_path / "baked", options=options)
    assert report.passed, report.to_json()
    assert 2097152 in {row.length for row in report.rows if row.verdict == "pass"}
    assert not verify(tmp_path / "baked", options=options, recipe=f"{name}-ft128k").passed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 1e6}, "rope_theta 10000.0 in the recipe, 1000000.0 in the model"),
        ({"head_dim": 64}, "rotary dimension 128 in the recipe, 64 in the model"),
        ({"max_position_embeddings": 2048}, "original window 4096 in the recipe, 2048 in the model"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], said: str, tmp_path: Path, cli: Cli) -> None:
    done = cli("hf", make_model(tmp_path / "model", **changes), "--recipe", "llama2-7b-2048k", "-o", tmp_path / "out")
    assert done.code == 3 and said in done.err
    assert not (tmp_path / "out").exists()


def test_a_window_beyond_the_last_table_is_refused(tmp_path: Path, cli: Cli) -> None:
    model = make_model(tmp_path / "model")
    arguments = ("hf", model, "--recipe", "llama2-7b-2048k", "-o", tmp_path / "out", "--window")
    assert cli(*arguments, "4096k").code == 2
    assert cli(*arguments, "128k").code == 0


def test_list_and_show_present_them(cli: Cli) -> None:
    listed = {row["name"]: row for row in json.loads(cli("recipe", "list", "--json").out)}
    for tables in PUBLISHED:
        assert listed[tables.recipe]["window"] == 2048 * 1024
        shown = cli("recipe", "show", tables.recipe).out
        assert "licence MIT" in shown and longrope_recipes.COMMIT in shown
        assert f"found for {tables.model} fine-tuned at {tables.tuned} tokens" in shown
