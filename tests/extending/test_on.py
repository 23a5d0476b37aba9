# SPDX-License-Identifier: Apache-2.0
"""An extension that begins with a finished recipe: its sets, its adapter and its stages go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Result
from safetensors.numpy import load_file
from support.extending import extended, extended_wordy, prose

from lrconvert.errors import InputError, UsageError
from lrconvert.extending.api import ExtendResult
from lrconvert.extending.plan import parse_plan
from lrconvert.recipe import load_recipe, write_recipe
from lrconvert.rope import longrope_attention_factor

Cli = Callable[..., Result]
MORE = """
name = "more"
stage = [
    {kind = "tune", window = "1k", length = 160, steps = 3, keys = 1, mixed_rows = 2, rank = 4, rate = 1e-2},
    {kind = "recover", budget = 3},
]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ExtendResult:
    """A pico model from 64 to 1024 tokens, with three sets and an adapter."""
    return extended_wordy(tmp_path_factory.mktemp("on"))


def _trained(recipe: Path) -> dict[str, np.ndarray]:
    return load_file(recipe / "adapter" / "adapter_model.safetensors")


def test_a_recipe_is_trained_on(made: ExtendResult) -> None:
    """The sets stay but the one that is searched again, the adapter is that of the recipe and three steps more, and the
    record has the stages of both."""
    assert made.path is not None
    folder = made.path.parents[1]
    more = extended(folder, "more", parse_plan(MORE, ""), on=folder / "made")
    before, after = load_recipe(folder / "made"), load_recipe(folder / "more")
    assert after.tiers[1:] == before.tiers[1:] and len(after.tiers) == 3
    old, new = _trained(folder / "made"), _trained(folder / "more")
    assert old.keys() == new.keys() and any(not np.array_equal(old[name], new[name]) for name in old)
    far = max(float(np.abs(old[name].astype(np.float64) - new[name]).max()) for name in old)
    assert far < 0.1, "it went on from the recipe's adapter"  # fresh pairs differ by their random start
    names = [stage["name"] for stage in after.provenance.stages]
    assert names == ["1-search", "2-tune", "3-search", "4-recover", "5-tune", "6-recover"]
    assert after.provenance.search is not None and after.provenance.search["on"] == "made"
    assert [stage.name for stage in more.stages] == ["1-tune", "2-recover"]


def test_a_form_for_any_runtime_begins_with_two_sets(made: ExtendResult) -> None:
    assert made.path is not None
    folder = made.path.parents[1]
    form = extended(folder, "form", parse_plan(MORE, ""), on=folder / "made", runtime="any")
    wanted, before = longrope_attention_factor(1024 / 64, 64), load_recipe(folder / "made")
    start, after = load_recipe(form.work / "0-start"), load_recipe(folder / "form")
    for recipe in (start, after):
        assert [tier.max_length for tier in recipe.tiers] == [64, 1024]
        assert all(tier.attention_factor == pytest.approx(wanted, rel=1e-9) for tier in recipe.tiers)
    assert after.tiers[-1].factors == before.tiers[-1].factors
    assert any("knows 2 tiers" in note for note in form.notes)


def test_another_recipe_makes_other_stages(made: ExtendResult) -> None:
    """The digest of a stage covers the sets that it begins with."""
    assert made.path is not None
    folder = made.path.parents[1]
    recipe = load_recipe(folder / "made")
    last = replace(recipe.tiers[-1], factors=tuple(1.01 * factor for factor in recipe.tiers[-1].factors))
    other = replace(recipe, tiers=(*recipe.tiers[:-1], last), adapter="../made/adapter")
    write_recipe(other, folder / "other")
    runs = [
        extended(folder, f"{name}-more", parse_plan(MORE, ""), on=folder / name, until="1-tune")
        for name in ("made", "other")
    ]
    assert runs[0].stages[0].digest != runs[1].stages[0].digest


def test_the_record_names_the_texts_of_both(made: ExtendResult) -> None:
    """A recipe that is calibrated on another text than it was trained on hides neither, and refuses the same."""
    assert made.path is not None
    folder = made.path.parents[1]
    (folder / "unseen.txt").write_text(prose(9000), encoding="utf-8")
    plan = parse_plan('stage = [{kind = "calibrate", lengths = [200], objective = "perplexity"}]', "")

    def calibrated(*texts: str) -> None:
        given = {"texts": [folder / text for text in texts], "held_out": [folder / "text.txt"]}
        extended(folder, "calibrated", plan, on=folder / "made", force=True, **given)

    calibrated("unseen.txt")
    search = load_recipe(folder / "calibrated").provenance.search
    assert search is not None and [text["name"] for text in search["texts"]] == ["text.txt", "unseen.txt"]
    assert load_recipe(folder / "calibrated").provenance.stages[-1]["name"] == "5-calibrate"
    with pytest.raises(InputError, match=r"text\.txt: the recipe was searched or trained on it"):
        calibrated("unseen.txt", "text.txt")


def test_what_does_not_go_together(made: ExtendResult, cli: Cli) -> None:
    assert made.path is not None
    folder = made.path.parents[1]
    with pytest.raises(UsageError, match="--target"):
        extended(folder, "x", parse_plan(MORE, ""), on=folder / "made", target=512)
    with pytest.raises(InputError, match="the sets before it reach 64"):
        extended(folder, "x", parse_plan(MORE, ""))
    with pytest.raises(InputError, match=r"1-tune\.rank is 8; the adapter .* has 4"):  # before it is loaded
        extended(folder, "x", parse_plan(MORE.replace("rank = 4", "rank = 8"), ""), on=folder / "made")
    other = parse_plan(MORE.replace("rank = 4", "rank = 4, projections = 'turned'"), "")
    with pytest.raises(InputError, match=r"1-tune\.projections is 'turned'; the adapter .* has 'all'"):
        extended(folder, "x", other, on=folder / "made")
    with pytest.raises(InputError, match="demo-8x"):
        extended(folder, "x", parse_plan(MORE, ""), on="demo-8x")
    gone = json.loads((folder / "made" / "recipe.json").read_text())
    (folder / "gone").mkdir()
    (folder / "gone" / "recipe.json").write_text(json.dumps({**gone, "adapter": "nowhere"}))
    done = cli("extend", folder / "wordy", "--text", folder / "text.txt", "--on", folder / "gone", "-o", folder / "y")
    assert done.code == 3 and "nowhere" in done.err and not (folder / "y").exists()
