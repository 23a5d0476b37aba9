# SPDX-License-Identifier: Apache-2.0
"""A finished extension calibrated on text that nothing was trained on.

Two numbers depend on the training, and the training text can't tell them: the weights know it by heart.

- *share*: how much of the training is kept. Weights between those before training and after it are often better on
  other text than either (WiSE-FT, arXiv 2109.01903).
- *attention factor* of every set beyond the original window. LongRoPE's formula is for weights before any training.

The factors λ stay: training has fitted the weights to them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.extending.deciding import loss_of, whole_row
from lrconvert.extending.plan import Calibrate
from lrconvert.extending.task import ADAPTER, Task
from lrconvert.rope import Tier, serving
from lrconvert.temporary import temporary_folder
from lrconvert.training.rows import Row

if TYPE_CHECKING:
    from lrconvert.training.loaded import LoadedModel

TRIED = "tried.json"
SHARE_STEP, MOST_SHARES = 0.1, 9
ATTENTION_STEP, MOST_ATTENTION = 0.02, 15  # 30 % either way is beyond all that training moved it by
USUAL = 10  # evaluations of a length


def calibrate(stage: Calibrate, task: Task) -> dict[str, Any]:
    """Puts the adapter, weakened, and the attention factors into the stage's recipe; all that was tried, with losses.

    Each number is walked to the side where the loss falls, until it rises: the share from 1 down, an attention factor
    from what the set has.
    """
    with temporary_folder() as scratch:
        recipe = task.recipe
        run = _Calibration(stage, task, recipe.tiers, task.adapter, scratch, task.kept(TRIED))
        share, shares = (1.0, {}) if run.adapter is None else run.share()
        tiers, factors = run.attention(share)
        adapter = run.weakened(share)
        if adapter is not None and adapter != run.adapter and task.leading:
            shutil.copytree(adapter, task.folder / ADAPTER, dirs_exist_ok=True)
            adapter = task.folder / ADAPTER
        task.write(replace(recipe, tiers=tiers), adapter)
    return {"share": share, "shares": shares, "attention": factors}


@dataclass
class _Calibration:
    """The tries of a stage. Losses are kept as they come, so that an interrupted stage repeats none."""

    stage: Calibrate
    task: Task
    tiers: tuple[Tier, ...]
    adapter: Path | None  # all of the training
    scratch: Path
    kept: dict[str, float]
    model: LoadedModel | None = None
    loaded: float | None = None  # the share of the model in memory
    rows: dict[int, list[Row]] = field(default_factory=dict)

    def share(self) -> tuple[float, dict[str, float]]:
        """How much of the training is kept, and the loss of each share that was tried."""

        def of(steps: int) -> float:
            return round(1 + SHARE_STEP * steps, 6)

        best, tried = walk(lambda steps: self.loss(of(steps), self.tiers, self.stage.lengths), (-1,), MOST_SHARES)
        return of(best), {str(of(steps)): tried[steps] for steps in sorted(tried, reverse=True)}

    def attention(self, share: float) -> tuple[tuple[Tier, ...], list[dict[str, Any]]]:
        """The sets with their attention factors, and what was tried for each set that has a length to be judged by.
        Where one factor serves all sets, it stays."""
        tiers, facts = list(self.tiers), []
        for index, tier in enumerate(self.tiers[1:] if self.task.one_attention is None else (), 1):
            if lengths := [length for length in self.stage.lengths if serving(self.tiers, length) is tier]:
                tiers[index], tried = self._attention_of(tier, share, lengths)
                before, chosen = tier.attention_factor, tiers[index].attention_factor
                facts.append({"max_length": tier.max_length, "before": before, "chosen": chosen, "tried": tried})
        return tuple(tiers), facts

    def _attention_of(self, tier: Tier, share: float, lengths: Sequence[int]) -> tuple[Tier, dict[str, float]]:
        def of(steps: int) -> Tier:
            factor = round(tier.attention_factor * (1 + ATTENTION_STEP * steps), 6)
            return replace(tier, attention_factor=factor) if steps else tier

        best, tried = walk(lambda steps: self.loss(share, (of(steps),), lengths), (-1, 1), MOST_ATTENTION)
        return of(best), {str(of(steps).attention_factor): tried[steps] for steps in sorted(tried)}

    def loss(self, share: float, tiers: Sequence[Tier], lengths: Sequence[int]) -> float:
        """The mean over all documents of some lengths, each under the set that serves it."""
        return float(np.mean([self._loss(share, serving(tiers, length), length) for length in lengths]))

    def _loss(self, share: float, tier: Tier, length: int) -> float:
        key = f"share {share}, attention factor {tier.attention_factor}, {length} tokens"
        if key not in self.kept:
            self.task.say(f"share {share:g}, attention factor {tier.attention_factor:.4g}, {length:,} tokens")
            model, stage = self._model(share), self.stage
            model.rotation = tier
            found = [loss_of(model, row, stage.objective, stage.judged) for row in self._rows(length)]
            self.kept[key] = float(np.mean(found))
            self.task.keep(TRIED, self.kept)
        return self.kept[key]

    def _rows(self, length: int) -> list[Row]:
        """Documents that end where the texts do: what stands before their ends may have been trained on."""
        if length not in self.rows:
            stage, texts = self.stage, [text.tokens for text in self.task.texts]
            whole = [text for text in texts if len(text) >= length][: stage.documents] or [np.concatenate(texts)]
            self.rows[length] = [
                whole_row(self.task, [text[-length:]], length, stage.objective, stage.keys) for text in whole
            ]
        return self.rows[length]

    def _model(self, share: float) -> LoadedModel:
        from lrconvert.training.loaded import LoadedModel as Loaded

        if self.model is None or self.loaded != share:
            self.model = None  # the one before goes away first
            adapter = self.weakened(share)
            weights = self.task.model if adapter is None else merged(self.task.model, open_adapter(adapter))
            self.model, self.loaded = Loaded(weights, **self.task.loading), share
        return self.model

    def weakened(self, share: float) -> Path | None:
        """The adapter of which a share is kept: the task's own for all of it."""
        from lrconvert.training.adapter_file import weaken

        if self.adapter is None or share == 1:
            return self.adapter
        folder = self.scratch / str(share)
        if not folder.exists():
            weaken(self.task.model, self.adapter, share, folder)
        return folder


def walk(loss: Callable[[int], float], sides: Sequence[int], most: int) -> tuple[int, dict[int, float]]:
    """The number of steps from 0, to one of the sides, at which the loss is lowest before it rises; the loss of every
    number that was tried, each asked for once."""
    tried: dict[int, float] = {}

    def of(steps: int) -> float:
        if steps not in tried:
            tried[steps] = loss(steps)
        return tried[steps]

    side, best = min(sides, key=of), 0
    while abs(best) < most and of(best + side) < of(best):
        best += side
    return best, tried
