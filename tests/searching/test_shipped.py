# SPDX-License-Identifier: Apache-2.0
"""The searched recipes that are shipped are what their journals say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lrconvert.recipe import load_recipe
from lrconvert.searching.journal import Record, digest, read_journal

JOURNALS = Path(__file__).parents[2] / "benchmarks" / "results" / "search" / "recipes"
NAMES = ("demo-8x", "smollm2-135m-64k")


def journal(name: str) -> tuple[dict[str, Any], list[Record]]:
    found = read_journal(JOURNALS / f"{name}.journal.jsonl")
    assert found.head is not None
    return found.head["identity"], list(found.records)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_has_the_best_sets_of_its_journal(name: str) -> None:
    """Factors, start tokens and attention factors are those with the lowest loss; the digest is the journal's, and
    would not be if one loss were another."""
    recipe, (identity, records) = load_recipe(name), journal(name)
    for tier in recipe.tiers:
        asked = [record for record in records if record.tier == tier.max_length]
        best = min(asked, key=lambda record: record.answer.loss)
        assert best.question.candidate.tier(tier.max_length) == tier
    assert recipe.provenance.search is not None
    assert recipe.provenance.search["journal_sha256"] == digest(identity, records)
    assert recipe.provenance.search["journal_sha256"] != digest(identity, records[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_says_what_it_is_worth(name: str) -> None:
    """On text that it was not searched on: no worse than any analytic set at the longest length, and within a hundredth
    of the unmodified model in the original window."""
    recipe = load_recipe(name)
    assert recipe.evaluation is not None and recipe.provenance.search is not None
    told = recipe.evaluation["held_out"]
    searched_on = {text["name"] for text in recipe.provenance.search["texts"]}
    assert not searched_on & set(told["texts"])
    far, near = (str(tier.max_length) for tier in (recipe.tiers[-1], recipe.tiers[0]))
    others = {set_: losses for set_, losses in told["perplexity"].items() if set_ != "searched"}
    assert len(others) == 7
    assert told["perplexity"]["searched"][far] < min(losses[far] for losses in others.values())
    assert told["perplexity"]["searched"][near] < 1.01 * others["unmodified"][near]


@pytest.mark.parametrize("name", NAMES)
def test_the_long_set_of_a_form_was_evaluated_too(name: str) -> None:
    """In the same search, where it is as good as the best one to a thousandth of a nat at every length."""
    far = load_recipe(f"{name}-any").tiers[-1]
    _, records = journal(name)
    asked = [record for record in records if record.tier == far.max_length]
    best = min(asked, key=lambda record: record.answer.loss).answer.losses
    (same,) = {
        tuple(record.answer.losses.items()) for record in asked if record.question.candidate.tier(far.max_length) == far
    }
    assert all(abs(loss - best[length]) < 1e-3 for length, loss in same)
