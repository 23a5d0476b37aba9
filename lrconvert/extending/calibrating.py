# SPDX-License-Identifier: Apache-2.0
"""A finished extension calibrated on text that nothing was trained on.

Two numbers follow from training, and its own text can't tell them, since the weights know it by heart:

- *share*: how much of the training is kept. Weights between those before training and after it are often better on
  other text than either (WiSE-FT, arXiv 2109.01903).
- *attention factor* of every set beyond the original window. LongRoPE's formula is for weights before any training.

The factors λ stay: training has fitted the weights to them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, merged, open_adapter
from lrconvert.errors import UnsupportedError
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
        run = _Calibration(stage, task, scratch, task.kept(TRIED))
        share, shares = (1.0, {}) if task.adapter is None else run.share()
        tiers, factors = run.attention(share)
        adapter = run.weakened(share)
        if adapter is not None and adapter != task.adapter and task.leading:
            shutil.copytree(adapter, task.folder / ADAPTER, dirs_exist_ok=True)
            adapter = task.folder / ADAPTER
        task.write(replace(task.recipe, tiers=tiers), adapter)
    return {"share": share, "shares": shares, "attention": factors}


@dataclass
class _Calibration:
    """The tries of a stage. Losses are kept as they come, so that an interrupted stage repeats none."""

    stage: Calibrate
    task: Task
    scratch: Path
    kept: dict[str, float]
    model: LoadedModel | None = None
    loaded: float | None = None  # the share of the model in memory
    rows: dict[int, list[Row]] = field(default_factory=dict)

    def share(self) -> tuple[float, dict[str, float]]:
        """How much of the training is kept, and the loss of each share that was tried."""

        def of(steps: int) -> float:
            return round(1 + SHARE_STEP * steps, 6)

        @cache
        def loss(steps: int) -> float:
            return self.loss(of(steps), self.task.recipe.tiers, self.stage.lengths)

        best = walk(loss, (-1,), MOST_SHARES)
        tried = {str(of(steps)): loss(steps) for steps in range(best - 1, 1) if steps >= -MOST_SHARES}
        return of(best), dict(reversed(tried.items()))

    def attention(self, share: float) -> tuple[tuple[Tier, ...], list[dict[str, Any]]]:
        """The sets with their attention factors, and what was tried for each set that has a length to be judged by."""
        recipe = self.task.recipe
        tiers, facts = list(recipe.tiers), []
        for index, tier in enumerate(recipe.tiers):
            lengths = [length for length in self.stage.lengths if serving(recipe.tiers, length) is tier]
            if index and lengths and self.task.one_attention is None:
                tiers[index], tried = self._attention_of(tier, share, lengths)
                before, chosen = tier.attention_factor, tiers[index].attention_factor
                facts.append({"max_length": tier.max_length, "before": before, "chosen": chosen, "tried": tried})
        return tuple(tiers), facts

    def _attention_of(self, tier: Tier, share: float, lengths: Sequence[int]) -> tuple[Tier, dict[str, float]]:
        def of(steps: int) -> Tier:
            factor = round(tier.attention_factor * (1 + ATTENTION_STEP * steps), 6)
            return replace(tier, attention_factor=factor) if steps else tier

        tried: dict[int, float] = {}

        def loss(steps: int) -> float:
            if steps not in tried:
                tried[steps] = self.loss(share, (of(steps),), lengths)
            return tried[steps]

        best = walk(loss, (-1, 1), MOST_ATTENTION)
        return of(best), {str(of(steps).attention_factor): tried[steps] for steps in sorted(tried)}

    def loss(self, share: float, tiers: Sequence[Tier], lengths: Sequence[int]) -> float:
        """The mean over all documents of some lengths, each under the set that serves it."""
        return float(np.mean([self._loss(share, serving(tiers, length), length) for length in lengths]))

    def _loss(self, share: float, tier: Tier, length: int) -> float:
        key = f"share {share}, attention factor {tier.attention_factor}, {length} tokens"
        if key not in self.kept:
            self.task.say(key)
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
            ends = [[text[-length:]] for text in texts if len(text) >= length][: stage.documents] or [texts]
            self.rows[length] = [whole_row(self.task, end, length, stage.objective, stage.keys) for end in ends]
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
        own = self.task.adapter
        if own is None or share == 1:
            return own
        folder = self.scratch / str(share)
        if not folder.exists():
            weaken(self.task.model, own, share, folder)
        return folder


def walk(loss: Callable[[int], float], sides: Sequence[int], most: int) -> int:
    """The number of steps from 0, to one of the sides, at which the loss is lowest before it rises."""
    side, best = min(sides, key=loss), 0
    while abs(best) < most and loss(best + side) < loss(best):
        best += side
    return best


def weaken(model: Model, adapter: Path, share: float, folder: Path) -> None:
    """Write an adapter that changes `model` by a share of what another one changes: pairs of LoRA by their second
    factor, and tensors that were trained whole by their difference from the model's.

    Raises `UnsupportedError` for DoRA, whose change is no multiple of its factors.
    """
    from safetensors.torch import load_file
    from torch import from_numpy

    from lrconvert.training.tuning import write_weights

    if open_adapter(adapter).config.dora:
        raise UnsupportedError(f"{adapter}: an adapter with DoRA can't be calibrated", remedy="Leave the stage out")
    made = {}
    for name, tensor in load_file(adapter / WEIGHTS).items():
        if "lora_" in name:
            made[name] = tensor * share if "lora_B" in name or "lora_embedding_B" in name else tensor
        else:
            base = from_numpy(model.checkpoint.read(name.removeprefix(PREFIX)).astype(np.float32))
            made[name] = (base + share * (tensor.float() - base)).to(tensor.dtype)
    folder.mkdir(parents=True)
    shutil.copyfile(adapter / CONFIG, folder / CONFIG)
    write_weights(made, folder)
