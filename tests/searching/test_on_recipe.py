# SPDX-License-Identifier: Apache-2.0
"""A search on top of a recipe that the model has already, and on rows with jumping positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.extending import VOCAB, any_text, scaled, write_wordy
from support.onnx_files import write_adapter
from support.search_helpers import Landscape

from lrconvert.checkpoint import open_model
from lrconvert.errors import InputError, UsageError
from lrconvert.recipe import SCHEMA_VERSION, Provenance, Recipe, load_recipe, write_recipe
from lrconvert.rope import Tier, compose, longrope_attention_factor, serving
from lrconvert.searching.api import SearchResult, search
from lrconvert.searching.evaluator import TransformersEvaluator
from lrconvert.searching.journal import differences, read_journal
from lrconvert.searching.objective import JumpingRows, jumping_documents
from lrconvert.searching.plan import SearchPlan, plan_search
from lrconvert.searching.protocol import Question
from lrconvert.searching.request import SearchRequest
from lrconvert.searching.run import Search

ROWS = JumpingRows(160, 2, (1, 2), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, token ids, an adapter, and a recipe that names it: sets for 64, 128 and 256 tokens."""
    folder = tmp_path_factory.mktemp("on")
    model = open_model(write_wordy(folder / "wordy"))
    np.save(folder / "text.npy", any_text(4000, vocab=VOCAB))
    write_adapter(folder / "adapter", {"model.layers.0.self_attn.q_proj": (64, 64)})
    tiers = (Tier(64, (1.0,) * 8), scaled(model, 128, 2.0), scaled(model, 256, 4.0))
    recipe = Recipe(
        schema_version=SCHEMA_VERSION, name="own", family="llama", original_window=64, rope_theta=10000.0,
        rotary_dim=16, tiers=tiers, provenance=Provenance("extended", method="a test"), adapter="../adapter",
    )  # fmt: skip
    write_recipe(recipe, folder / "own")
    return folder


def request(folder: Path, **changes: Any) -> SearchRequest:
    given = {"target": 1024, "texts": [folder / "text.npy"], "on": folder / "own", "tiers": ("long",), "budget": 12}
    return SearchRequest(folder / "wordy", **{**given, **changes})


def searched(plan: SearchPlan) -> Recipe:
    """The recipe for a landscape whose best set is neither the first one asked for nor an analytic one."""

    def loss(candidate: Any) -> float:
        return float(np.abs(np.log(candidate.factors) - np.linspace(0.1, 1.2, 8)).mean())

    return Search(plan, Landscape(loss), None, lambda _: None).run()


def test_a_found_set_stands_on_the_own_one(folder: Path) -> None:
    """The recipe's new tier is the own set for the longest window with the best candidate on top; all own tiers stay;
    the attention factor in total is LongRoPE's formula for the whole ratio, 16; start tokens are the own set's."""
    plan = plan_search(request(folder))
    own = load_recipe(folder / "own")
    (tier,) = plan.tiers
    assert tier.objective.own == own.tiers[-1] and tier.space.ratio == 4.0
    assert set(tier.space.start_tokens) == {4}
    found = searched(plan)
    assert found.tiers[:3] == own.tiers and found.tiers[3].max_length == 1024
    over = np.array(found.tiers[3].factors) / own.tiers[-1].factors
    assert over.max() > 1.5 and over.max() <= 5.0  # of the candidate alone: within 1.25 times the ratio of both windows
    candidate = tier.space.make(over, 4, tier.space.attention[0])
    assert found.tiers[3] == compose(own.tiers[-1], candidate.tier(1024))
    assert found.tiers[3].attention_factor == pytest.approx(longrope_attention_factor(16, 64))
    assert found.tiers[3].start_tokens == 4


