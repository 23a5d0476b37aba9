# SPDX-License-Identifier: Apache-2.0
"""How much of a training is kept, and the attention factor of its sets, on text that was not trained on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.extending import any_text, extended, extended_wordy, prose

from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.evals.texts import Text
from lrconvert.extending import calibrating
from lrconvert.extending.api import ExtendResult
from lrconvert.extending.calibrating import ATTENTION_STEP, MOST_ATTENTION, MOST_SHARES, calibrate, walk
from lrconvert.extending.deciding import loss_of, whole_row
from lrconvert.extending.plan import Calibrate, parse_plan
from lrconvert.extending.task import Task
from lrconvert.recipe import load_recipe
from lrconvert.rope import serving
from lrconvert.training.adapter_file import weaken
from lrconvert.training.loaded import LoadedModel

STAGE = Calibrate("calibrate", (64, 256), judged=64)
Loss = Callable[[float, Any], float]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ExtendResult:
    """A pico model from 64 to 1024 tokens, with three sets and an adapter."""
    return extended_wordy(tmp_path_factory.mktemp("calibrating"))


@pytest.fixture
def task(made: ExtendResult, tmp_path: Path) -> Task:
    assert made.path is not None
    model = open_model(made.path.parents[1] / "wordy")
    texts = tuple(Text(f"text {size}", "0" * 64, any_text(size, vocab=model.shape.vocab)) for size in (100, 600, 500))
    (tmp_path / "stage").mkdir()
    return Task(
        "stage", model, model.reference, texts, texts, made.path, tmp_path / "stage", machine={"device": "cpu"}
    )  # fmt: skip


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loss], None]:
    """Losses that only the share and the set decide."""

    def install(loss: Loss) -> None:
        def read(self: Any, share: float, tier: Any, length: int) -> float:
            return loss(share, tier)

        monkeypatch.setattr(calibrating._Calibration, "_loss", read)

    return install


@pytest.mark.parametrize(
    ("best", "asked"), [(-4, [-5, -4, -3, -2, -1, 0, 1]), (0, [-1, 0, 1]), (3, [-1, 0, 1, 2, 3, 4])]
)
def test_it_walks_to_where_the_loss_rises(best: int, asked: list[int]) -> None:
    """To either side; one step beyond is asked for, and each once."""
    told: list[int] = []

    def loss(steps: int) -> float:
        told.append(steps)
        return float((steps - best) ** 2)

    found, tried = walk(loss, (-1, 1), 9)
    assert found == best and sorted(told) == sorted(tried) == asked
    assert all(tried[steps] == (steps - best) ** 2 for steps in tried)


def test_it_walks_no_further_than_it_may() -> None:
    assert walk(lambda steps: float(steps), (-1, 1), 9)[0] == -9
    assert walk(lambda steps: float(-steps), (-1,), 9)[0] == 0


def test_share_and_factors_are_those_of_the_lowest_losses(task: Task, losses: Callable[[Loss], None]) -> None:
    """The adapter that is written is the weakened one, and only the attention factor of the sets that were judged
    changes: those of the original window, and of a window that no length asked for, stay."""
    before = task.recipe
    wanted = before.tiers[1].attention_factor * (1 - 3 * ATTENTION_STEP)
    losses(lambda share, tier: (share - 0.7) ** 2 + (tier.attention_factor - wanted) ** 2)
    facts = calibrate(STAGE, task)
    assert facts["share"] == 0.7 and list(facts["shares"]) == ["1.0", "0.9", "0.8", "0.7", "0.6"]
    (of,) = facts["attention"]
    assert (of["max_length"], of["chosen"]) == (256, pytest.approx(wanted))
    after = load_recipe(task.folder)
    chosen = replace(before.tiers[1], attention_factor=of["chosen"])
    assert after.tiers == (before.tiers[0], chosen, before.tiers[2]) and after.adapter == "adapter"
    assert task.adapter is not None
    full, kept = (_changes(task, folder) for folder in (task.adapter, task.folder / "adapter"))
    assert any(np.any(full[name]) for name in full)
    for name in full:
        assert np.allclose(kept[name], 0.7 * full[name], atol=2e-3 * np.abs(full[name]).max() + 1e-7), name


def _changes(task: Task, adapter: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to every tensor of the model, as baking merges it, in float32."""
    model = merged(task.model, open_adapter(adapter), rounded=False)
    read = {name: model.checkpoint.read(name).astype(np.float32) for name in task.model.checkpoint.tensors}
    return {name: values - task.model.checkpoint.read(name).astype(np.float32) for name, values in read.items()}


