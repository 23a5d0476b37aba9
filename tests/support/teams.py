# SPDX-License-Identifier: Apache-2.0
"""What the processes of a team compute of a document that they share, on CPUs and on GPUs. One process without a team
says what it should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.extending import any_text, key_maker, scaled
from support.trained import ADAPTER

from lrconvert.checkpoint import Model, open_model
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.losses import MAX_LOGITS
from lrconvert.training.rows import RowOptions, make_row
from lrconvert.training.tuning import FORWARD_TOKENS, StepRows, TuneOptions, Tuning, load_trainable

# For `python -c`. In front of any code, and of `ASK`, which takes a folder and what is asked, as JSON.
IMPORTING = f"import sys; sys.path.append({str(Path(__file__).parents[1])!r})"
ON_CPUS = f"{IMPORTING}\nfrom support.cpu_ring import allow_teams_on_cpus\nallow_teams_on_cpus()\n"
ASK = f"{IMPORTING}\nfrom support.teams import main\nmain()\n"
ANSWERS = "answers.npz"
LENGTH, JUDGED = 61, (20, 45)  # not a multiple of what a team shares
KEPT, AGAIN = "kept", "again"  # activations in a backward pass


def main() -> None:
    """In one of the processes that torchrun starts: `save_answers`, where that is asked for, and trainings in folders,
    each with what it is given beyond `machine`. Prints which steps each training made."""
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    model, machine = open_model(asked["model"]), asked["machine"]
    FORWARD_TOKENS[machine["device"]] = 400  # two of the long rows
    if asked["answers"]:
        save_answers(model, folder, **machine)
    print(json.dumps([tune(model, folder / name, **machine, **given) for name, given in asked["trainings"]]))


# --- two documents -------------------------------------------------------------------------------------------


def save_answers(model: Model, folder: Path, **machine: Any) -> None:
    """Of two rows that jump: everything that a model says of them, in many chunks, and the gradients of the weights
    that train. No matrix of LoRA is zero, or another one would have no gradient."""
    loaded, _ = load_trainable(model, TuneOptions(rank=4), **machine)
    loaded.rotation = scaled(model, 256)
    rng = np.random.default_rng(0)
    for weight in loaded.trainable:
        if weight.ndim == 2:
            weight.data.copy_(torch.from_numpy(rng.normal(0, 0.05, tuple(weight.shape))))
    tokens = rng.integers(0, 500, (2, LENGTH))
    at = np.arange(LENGTH) + np.array([[150], [99]]) * (np.arange(LENGTH) > np.array([[13], [40]]))
    weights = rng.random((2, LENGTH - 1)) * (rng.random((2, LENGTH - 1)) < 0.7) / LENGTH
    most = MAX_LOGITS[loaded.device.type]
    MAX_LOGITS[loaded.device.type] = 7 * len(tokens) * model.shape.vocab
    try:
        found = _said(loaded, tokens, at, weights)
    finally:
        MAX_LOGITS[loaded.device.type] = most
    if not loaded.workers.rank:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / ANSWERS, **found)


def _said(loaded: LoadedModel, tokens: np.ndarray, at: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": loaded.losses(tokens, at=at)}
    found["judged"] = loaded.losses(tokens, JUDGED, at)[:, slice(*JUDGED)]
    with torch.no_grad():  # nobody shares this
        logits = loaded.network(input_ids=torch.from_numpy(tokens[:1]).to(loaded.device), use_cache=False).logits
    known = np.append(tokens[0], int(logits[0, -1].argmax()))
    found["scored"], found["first choices"] = loaded.scores(known, 9)
    found["searched"], found["factors"] = loaded.losses_and_gradient(tokens, weights, at=at)
    for name in (KEPT, AGAIN):
        loaded.recompute = name == AGAIN
        found[name] = loaded.backward(tokens, weights, at)
        loaded.workers.sum_gradients(loaded.trainable)
        for index, weight in enumerate(loaded.trainable):
            assert weight.grad is not None
            found[f"{name}, weight {index}"] = weight.grad.float().cpu().numpy()
            weight.grad = None
    return found


# --- a training ----------------------------------------------------------------------------------------------


def rows_of(model: Model, step: int) -> StepRows:
    """Three long rows with jumps and labelled keys, two short ones of text under another set, one in between."""
    kinds = [(3, RowOptions(170, 256, (1, 2), 2)), (2, RowOptions(64, 64)), (1, RowOptions(97, 256, (1, 1), 1))]
    count, made = kinds[step % len(kinds)]
    seeds = [np.random.default_rng([step, index]) for index in range(count)]
    rows = tuple(make_row([any_text(2000)], made, key_maker(), rng) for rng in seeds)
    return StepRows(scaled(model, made.span, made.span / 64), rows)


def tune(model: Model, folder: Path, stop: int | None = None, **machine: Any) -> list[int]:
    """Four steps, and the adapter beside their log; `stop`: interrupted in that step. Which steps it made."""
    options = TuneOptions(steps=4, rank=4, warmup=1, rate=1e-2)
    loaded, trainable = load_trainable(model, options, **machine)
    made: list[int] = []

    def watch(result: Any) -> None:
        made.append(result.step)
        if result.step == stop:
            raise KeyboardInterrupt

    try:
        Tuning(loaded, options, lambda step: rows_of(model, step), folder, every=0).run(watch)
    except KeyboardInterrupt:
        return made
    trainable.save(loaded, folder / ADAPTER)
    return made
