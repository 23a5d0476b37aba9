# SPDX-License-Identifier: Apache-2.0
"""The extended recipes that are shipped: their sets are what the journals say, they state what they are worth, and they
become artifacts that compute them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from safetensors.numpy import load_file
from support.verifying import verify

from lrconvert.checkpoint import locate
from lrconvert.checkpoint.tensor_file import TensorFile
from lrconvert.engines.capability import SEARCHABLE
from lrconvert.extending.deciding import ranking
from lrconvert.extending.plan import load_plan
from lrconvert.extending.task import with_tier
from lrconvert.parity import Options
from lrconvert.recipe import Recipe, load_recipe, recipe_folder
from lrconvert.rope import RopeSpec, Tier, compose, serving
from lrconvert.searching.journal import digest, read_journal

Cli = Callable[..., Result]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
JOURNALS = BENCHMARKS / "results" / "search" / "recipes"
# The plans that made each, one after the other; the last one of a form for any runtime began with two sets.
PLANS = {
    "demo-2048k": ("demo", "demo-calibrate"),
    "demo-2048k-any": (BENCHMARKS / "plans" / "demo-first.toml", "demo-far", "demo-any"),
    "smollm2-135m-2048k": ("small", "small-far"),
    "smollm2-135m-2048k-any": ("small", "small-far", "small-any"),
}
MIB = 2**20
each = pytest.mark.parametrize("name", PLANS)


def stages(recipe: Recipe) -> tuple[dict[str, Any], ...]:
    assert recipe.provenance.stages is not None
    return tuple(recipe.provenance.stages)


def measured(recipe: Recipe, kind: str) -> dict[int, dict[str, Any]]:
    assert recipe.evaluation is not None
    found = recipe.evaluation["measured"]
    return {int(key.partition("@")[2]): value for key, value in found.items() if key.startswith(f"{kind}@")}


def share(row: dict[str, Any]) -> float:
    return row["hits"] / row["trials"]


@each
def test_the_plans_that_come_with_lrconvert_made_it(name: str) -> None:
    """Every option of every stage but the evaluation, so that the commands of the README make it again. An option that
    is younger than the recipe has its default."""
    recipe = load_recipe(name)
    assert recipe.provenance.method == PLANS[name][-1]
    planned = [stage for plan in PLANS[name] for stage in load_plan(plan).stage[:-1]]
    told = stages(recipe)[:-1]
    assert [stage["name"] for stage in told] == [f"{number}-{stage.kind}" for number, stage in enumerate(planned, 1)]
    for stage, wanted in zip(told, planned, strict=True):
        assert json.loads(json.dumps({**defaults(wanted), **stage["options"]})) == json.loads(json.dumps(vars(wanted)))


def defaults(stage: Any) -> dict[str, Any]:
    """Of the options that have one."""
    return {field.name: field.default for field in fields(stage) if field.default is not MISSING}


@cache
def journals() -> dict[str, list[Any]]:
    """The evaluations of every journal that is kept, by its chained digest; without the last one it has another."""
    found: dict[str, list[Any]] = {}
    for path in sorted(JOURNALS.glob("*-2048k*.journal.jsonl")):
        journal = read_journal(path)
        assert journal.head is not None
        records = list(journal.records)
        found[digest(journal.head["identity"], records)] = records
        assert digest(journal.head["identity"], records[:-1]) not in found
    return found


@each
def test_its_sets_are_the_best_of_its_journals(name: str) -> None:
    """Each search stands on the sets before it; the digests in the recipe are those of the journals, and would not be
    if one loss were another."""
    recipe = load_recipe(name)
    window = recipe.original_window
    tiers = (Tier(window, (1.0,) * (recipe.rotary_dim // 2)),)
    form = len(stages(recipe)) - len(load_plan(PLANS[name][-1]).stage)  # where the last plan begins
    for number, stage in enumerate(stages(recipe)):
        if number == form and name.endswith("-any"):
            spec = RopeSpec("llama", recipe.rotary_dim, recipe.rope_theta, window, tiers[-1].max_length, tiers)
            tiers = SEARCHABLE["any"].fit(spec)[0].tiers
        if stage["name"].endswith("calibrate"):
            tiers = calibrated(tiers, stage["facts"])
        if not stage["name"].endswith(("search", "recover")):
            continue
        records = journals()[stage["facts"]["journal_sha256"]]
        length = stage["options"].get("window", window)
        best = ranking(records, length)[stage["facts"].get("decided", {"chosen": 0})["chosen"]]
        found = compose(serving(tiers, length), best.question.candidate.tier(length))
        tiers = with_tier(replace(recipe, tiers=tiers), found).tiers
    assert tiers == recipe.tiers


def calibrated(tiers: tuple[Tier, ...], facts: dict[str, Any]) -> tuple[Tier, ...]:
    """With the attention factors that were chosen, each the best of those that were tried."""
    chosen = {}
    for found in facts["attention"]:
        assert min(found["tried"], key=found["tried"].get) == str(found["chosen"])
        chosen[found["max_length"]] = found["chosen"]
    return tuple(replace(tier, attention_factor=chosen.get(tier.max_length, tier.attention_factor)) for tier in tiers)


@each
def test_it_says_what_it_is_worth(name: str) -> None:
    """On text that nothing was trained on, from the original window on: perplexity at 256k is near that of the model
    before, the original window keeps what it had, passkeys are found at every depth, keys nearly all up to 1024k and
    more at 2048k than the paper's Mistral finds passkeys (60 %)."""
    recipe = load_recipe(name)
    assert recipe.evaluation is not None and recipe.provenance.search is not None
    trained = {text["sha256"] for text in recipe.provenance.search["texts"]}
    assert not trained & {text["sha256"] for text in recipe.evaluation["texts"]}
    window = recipe.original_window
    before = measured(recipe, "base perplexity")[window]["perplexity"]["value"]
    after = {length: row["perplexity"]["value"] for length, row in measured(recipe, "perplexity").items()}
    # One attention factor for all lengths has its price, and so has one long set.
    most, far = (1.05, 1.06) if name.endswith("-any") else (1.0, 1.0)
    assert after[window] < most * before and after.get(2**18, 0) < far * before
    passkeys = measured(recipe, "passkey")
    assert all(share(row) == 1 for row in passkeys.values())
    keys = measured(recipe, "retrieval")
    assert max(keys) >= 2**19
    assert all(share(row) >= (0.875 if length <= 2**20 else 0.6) for length, row in keys.items())
    if not name.endswith("-any"):
        assert {window, 2**16, 2**18} <= set(passkeys) and 2**18 in after and max(keys) >= 2**20