def test_nothing_to_gain_changes_nothing(task: Task, losses: Callable[[Loss], None]) -> None:
    before = task.recipe
    losses(lambda share, tier: -share + abs(tier.attention_factor - before.tiers[1].attention_factor))
    facts = calibrate(STAGE, task)
    assert facts["share"] == 1 and load_recipe(task.folder).tiers == before.tiers
    assert not (task.folder / "adapter").exists() and task.adapter is not None
    assert (task.folder / (load_recipe(task.folder).adapter or "")).samefile(task.adapter)


def test_it_ends_where_losses_never_rise(task: Task, losses: Callable[[Loss], None]) -> None:
    losses(lambda share, tier: share + tier.attention_factor)
    facts = calibrate(STAGE, task)
    assert facts["share"] == pytest.approx(1 - 0.1 * MOST_SHARES)
    least = task.recipe.tiers[1].attention_factor * (1 - ATTENTION_STEP * MOST_ATTENTION)
    assert facts["attention"][0]["chosen"] == pytest.approx(least)


@pytest.mark.parametrize("objective", ["perplexity", "mixed"])
def test_losses_are_those_of_the_model(objective: Any, task: Task) -> None:
    """Without anything replaced: the means over the ends of the texts that are long enough, with the weakened adapter
    merged as baking does. Run again, it reads what it kept and loads nothing."""
    short = 64 if objective == "perplexity" else 100  # where keys have room
    stage = replace(STAGE, lengths=(short, 256), documents=2, objective=objective, keys=2)
    facts = calibrate(stage, task)
    share, factor = min(facts["shares"].items(), key=lambda one: one[1])[0], facts["attention"][0]["chosen"]
    assert float(share) == facts["share"]
    assert task.adapter is not None
    found = {}
    for part in facts["shares"]:
        weaken(task.model, task.adapter, float(part), task.folder / part)
        model = LoadedModel(merged(task.model, open_adapter(task.folder / part)), device="cpu")
        means = []
        for length, texts in ((short, task.texts[:2]), (256, task.texts[1:])):
            model.rotation = serving(task.recipe.tiers, length)
            rows = [whole_row(task, [text.tokens[-length:]], length, objective, 2) for text in texts]
            means.append(np.mean([loss_of(model, row, objective, 64) for row in rows]))
        found[part] = float(np.mean(means))
    assert facts["shares"] == pytest.approx(found, abs=1e-6)
    assert factor in [float(one) for one in facts["attention"][0]["tried"]]
    assert calibrate(stage, replace(task, machine={"device": "nowhere"})) == facts


def test_short_texts_end_where_the_last_one_does(task: Task) -> None:
    """A document longer than each of the texts is the end of all of them, one behind the other."""
    run = calibrating._Calibration(replace(STAGE, lengths=(1000,)), task, task.recipe.tiers, None, task.folder, {})
    (row,) = run._rows(1000)
    assert np.array_equal(row.tokens, np.concatenate([text.tokens for text in task.texts])[-1000:])


def test_an_adapter_of_another_model_is_refused(task: Task, tmp_path: Path) -> None:
    """And one that does what has no share; nothing is written."""
    assert task.adapter is not None
    shutil.copytree(task.adapter, tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: np.ascontiguousarray(tensors[name][:, :-1])}, file)
    with pytest.raises(InputError, match=re.escape(name)):
        weaken(task.model, tmp_path / "other", 0.5, tmp_path / "weak")
    save_file(tensors, file)
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(len(values), np.float32)
        for name, values in tensors.items()
        if "lora_B" in name
    }
    save_file({**tensors, **magnitudes}, file)
    with pytest.raises(UnsupportedError, match="can't be weakened"):
        weaken(task.model, tmp_path / "other", 0.5, tmp_path / "weak")
    assert not (tmp_path / "weak").exists()


def test_one_factor_for_all_sets_stays(made: ExtendResult, tmp_path: Path) -> None:
    """Of a runtime that has one: only the share is calibrated."""
    assert made.path is not None
    folder = made.path.parents[1]
    (tmp_path / "unseen.txt").write_text(prose(9000), encoding="utf-8")
    plan = parse_plan('stage = [{kind = "calibrate", lengths = [64, 200], objective = "perplexity"}]', "")
    given = {"texts": [tmp_path / "unseen.txt"], "held_out": [folder / "text.txt"]}
    done = extended(folder, "any", plan, on=folder / "made", runtime="any", **given)
    assert done.stages[0].facts["attention"] == [] and "1.0" in done.stages[0].facts["shares"]
    assert len({tier.attention_factor for tier in load_recipe(folder / "any").tiers}) == 1
