# SPDX-License-Identifier: Apache-2.0
"""The attention factor of a trained set, searched on whole documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.extending import VOCAB, any_text, scaled, write_wordy

from lrconvert.checkpoint import open_model
from lrconvert.errors import UnsupportedError
from lrconvert.evals.texts import Text
from lrconvert.extending import attending
from lrconvert.extending.api import extend
from lrconvert.extending.attending import MOST, STEP, attend
from lrconvert.extending.deciding import loss_of, whole_row
from lrconvert.extending.plan import Attention, parse_plan
from lrconvert.extending.task import Task
from lrconvert.recipe import SCHEMA_VERSION, Provenance, Recipe, load_recipe, write_recipe
from lrconvert.rope import Tier
from lrconvert.training.loaded import LoadedModel

STAGE = Attention("attention", 256, objective="mixed", keys=2, judged=64, documents=2)
Loss = Callable[[float], float]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """On a model with sets for 64, 256 and 1024 tokens."""
    model = open_model(write_wordy(tmp_path / "wordy"))
    tiers = (Tier(64, (1.0,) * 8), scaled(model, 256), scaled(model, 1024))
    recipe = Recipe(
        schema_version=SCHEMA_VERSION, name="r", family="llama", original_window=64, rope_theta=10000.0, rotary_dim=16,
        tiers=tiers, provenance=Provenance("extended", method="a test"),
    )  # fmt: skip
    text = Text("text", "0" * 64, any_text(600, vocab=VOCAB))
    before = write_recipe(recipe, tmp_path / "before")
    (tmp_path / "stage").mkdir()
    return Task(
        "stage", model, str(tmp_path / "wordy"), (text,), (text,), before, tmp_path / "stage", machine={"device": "cpu"}
    )


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loss], list[float]]:
    """Losses that only the attention factor decides; the factors that were asked for, as they come."""

    def install(loss: Loss) -> list[float]:
        asked: list[float] = []

        def read(model: Any, *_: Any) -> float:
            asked.append(model.rotation.attention_factor)
            return loss(asked[-1])

        monkeypatch.setattr(attending, "loss_of", read)
        return asked

    return install


@pytest.mark.parametrize("steps", [-4, 0, 3])
def test_it_walks_to_the_lowest_loss(steps: int, task: Task, losses: Callable[[Loss], list[float]]) -> None:
    """To either side; only that factor of that set changes. Beyond the lowest loss one factor is tried."""
    before = task.recipe
    best = before.tiers[1].attention_factor * (1 + STEP * steps)
    asked = losses(lambda factor: (factor - best) ** 2)
    facts = attend(replace(STAGE, documents=1), task)
    assert facts["chosen"] == pytest.approx(best) and facts["before"] == before.tiers[1].attention_factor
    assert len(asked) == len(facts["tried"]) == abs(steps) + 3
    chosen = replace(before.tiers[1], attention_factor=facts["chosen"])
    assert load_recipe(task.folder).tiers == (before.tiers[0], chosen, before.tiers[2])


def test_it_ends_where_losses_never_rise(task: Task, losses: Callable[[Loss], list[float]]) -> None:
    losses(lambda factor: factor)
    least = task.recipe.tiers[1].attention_factor * (1 - STEP * MOST)
    assert attend(STAGE, task)["chosen"] == pytest.approx(least)


def test_losses_are_those_of_the_model(task: Task) -> None:
    """Without anything replaced: the mean over the documents, of the set with each factor that was tried. Run again,
    it reads what it kept and loads nothing."""
    facts = attend(STAGE, task)
    model = LoadedModel(task.model, device="cpu")
    rows = [whole_row(task, 256, "mixed", 2, number) for number in range(2)]
    for one in facts["tried"]:
        model.rotation = replace(task.recipe.tiers[1], attention_factor=one["attention_factor"])
        found = sum(loss_of(model, row, "mixed", 64) for row in rows) / 2
        assert one["loss"] == pytest.approx(found, abs=1e-9)
    assert facts["chosen"] == min(facts["tried"], key=lambda one: one["loss"])["attention_factor"]
    again = replace(task, machine={"device": "nowhere"})
    assert attend(STAGE, again) == facts


def test_it_is_not_for_a_runtime_with_one_factor(task: Task) -> None:
    """Before anything is loaded."""
    plan = parse_plan('stage = [{kind = "derive", window = 256}, {kind = "attention", window = 256}]', "")
    with pytest.raises(UnsupportedError, match=r"stage\[1\] searches the attention factor of one set"):
        extend(task.reference, texts=["x"], output=task.folder / "x", plan=plan, runtime="any")
