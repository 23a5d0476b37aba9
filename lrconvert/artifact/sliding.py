# SPDX-License-Identifier: Apache-2.0
"""Sliding windows: a model whose layers attend to the last tokens only, and what becomes of that in an artifact."""

from __future__ import annotations

from dataclasses import dataclass

from lrconvert.checkpoint import Model
from lrconvert.errors import UnsupportedError

FLAG = "--lift-sliding-window"


@dataclass(frozen=True)
class Windows:
    """What a bake makes of sliding windows. `model`: the one that the artifact computes; `lifted`: without them;
    `dropped`: what that costs the model, in words; `notes`: what a user has to know."""

    model: Model
    lifted: bool = False
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def lifted_note(model: Model, purpose: str) -> tuple[str, ...]:
    """What a user has to know where `purpose` computes without sliding windows that act on the model, or pays for
    them."""
    if not model.shape.slides_within(_served(model)):
        return ()
    if model.shape.plain_theta is not None:
        return (f"{purpose} keeps {_where(model)}: n tokens take a mask of n times n bytes",)
    found = f"{purpose} attends to every token: {_where(model)} is lifted"
    return (f"{found}, and an artifact keeps it unless it is baked with {FLAG}",)


def _served(model: Model) -> int:
    """The tokens that the model serves today."""
    return model.shape.window if model.checkpoint.rope_problems else max(model.shape.window, model.rotation.window)


def _named(model: Model) -> str:
    return (
        f"the sliding window of {', '.join(map(str, sorted({width for width in model.shape.sliding if width})))} tokens"
    )


def _where(model: Model) -> str:
    limited = sum(0 < width < _served(model) for width in model.shape.sliding)
    return f"{_named(model)} in {limited} of {model.shape.layers} layers"


def settle_windows(model: Model, window: int, *, lift: bool, keeps: bool, target: str) -> Windows:
    """Sliding windows in an artifact that serves `window` tokens.

    A window that never acts on the model, because it is as long as what the model serves, is lifted where the artifact
    serves more (but where layers that slide rotate by themselves: no recipe is for them). One that acts is kept where
    the target can (`keeps`); else it is lifted if the user asks for that
    (`lift`). Raises `UnsupportedError` where neither is so.
    """
    shape = model.shape
    if not shape.slides_within(window):
        return Windows(model)
    served = _served(model)
    if not shape.slides_within(served) and shape.plain_theta is None:
        note = f"{_named(model)} is lifted: it never acts within the {served} tokens that the model serves"
        return Windows(model.lifted(), lifted=True, notes=(note,))
    where = _where(model)
    if lift:
        words = f"{where}: every layer attends to every token, also within the {served} tokens that the model serves"
        return Windows(model.lifted(), lifted=True, dropped=(words,))
    if not keeps:
        raise UnsupportedError(
            f"{model.reference}: {where}; {target} attends to every token, and would compute another model within the "
            f"{served} tokens that this one serves",
            remedy=f"Bake to hf or onnx, which keep it, or lift it with {FLAG}",
        )
    return Windows(model, notes=(f"{where} is kept: they don't see beyond it, whatever the recipe; {FLAG} lifts it",))