@each
def test_its_adapter_is_small_and_not_empty(name: str) -> None:
    file = recipe_folder(name) / "adapter" / "adapter_model.safetensors"
    assert file.stat().st_size <= 16 * MIB
    stored = TensorFile(file)
    second = [stored.read(name) for name in stored.tensors if "lora_B" in name]
    assert second and all(np.any(values) for values in second)


def test_one_command_bakes_it_and_the_artifact_computes_it(tmp_path: Path, cli: Cli) -> None:
    """Queries and keys with the adapter in them, and all three sets, up to two million tokens; against other sets it
    fails."""
    done = cli("hf", "demo", "--recipe", "demo-2048k", "-o", tmp_path / "baked")
    assert done.code == 0, done.err
    assert "was trained on" not in done.err
    options = Options(backends=("custom",), profile="quick")
    report = verify(tmp_path / "baked", options=options)
    assert report.passed, report.to_json()
    assert {4096, 4097, 262144, 262145, 2097152} <= {row.length for row in report.rows if row.verdict == "pass"}
    baked, embedded = (load_file(folder / "model.safetensors") for folder in (tmp_path / "baked", locate("demo")))
    changed = {name.split(".")[-2] for name in embedded if not np.array_equal(baked[name], embedded[name])}
    assert {"q_proj", "k_proj"} <= changed and "down_proj" not in changed
    assert not verify(tmp_path / "baked", options=options, recipe="demo-yarn-8x").passed


@pytest.mark.parametrize("name", [name for name in PLANS if name.endswith("-any")])
def test_a_form_for_any_runtime_drops_nothing_anywhere(name: str) -> None:
    """Two sets with the attention factor of LongRoPE's formula, no start tokens: all that any runtime can do."""
    recipe = load_recipe(name)
    window, last = recipe.original_window, recipe.tiers[-1].max_length
    spec = RopeSpec("llama", recipe.rotary_dim, recipe.rope_theta, window, last, recipe.tiers)
    for able in SEARCHABLE.values():
        assert [words for words in able.fit(spec)[1] if "chooses one factor set" not in words] == [], able.name


def test_the_demo_form_goes_into_every_format(tmp_path: Path, cli: Cli) -> None:
    """As the README of recipes says: no option, no warning of anything dropped."""
    for command, output in (("hf", "folder"), ("gguf", "file.gguf"), ("onnx", "onnx")):
        options = ["--portable"] if command == "hf" else []
        done = cli(command, "demo", "--recipe", "demo-2048k-any", *options, "-o", tmp_path / output)
        assert done.code == 0 and "drop" not in done.err, done.err
    assert verify(tmp_path / "file.gguf", options=Options(profile="quick")).passed
