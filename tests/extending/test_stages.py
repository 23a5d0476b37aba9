# SPDX-License-Identifier: Apache-2.0
"""What single stages of an extension do: rows of every step, analytic sets, the decision on whole documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.extending import VOCAB, any_text, scaled, write_wordy

from lrconvert import rope
from lrconvert.checkpoint import open_model
from lrconvert.errors import InputError
from lrconvert.evals.texts import Text
from lrconvert.extending.deciding import rank_correlation, ranking, whole_row
from lrconvert.extending.evaluating import long_enough
from lrconvert.extending.plan import Derive, Tune
from lrconvert.extending.stages import RowMaker, derive
from lrconvert.extending.task import Task, with_tier
from lrconvert.recipe import SCHEMA_VERSION, Provenance, Recipe, load_recipe, write_recipe
from lrconvert.rope import Tier
from lrconvert.searching.journal import Record
from lrconvert.searching.protocol import Answer, Question
from lrconvert.searching.space import Candidate


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """On a model with sets for 64 and 256 tokens."""
    folder = tmp_path_factory.mktemp("task")
    model = open_model(write_wordy(folder / "wordy"))
    plain = Tier(64, (1.0,) * 8)
    recipe = Recipe(
        schema_version=SCHEMA_VERSION, name="r", family="llama", original_window=64, rope_theta=10000.0, rotary_dim=16,
        tiers=(plain, scaled(model, 256)), provenance=Provenance("extended", method="a test"),
    )  # fmt: skip
    text = Text("text", "0" * 64, any_text(600, vocab=VOCAB))
    before = write_recipe(recipe, folder / "before")
    return Task("stage", model, str(folder / "wordy"), (text,), (text,), before, folder / "stage")


def tune(**changes: Any) -> Tune:
    return Tune(**{"kind": "tune", "window": 256, "length": 160, "steps": 9, "rows": 3, "keys": 1, **changes})


# --- rows ----------------------------------------------------------------------------------------------------


def test_some_steps_have_short_rows_under_the_short_set(task: Task) -> None:
    """Every third of these: rows of the original window with consecutive positions, and the set of that window. The
    others jump over the window under its own set."""
    make = RowMaker.of(tune(mixed_every=3, mixed_rows=2), task)
    short, long = task.recipe.tiers
    for step in range(9):
        made = make(step)
        tier, rows, kind = made.rotation, made.rows, made.kind
        if step % 3 == 2:
            assert (tier, len(rows), kind) == (short, 2, "short")
            assert all(row.positions.tolist() == list(range(64)) for row in rows)
        else:
            assert (tier, len(rows), kind) == (long, 3, "long")
            assert all(len(row.tokens) == 160 and row.positions[-1] > 160 for row in rows)
            assert all(row.answers.any() for row in rows)


def test_windows_in_between_are_kept_in_turns(task: Task, tmp_path: Path) -> None:
    """Of a stage at 1024 after one at 256, every other mixed step has rows that jump over 256 under its set."""
    recipe = with_tier(task.recipe, scaled(task.model, 1024))
    task = replace(task, before=write_recipe(recipe, tmp_path / "before"))
    make = RowMaker.of(tune(window=1024, mixed_every=3, mixed_rows=2), task)
    short, middle, long = recipe.tiers
    steps = [make(step) for step in range(12)]
    assert [step.rotation for step in steps] == [long, long, short, long, long, middle] * 2
    assert [len(step.rows) for step in steps] == [3, 3, 2, 3, 3, 3] * 2
    ends = [max(row.positions[-1] for row in step.rows) for step in steps if step.rotation is middle]
    assert all(160 < end < 256 for end in ends)
    assert max(row.positions[-1] for step in steps for row in step.rows) > 256


def test_every_ingredient_can_be_turned_off(task: Task) -> None:
    """Without short rows, jumps or keys."""
    make = RowMaker.of(tune(mixed_every=0, jumps=(0, 0), keys=0), task)
    for step in range(8):
        made = make(step)
        assert made.kind == "long" and not any(row.answers.any() for row in made.rows)
        assert all(row.positions.tolist() == list(range(160)) for row in made.rows)


def test_rows_are_those_of_their_step(task: Task) -> None:
    """The same after an interruption, whatever was made before; others in every step, row, seed and window."""
    first, again = RowMaker.of(tune(), task), RowMaker.of(tune(), task)
    first(0)
    wanted = first(4).rows
    assert all(np.array_equal(one.tokens, two.tokens) for one, two in zip(wanted, again(4).rows, strict=True))
    others = [again(5).rows[0], wanted[1], RowMaker.of(tune(), replace(task, seed=1))(4).rows[0]]
    assert not any(np.array_equal(wanted[0].tokens, other.tokens) for other in others)


# --- sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("pi", lambda own: rope.pi_factors(16, 4.0)),
        ("ntk", lambda own: rope.ntk_factors(16, 8.0)),
        ("yarn", lambda own: rope.yarn_factors(16, 10000.0, 4.0, 256, own=own)),  # as `recipe derive` on a scaled model
    ],
)
def test_an_analytic_set_stands_on_the_one_before(
    method: Any, wanted: Callable[[Any], np.ndarray], task: Task, tmp_path: Path
) -> None:
    """λ_own · λ_new for four times the window that there was; the attention factor is LongRoPE's for all of it, the
    start tokens are those of the own set, and the sets below stay."""
    facts = derive(Derive("derive", 1024, method), replace(task, folder=tmp_path))
    found = load_recipe(tmp_path / "recipe.json")
    assert facts["ratio"] == (8.0 if method == "ntk" else 4.0)
    assert found.tiers[:2] == task.recipe.tiers
    own = task.recipe.tiers[1].factors
    np.testing.assert_allclose(found.tiers[2].factors, np.array(own) * wanted(own))
    assert found.tiers[2].attention_factor == pytest.approx(rope.longrope_attention_factor(16, 64))
    assert found.tiers[2].start_tokens == 4


def test_a_tier_replaces_the_one_for_its_window(task: Task) -> None:
    new = Tier(256, (2.0,) * 8)
    assert with_tier(task.recipe, new).tiers == (task.recipe.tiers[0], new)
    between = Tier(128, (2.0,) * 8)
    assert [tier.max_length for tier in with_tier(task.recipe, between).tiers] == [64, 128, 256]


# --- deciding and evaluating ---------------------------------------------------------------------------------


def test_a_ranking_has_every_set_once_by_its_loss() -> None:
    def record(factor: int, loss: float, tier: int = 512) -> Record:
        return Record(tier, Question(Candidate((factor,))), Answer(loss))

    records = [record(1, 3.0), record(2, 2.0), record(1, 3.0), record(3, float("inf")), record(4, 1.0, tier=64)]
    assert [one.answer.loss for one in ranking(records, 512)] == [2.0, 3.0]


def test_a_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 31.0]) == 1.0
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]) == -1.0
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None


def test_a_whole_document_has_keys_where_they_count(task: Task) -> None:
    """Consecutive positions; the same one for all sets that are compared."""
    texts = [text.tokens for text in task.texts]
    row, again = whole_row(task, texts, 512, "mixed", 2), whole_row(task, texts, 512, "mixed", 2)
    assert row.positions.tolist() == list(range(512)) and row.answers.sum() == 10
    assert np.array_equal(row.tokens, again.tokens)
    assert not whole_row(task, texts, 512, "perplexity", 2).answers.any()
    assert len(whole_row(task, [*texts, *texts], 1000, "mixed", 2).tokens) == 1000
    with pytest.raises(InputError, match="tokens of text; the longest has 600"):
        whole_row(task, texts, 1000, "mixed", 2)
    with pytest.raises(InputError, match="a document of 64 tokens has no room for a key"):
        whole_row(task, texts, 64, "mixed", 2)


def test_texts_that_are_short_are_joined() -> None:
    texts = [np.arange(10), np.arange(30), np.arange(20)]
    assert [len(text) for text in long_enough(texts, 20)] == [30, 20]
    assert [len(text) for text in long_enough(texts, 50)] == [60]
    with pytest.raises(InputError, match="61 tokens of held-out text are needed; there are 60"):
        long_enough(texts, 61)
