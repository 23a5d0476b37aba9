# SPDX-License-Identifier: Apache-2.0
"""Distillation: what a teacher says of rows, the divergence from it, and what a model learns so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.extending import any_text, key_maker, scaled, write_wordy

from lrconvert.checkpoint import Model, open_model
from lrconvert.rope import Tier
from lrconvert.training import tuning as module
from lrconvert.training.distilling import Teacher
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.losses import MAX_LOGITS
from lrconvert.training.rows import RowOptions, StepRows, make_row, window_starts
from lrconvert.training.tuning import StepResult, TuneOptions, Tuning, load_trainable

TEXT = any_text(4000)
WINDOW, READS = 256, 64  # of the rows, and of the teacher


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(write_wordy(tmp_path_factory.mktemp("models") / "wordy"))


def rotation_of(model: Model) -> Callable[[int], Tier]:
    """Of a recipe with a set for the teacher's windows, and one for longer texts."""
    plain = Tier(READS, (1.0,) * (model.shape.rotary_dim // 2))
    return lambda length: plain if length <= READS else scaled(model, WINDOW)


def teacher(model: Model, window: int = READS, at_once: int = 4096) -> Teacher:
    return Teacher(LoadedModel(model, device="cpu", dtype="float32"), window, rotation_of(model), at_once)


def rows_of(model: Model, length: int = 200, keys: int = 0) -> Callable[[int], StepRows]:
    made = RowOptions(length, WINDOW, (1, 2), keys)

    def rows(step: int) -> StepRows:
        seeds = [np.random.default_rng([step, index]) for index in range(3)]
        maker = key_maker() if keys else None
        return StepRows(rotation_of(model)(length), tuple(make_row([TEXT], made, maker, rng) for rng in seeds))

    return rows


# --- what the teacher says -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "window"), [(64, 64), (65, 64), (112, 64), (113, 64), (1000, 64), (7, 3), (5, 1)])
def test_every_token_is_read_behind_a_fourth_of_a_window(count: int, window: int) -> None:
    """Or behind all that stands before it in the row."""
    starts = window_starts(count, window)
    assert starts[0] == 0 and starts[-1] + window == count
    for place in range(count):
        first = next(start for start in starts if start + window > place)  # the window that it is taken from
        assert first <= place and (first == 0 or place - first >= window // 4)


@pytest.mark.parametrize("at_once", [4096, 1])
def test_it_reads_windows_as_documents_of_their_own(model: Model, at_once: int) -> None:
    """Under the set for the window's length, from position 0 on; all rows, and as many at once as fit."""
    tokens = np.stack([TEXT[:200], TEXT[300:500]])
    said = teacher(model, at_once=at_once).of(tokens, np.ones((2, 199), bool))
    alone = LoadedModel(model, device="cpu", dtype="float32")
    alone.rotation = rotation_of(model)(READS)
    assert said.hidden.shape[:2] == (2, 200)
    known = 0
    for start in window_starts(200, READS):
        ids = torch.from_numpy(tokens[:, start : start + READS])
        with torch.no_grad():
            wanted = alone.network(input_ids=ids, use_cache=False).logits
            found = said.head(said.hidden[:, known : start + READS])
        np.testing.assert_allclose(found, wanted[:, known - start :], atol=1e-4)
        known = start + READS


def test_a_row_within_its_window_is_read_whole(model: Model) -> None:
    tokens = TEXT[None, :40]
    said = teacher(model).of(tokens, np.ones((1, 39), bool))
    alone = LoadedModel(model, device="cpu", dtype="float32")
    alone.rotation = rotation_of(model)(40)
    with torch.no_grad():
        wanted = alone.hidden(torch.from_numpy(tokens), torch.arange(40)[None])
    torch.testing.assert_close(said.hidden, wanted, atol=1e-5, rtol=1e-4)


# --- what is learned -----------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_divergence(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside autograd through transformers' own forward pass and PyTorch's kl_div: of taught tokens the divergence, of
    the others the loss. In chunks, as long rows have them."""
    monkeypatch.setitem(MAX_LOGITS, "cpu", 50 * model.shape.vocab)
    row = rows_of(model, keys=2)(0).rows[0]
    said = teacher(model).of(row.tokens[None], row.text[None])
    loaded, _ = load_trainable(model, TuneOptions(method="full"), device="cpu", dtype="float32")
    loaded.rotation = scaled(model, WINDOW)
    weights = np.random.default_rng(0).random((1, 199))
    losses = loaded.backward(row.tokens[None], weights, row.positions[None], said)[0]
    found = [weight.grad for weight in loaded.trainable]

    ids, at = torch.from_numpy(row.tokens[None]), torch.from_numpy(row.positions[None])
    given = {"input_ids": ids, "position_ids": at, "attention_mask": torch.ones_like(ids)}
    own = loaded.network(**given, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    theirs = said.head(said.hidden)[0, :-1].detach().double().log_softmax(-1)
    apart = torch.nn.functional.kl_div(own, theirs, log_target=True, reduction="none").sum(-1)
    plain = torch.nn.functional.nll_loss(own, ids[0, 1:], reduction="none")
    wanted = torch.where(torch.from_numpy(row.text), apart, plain)
    np.testing.assert_allclose(losses, wanted.detach(), atol=1e-5)
    gradients = torch.autograd.grad((wanted * torch.from_numpy(weights[0])).sum(), loaded.trainable)
    for one, other in zip(found, gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert 0 < float(apart[torch.from_numpy(row.text)].detach().mean()) < float(plain.detach().mean())


def train(model: Model, folder: Path, rows: Callable[[int], StepRows], aim: Teacher | None, **changes: Any) -> Any:
    """The steps, and the model after them."""
    given = TuneOptions(**{"steps": 20, "rank": 4, "warmup": 2, "rate": 1e-2, "norm_rate": 1e-2, **changes})
    loaded, _ = load_trainable(model, given, device="cpu", dtype="float32")
    seen: list[StepResult] = []
    Tuning(loaded, given, rows, folder, teacher=aim, every=0).run(seen.append)
    return seen, loaded


def test_a_model_learns_to_say_what_it_said_of_less(model: Model, tmp_path: Path) -> None:
    """The divergence of one step's rows falls. The text's own tokens are no aim: their loss falls far less than where
    they are."""
    rows = rows_of(model)
    seen, taught = train(model, tmp_path / "taught", lambda step: rows(0), teacher(model))
    assert seen[-1].text < 0.7 * seen[0].text
    _, plain = train(model, tmp_path / "plain", lambda step: rows(0), None)
    own = {}
    for name, loaded in (("taught", taught), ("plain", plain)):
        loaded.rotation = rows(0).rotation
        own[name] = np.mean([loaded.losses(row.tokens[None], at=row.positions[None])[0][row.text].mean()
                             for row in rows(0).rows])  # fmt: skip
    assert own["plain"] < own["taught"] - 0.1


def test_who_says_the_same_has_nothing_to_learn(model: Model, tmp_path: Path) -> None:
    """Rows within the teacher's window, read with the same set: no divergence, and no gradient."""

    def rows(step: int) -> StepRows:
        made = make_row([TEXT], RowOptions(48, 48), None, np.random.default_rng(step))
        return StepRows(rotation_of(model)(48), (made,))

    seen, _ = train(model, tmp_path, rows, teacher(model), steps=1)
    assert seen[0].text == pytest.approx(0, abs=1e-6) and seen[0].gradient_norm < 1e-4


def test_an_interrupted_run_goes_on_with_the_same_aim(model: Model, tmp_path: Path) -> None:
    """The teacher is the model before the stage, not the one that the state has."""
    rows = rows_of(model, keys=2)
    whole, _ = train(model, tmp_path / "whole", rows, teacher(model), steps=4)
    given = TuneOptions(steps=4, rank=4, warmup=2, rate=1e-2, norm_rate=1e-2)
    loaded, _ = load_trainable(model, given, device="cpu", dtype="float32")
    first = Tuning(loaded, given, rows, tmp_path / "broken", teacher=teacher(model), every=0)

    def stop(result: StepResult) -> None:
        if result.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    rest, _ = train(model, tmp_path / "broken", rows, teacher(model), steps=4)
    assert [(step.step, step.text, step.gradient_norm) for step in rest] == [
        (step.step, step.text, step.gradient_norm) for step in whole[-len(rest) :]
    ]
    assert 0 < len(rest) < 4 and module.STATE in {path.name.partition(".")[2] for path in first.folder.iterdir()}