def test_the_first_candidate_changes_nothing(folder: Path) -> None:
    """The own set as it is, so that a search never ends below it."""
    (tier,) = plan_search(request(folder)).tiers
    assert [set(candidate.factors) for candidate in tier.start] == [{1.0}]
    rotation = tier.objective.rotation(tier.start[0], 1024)
    assert rotation.factors == load_recipe(folder / "own").tiers[-1].factors


def test_short_sets_are_searched_on_their_own(folder: Path) -> None:
    """The short set on top of the short one, at its own length; the longer ones stay. A model without a set for it is
    searched as it was."""
    plan = plan_search(request(folder, tiers=("short",), target=256, lengths={64: 1.0}))
    (tier,) = plan.tiers
    assert tier.length == 64 and tier.objective.own == load_recipe(folder / "own").tiers[0]
    found = searched(plan)
    assert found.tiers[1:] == load_recipe(folder / "own").tiers[1:]
    (plain,) = plan_search(request(folder, on=None, start_tokens=True)).tiers
    assert plain.objective.own is None and plain.space.ratio == 16.0 and len(plain.space.start_tokens) > 1
    (without,) = plan_search(request(folder, on=None)).tiers
    assert without.space.start_tokens == (0,)


@pytest.mark.parametrize("target", [256, 200])
def test_a_target_within_the_window_is_refused(target: int, folder: Path) -> None:
    with pytest.raises(UsageError, match=rf"--target {target} is within the window of .*own, 256\. Use a longer one"):
        plan_search(request(folder, target=target))


def test_another_models_recipe_is_refused(folder: Path, tmp_path: Path) -> None:
    other = replace(load_recipe(folder / "own"), rope_theta=5e5, adapter=None)
    with pytest.raises(InputError, match="rope_theta"):
        plan_search(request(folder, on=write_recipe(other, tmp_path / "other")))


def test_the_recipes_adapter_is_merged_and_named(folder: Path, tmp_path: Path) -> None:
    """Relative to the new recipe; another adapter beside it is an error."""
    plan = plan_search(request(folder, output=tmp_path / "found"))
    name = "model.layers.0.self_attn.q_proj.weight"
    base = open_model(folder / "wordy")
    assert not np.array_equal(plan.model.checkpoint.read(name), base.checkpoint.read(name))
    named = searched(plan).adapter
    assert named is not None and (tmp_path / "found" / named).resolve() == (folder / "adapter").resolve()
    write_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (64, 64)})
    with pytest.raises(UsageError, match="adapter and recipe disagree"):
        plan_search(request(folder, adapter=str(tmp_path / "adapter")))


def test_own_set_and_positions_are_part_of_a_search(folder: Path, tmp_path: Path) -> None:
    """A journal of another own set, other rows or no rows is another search's; the budget is no part of it."""

    def identity(**changes: Any) -> dict[str, Any]:
        return plan_search(request(folder, **changes)).identity

    wanted = identity(rows=ROWS)
    assert differences(wanted, identity(rows=ROWS, budget=99)) == []
    recipe = load_recipe(folder / "own")
    factors = (*recipe.tiers[-1].factors[:-1], 4.5)
    other = replace(recipe, tiers=(*recipe.tiers[:-1], replace(recipe.tiers[-1], factors=factors)))
    changed = identity(rows=ROWS, on=write_recipe(replace(other, adapter="../adapter"), folder / "other"))
    assert changed["tiers"][0]["own"] != wanted["tiers"][0]["own"] and differences(wanted, changed)
    for rows in (None, replace(ROWS, jumps=(2, 2)), replace(ROWS, length=200), replace(ROWS, count=3)):
        tier = identity(rows=rows)["tiers"][0]
        assert tier["documents_sha256"] != wanted["tiers"][0]["documents_sha256"], rows


