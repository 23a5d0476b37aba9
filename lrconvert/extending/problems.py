# SPDX-License-Identifier: Apache-2.0
"""What of a plan can't be carried out, whatever the texts: one function for each kind of stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lrconvert.errors import InputError
from lrconvert.extending.plan import Calibrate, Derive, Evaluate, Plan, Recover, Search, Tune

Problems = Iterator[str]  # each begins with what stands behind the stage's name: ".rank is 8; …" or " has nothing …"


@dataclass
class State:
    """What the stages so far have made of a model with an original `window`: `reach` is the longest set's window,
    `trained` the last stage that trained. With --on it begins with a recipe's, whose adapter has `rank` and
    `projections`."""

    window: int
    reach: int
    rank: int | None = None
    projections: str | None = None
    trained: Tune | None = None
    first: bool = True


def check_plan(plan: Plan, where: object, window: int, **on: Any) -> None:
    """Raises `InputError` with all `problems`."""
    if found := problems(plan, window, **on):
        raise InputError.collect(where, found)


def problems(
    plan: Plan, window: int, reach: int | None = None, rank: int | None = None, projections: str | None = None
) -> list[str]:
    """Each with its key. With --on, `reach` is the window of the sets that there are already, and `rank` and
    `projections` are the adapter's."""
    state, found = State(window, reach or window, rank, projections), []
    for name, stage in zip(plan.names, plan.stage, strict=True):
        own = list(KINDS[type(stage)](stage, state))
        if isinstance(stage, Calibrate) and any(isinstance(other, Tune | Search | Recover) for other in plan.stage):
            own.append(" needs other text than stages that search or train; make it a plan of its own, for --on")
        found += [f"{name}{problem}" for problem in own]
        state.first = False
    return found


def _set(stage: Derive | Search, state: State) -> Problems:
    if stage.window <= state.reach:
        yield f".window is {stage.window}; windows grow, so more than {state.reach} is needed"
    state.reach = max(state.reach, stage.window)


def _search(stage: Search, state: State) -> Problems:
    yield from _set(stage, state)
    for name in ("row_length", "decide"):
        if (length := getattr(stage, name) or 0) > stage.window:
            yield f".{name} is {length}, longer than its window, {stage.window}"
    if stage.row_length is not None:
        yield from _no_keys(stage)
    yield from _jumps(stage, stage.row_length)


def _tune(stage: Tune, state: State) -> Problems:
    if stage.window != state.reach:
        begin = "; begin with --on RECIPE, or with a stage that makes its set" if state.first else ""
        yield f".window is {stage.window}; the sets before it reach {state.reach}{begin}"
    if stage.length > stage.window:
        yield f".length is {stage.length}, longer than its window, {stage.window}"
    if stage.distil >= stage.length:
        yield f".distil is {stage.distil}; it has to be less than a row, {stage.length} tokens"
    if stage.method == "lora":
        yield from _adapter(stage, state)
    yield from _jumps(stage, stage.length)
    state.trained = stage


def _adapter(stage: Tune, state: State) -> Problems:
    """That an adapter goes on training as it is."""
    before = state.trained
    if before is not None and before.method == "full":
        yield ".method is 'lora'; after stages that trained all weights only 'full' can"
        return
    for name in ("rank", "projections"):
        value, has = getattr(stage, name), getattr(state if before is None else before, name)
        if has not in (None, value):
            yield f".{name} is {value!r}; the adapter that it trains on has {has!r}"


def _jumps(stage: Tune | Search, row: int | None) -> Problems:
    if stage.jumps[0] > stage.jumps[1]:
        yield f".jumps is {list(stage.jumps)}; the least comes first"
    if row is not None and stage.jumps[1] >= row:
        yield f".jumps is {list(stage.jumps)}; a row of {row} tokens has room for fewer"


def _no_keys(stage: Search | Calibrate) -> Problems:
    if stage.objective != "perplexity" and not stage.keys:
        yield f".objective is {stage.objective!r}, and keys is 0"


def _recover(stage: Recover, state: State) -> Problems:
    if state.reach <= state.window:
        yield f" has nothing to recover from: no stage before it goes beyond {state.window}"


def _calibrate(stage: Calibrate, state: State) -> Problems:
    if max(stage.lengths) > state.reach:
        yield f".lengths has {max(stage.lengths)}; the sets before it reach {state.reach}"
    yield from _no_keys(stage)


def _evaluate(stage: Evaluate, state: State) -> Problems:
    lengths = (*stage.perplexity, *stage.retrieval, *stage.passkey)
    if not lengths:
        yield " measures nothing: give perplexity, retrieval or passkey lengths"
    elif max(lengths) > state.reach:
        yield f" measures at {max(lengths)}; the sets before it reach {state.reach}"


KINDS: dict[type, Callable[[Any, State], Problems]] = {
    Derive: _set,
    Search: _search,
    Tune: _tune,
    Recover: _recover,
    Calibrate: _calibrate,
    Evaluate: _evaluate,
}
