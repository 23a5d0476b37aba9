# SPDX-License-Identifier: Apache-2.0
"""The stages of an extension. Each goes from the recipe of the stage before it to a recipe in a folder of its own.

A stage reads files and writes files: whatever it holds in memory goes away with it, so that the next one has the whole
device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert import rope
from lrconvert.errors import EnvironmentFailure
from lrconvert.extending.plan import Calibrate, Derive, Evaluate, Recover, Search, Tune
from lrconvert.extending.task import ADAPTER, JOURNAL, Task
from lrconvert.recipe.derive import factor_set
from lrconvert.recipe.models import portable_name
from lrconvert.rope import Tier, compose, serving
from lrconvert.training.keys import KeyMaker, training_form
from lrconvert.training.rows import RowOptions, StepRows, make_row

if TYPE_CHECKING:
    from lrconvert.training.distilling import Teacher

Facts = dict[str, Any]
# That an evaluation of the original window's set reads, as rows of it: as many as 256k holds of 4k. A form for any
# runtime goes to 2048k at once, and would read 256 of 8k for every set that it tries.
MOST_WINDOWS = 64


# --- derive ----------------------------------------------------------------------------------------------


def derive(stage: Derive, task: Task) -> Facts:
    recipe = task.recipe
    own, reach = recipe.tiers[-1], recipe.tiers[-1].max_length
    extension = stage.window / reach
    ratio = stage.ratio or (2 * extension if stage.method == "ntk" else extension)
    factors = factor_set(stage.method, recipe.rotary_dim, recipe.rope_theta, ratio, reach, own.factors)
    total = task.one_attention
    if total is None:
        total = rope.longrope_attention_factor(stage.window / recipe.original_window, recipe.original_window)
    new = Tier(stage.window, tuple(factors.tolist()), own.start_tokens, total / own.attention_factor)
    task.write(task.with_tier(compose(own, new)), task.adapter)
    return {"method": stage.method, "ratio": ratio}


# --- search ----------------------------------------------------------------------------------------------


def search(stage: Search, task: Task) -> Facts:
    from lrconvert.extending.deciding import decide
    from lrconvert.searching.objective import JumpingRows

    rows = None if stage.row_length is None else JumpingRows(stage.row_length, stage.rows, stage.jumps, stage.keys)
    facts = _search(
        task,
        stage.window,
        target=stage.window,
        tiers=("long",),
        algorithm=stage.algorithm,
        space=stage.space,
        objective=stage.objective,
        budget=stage.budget,
        documents=stage.documents,
        start_tokens=stage.start_tokens,
        rows=rows,
    )
    if stage.decide is not None:
        facts["decided"] = decide(stage, task)
    return facts


def recover(stage: Recover, task: Task) -> Facts:
    # A search of the short set reads as many tokens as one of the target: those of the next window are enough.
    short, following = task.recipe.tiers[:2]
    return _search(
        task,
        short.max_length,
        target=min(following.max_length, MOST_WINDOWS * short.max_length),
        tiers=("short",),
        start_tokens=False,
        budget=stage.budget,
        documents=stage.documents,
        lengths={short.max_length: 1.0},
    )


def _search(task: Task, length: int, **options: Any) -> Facts:
    """The set for `length` searched, on top of the recipe so far; it goes on from its journal."""
    import lrconvert.searching.api as searching
    from lrconvert.searching.run import Progress as Searched

    def watch(event: Any) -> None:
        if isinstance(event, Searched):
            left = None if event.seconds is None else event.seconds * (event.budget - event.spent)
            task.say(f"best loss {event.best:.4f}", event.spent, event.budget, left)

    found = searching.search(
        task.reference,
        texts=task.texts,
        output=task.folder,
        journal=task.folder / JOURNAL,
        on=task.before,
        seed=task.seed,
        name=task.recipe.name,
        allow_concatenate=True,
        attention_factor=task.one_attention,
        uniform=task.one_attention is not None,
        force=True,
        watch=watch,
        **{key: value for key, value in task.machine.items() if value is not None},
        **options,
    )
    recipe = found.recipe
    assert found.journal is not None
    searched = recipe.provenance.search or {}
    if found.leading:  # what an extension's recipe says of its search stands with its stage
        task.write(task.with_tier(serving(recipe.tiers, length)), task.adapter)
    return {"journal_sha256": searched.get("journal_sha256"), "tiers": searched.get("tiers"),
            "losses": (recipe.evaluation or {}).get("tiers")}  # fmt: skip


# --- fine-tuning -----------------------------------------------------------------------------------------


def tune(stage: Tune, task: Task) -> Facts:
    from lrconvert.training.tuning import StepResult, TuneOptions, Tuning, load_trainable

    options = TuneOptions(
        method=stage.method,
        steps=stage.steps,
        rate=stage.rate,
        norm_rate=stage.norm_rate,
        rank=stage.rank,
        projections=stage.projections,
        warmup=stage.warmup,
        final=stage.final,
        answer_weight=stage.answer_weight,
        seed=task.seed,
    )
    task.say("loading", 0, stage.steps)
    base = portable_name(task.reference, task.model.checkpoint.path)
    model, trainable = load_trainable(task.model, options, task.adapter, base=base, **task.loading)
    tuning = Tuning(model, options, RowMaker.of(stage, task), task.folder, teacher=teacher_of(stage, task))
    seconds: list[float] = []

    def watch(result: StepResult) -> None:
        seconds.append(result.seconds)
        left = float(np.mean(seconds[-20:])) * (stage.steps - result.step - 1)
        answers = "" if result.answers is None else f", answers {result.answers:.3f}"
        task.say(f"text {result.text:.3f}{answers}", result.step + 1, stage.steps, left)

    tuning.run(watch)
    _draw(task.folder)
    adapter = task.folder / ADAPTER
    trainable.save(model, adapter)
    task.write(task.recipe, adapter)
    facts = {"parameters": sum(weight.numel() for weight in model.trainable), "recomputed": model.recompute}
    return {**facts, **model.describe(), "seconds_per_step": round(float(np.median(seconds)), 3) if seconds else None}


def teacher_of(stage: Tune, task: Task) -> Teacher | None:
    """The model as the stage finds it, under the sets for what it reads; every process has a whole one."""
    if not stage.distil:
        return None
    from lrconvert.training.distilling import Teacher
    from lrconvert.training.loaded import LoadedModel
    from lrconvert.training.tuning import FORWARD_TOKENS

    model = LoadedModel(task.trained(), **{**task.loading, "sharded": False}, purpose="fine-tuning")
    at_once = FORWARD_TOKENS[model.device.type]
    return Teacher(model, stage.distil, partial(serving, task.recipe.tiers), at_once)


def _draw(folder: Path) -> None:
    """The log as a picture, where matplotlib is installed."""
    from lrconvert.training.plotting import plot_log
    from lrconvert.training.tuning import LOG

    with contextlib.suppress(EnvironmentFailure):
        plot_log(folder / LOG, folder / "log.png")


@dataclass(frozen=True)
class RowMaker:
    """The rows of every step of a fine-tuning stage, from its seed and the number of the step alone."""

    stage: Tune
    texts: tuple[np.ndarray, ...]
    keys: KeyMaker | None
    long: Tier
    lower: tuple[Tier, ...]  # of the windows that mixed steps keep, the original one first
    seed: tuple[int, int]

    @classmethod
    def of(cls, stage: Tune, task: Task) -> RowMaker:
        recipe = task.recipe
        keys = KeyMaker(training_form(task.model.checkpoint.path), task.encode) if stage.keys else None
        return cls(
            stage,
            tuple(text.tokens for text in task.texts),
            keys,
            serving(recipe.tiers, stage.window),
            tuple(tier for tier in recipe.tiers if tier.max_length < stage.window) or recipe.tiers[:1],
            (task.seed, stage.window),
        )

    def __call__(self, step: int) -> StepRows:
        stage, every = self.stage, self.stage.mixed_every
        tier = self.lower[step // every % len(self.lower)] if every and step % every == every - 1 else self.long
        if tier is self.lower[0]:
            options = RowOptions(tier.max_length, tier.max_length, keys=stage.keys)
            count, kind = stage.mixed_rows, "short"
        else:
            options = RowOptions(min(stage.length, tier.max_length), tier.max_length, stage.jumps, stage.keys)
            count, kind = stage.rows, "long" if tier is self.long else f"{tier.max_length}"
        seeds = [np.random.default_rng([*self.seed, step, index]) for index in range(count)]
        return StepRows(tier, tuple(make_row(self.texts, options, self.keys, rng) for rng in seeds), kind)


# --- calibration -----------------------------------------------------------------------------------------


def calibrate(stage: Calibrate, task: Task) -> Facts:
    from lrconvert.extending.calibrating import calibrate as calibrated

    return calibrated(stage, task)


# --- evaluation ------------------------------------------------------------------------------------------


def evaluate(stage: Evaluate, task: Task) -> Facts:
    from lrconvert.extending.evaluating import evaluate as measured

    task.write(task.recipe, task.adapter)
    return measured(stage, task)


STAGES: dict[str, Callable[[Any, Task], Facts]] = {
    "derive": derive,
    "search": search,
    "tune": tune,
    "recover": recover,
    "calibrate": calibrate,
    "evaluate": evaluate,
}