def test_rows_that_jump(folder: Path) -> None:
    """Of the target's span, with the answers' tokens alone where keys count, and as many as asked for; the same in
    every run."""
    plan = plan_search(request(folder, rows=ROWS, objective="mixed"))
    (tier,) = plan.tiers
    documents = tier.objective.documents
    assert [document.part for document in documents] == ["text", "text", "needle", "needle"]
    for document in documents:
        assert document.positions is not None and len(document.tokens) == 160
        assert 160 < document.positions[-1] < 1024 and (np.diff(document.positions) >= 1).all()
    assert documents[0].spans == ((1024, 0, 159),)
    assert sum(end - first for _, first, end in documents[2].spans) == 5
    texts = plan.texts
    plain = jumping_documents(ROWS, "perplexity", texts, 1024, None, 0)
    assert [np.array_equal(one.tokens, two.tokens) for one, two in zip(plain, documents, strict=False)] == [True, True]
    with pytest.raises(InputError, match="a row needs 5000 tokens of text; the longest has 4000"):
        plan_search(request(folder, rows=replace(ROWS, length=5000)))


def test_losses_are_those_of_the_composed_set_at_the_rows_positions(folder: Path) -> None:
    """What the evaluator answers is what the model has under compose(own, candidate), row by row; its gradient is the
    slope in the candidate's factors."""
    plan = plan_search(request(folder, rows=ROWS))
    (tier,) = plan.tiers
    evaluator = TransformersEvaluator(plan.model, device="cpu", dtype="float32")
    candidate = tier.space.make(np.linspace(1.0, 3.0, 8), 4)
    plain, sloped = (
        evaluator.answer(tier.objective, [Question(candidate, gradient=gradient)])[0] for gradient in (False, True)
    )
    own = load_recipe(folder / "own").tiers[-1]
    model = evaluator.model
    model.rotation = compose(own, candidate.tier(1024))
    losses = []
    for document in tier.objective.documents:
        assert document.positions is not None
        losses.append(model.losses(document.tokens[None], at=document.positions[None]).mean())
    assert plain.loss == pytest.approx(float(np.mean(losses)), rel=1e-5) == sloped.loss
    steps = list(candidate.steps)
    index = 5
    around = []
    for by in (-1, 1):
        moved = replace(candidate, steps=tuple(step + by * (place == index) for place, step in enumerate(steps)))
        around.append((moved.factors[index], evaluator.answer(tier.objective, [Question(moved)])[0].loss))
    (low, below), (high, above) = around
    assert sloped.gradient is not None
    slope = (above - below) / (np.log(high) - np.log(low))
    assert sloped.gradient[index] == pytest.approx(slope, rel=0.1, abs=2e-4)


def test_a_search_on_a_recipe_goes_on_from_its_journal(folder: Path, tmp_path: Path) -> None:
    """Interrupted after two evaluations, it asks for the rest alone, and finds what one without a break finds."""

    def run(output: Path, budget: int) -> SearchResult:
        return search(
            folder / "wordy", target=1024, texts=[folder / "text.npy"], on=folder / "own", tiers=("long",),
            rows=ROWS, budget=budget, output=output, force=True, device="cpu",
        )  # fmt: skip

    whole = run(tmp_path / "whole", 5)
    assert whole.journal is not None
    lines = whole.journal.read_text().splitlines(keepends=True)
    (tmp_path / "broken.journal.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    found = run(tmp_path / "broken", 5)
    assert found.recipe.tiers == whole.recipe.tiers and len(found.notes) == 2
    assert found.journal is not None
    assert [record.answer.loss for record in read_journal(found.journal).records] == [
        record.answer.loss for record in read_journal(whole.journal).records
    ]
    assert serving(found.recipe.tiers, 256) == load_recipe(folder / "own").tiers[-1]


def test_what_does_not_go_together_is_refused(folder: Path) -> None:
    """Whole sets as a start for what multiplies sets; rows that are too short to hide a key in."""
    with pytest.raises(UsageError, match="--start-from names whole sets, and --on searches what multiplies"):
        plan_search(request(folder, start_from=folder / "own"))
    with pytest.raises(InputError, match="a row of 64 tokens has no room for a key"):
        plan_search(request(folder, objective="needle", rows=JumpingRows(64)))
