# SPDX-License-Identifier: Apache-2.0
"""The attention factor of a trained set, searched on whole documents.

LongRoPE's formula is for weights before any training. Fine-tuning under a set fits the weights to it, and may leave
another factor better on text that they don't know by heart. The factors λ stay: training has fitted the weights to
them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.extending.deciding import loss_of, whole_row
from lrconvert.extending.plan import Attention
from lrconvert.extending.task import Task
from lrconvert.rope import serving

if TYPE_CHECKING:
    from lrconvert.training.loaded import LoadedModel

TRIED = "tried.json"
STEP = 0.02  # of the factor that the set has; smaller ones change a loss by less than its noise from text to text
MOST = 15  # steps away, so that the search ends: 30 % is beyond all that training moved it by
USUAL = 7  # evaluations of a search


def attend(stage: Attention, task: Task) -> dict[str, Any]:
    """Puts the best attention factor into the stage's recipe; all that were tried, with their losses.

    Walks from the factor that the set has to whichever side has the lower loss, until it rises.
    """
    from lrconvert.training.loaded import LoadedModel as Loaded

    recipe = task.recipe
    tier = serving(recipe.tiers, stage.window)
    rows = [whole_row(task, stage.tokens, stage.objective, stage.keys, number) for number in range(stage.documents)]
    kept = task.kept(TRIED)
    loaded: list[LoadedModel] = []  # at most one, when a loss is not kept already

    def factor(steps: int) -> float:
        return round(tier.attention_factor * (1 + STEP * steps), 6) if steps else tier.attention_factor

    @cache
    def loss(steps: int) -> float:
        key = str(factor(steps))
        if key not in kept:
            task.say(f"attention factor {factor(steps):.3f}", len(kept), USUAL)
            model = loaded[0] if loaded else Loaded(task.trained(), **task.loading)
            loaded[:] = [model]
            model.rotation = replace(tier, attention_factor=factor(steps))
            kept[key] = float(np.mean([loss_of(model, row, stage.objective, stage.judged) for row in rows]))
            task.keep(TRIED, kept)
        return kept[key]

    side = min((-1, 1), key=loss)
    best = 0
    while abs(best) < MOST and loss(best + side) < loss(best):
        best += side
    task.write(task.with_tier(replace(tier, attention_factor=factor(best))), task.adapter)
    tried = [{"attention_factor": float(key), "loss": value} for key, value in kept.items()]
    return {
        "tokens": stage.tokens,
        "judged": stage.judged,
        "before": tier.attention_factor,
        "chosen": factor(best),
        "tried": sorted(tried, key=lambda one: one["attention_factor"]),
    }
