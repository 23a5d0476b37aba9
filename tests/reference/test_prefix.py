# SPDX-License-Identifier: Apache-2.0
"""A sequence that begins as an earlier one did is not computed again, and answers the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import recipe_for

from lrconvert.checkpoint import Model
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.reference import FactorSet, Reference, Rotation
from lrconvert.reference.prefix import Prefixes, Read

Pico = Callable[..., Model]
TOKENS = np.random.default_rng(5).integers(0, 101, size=90)


def rotation(model: Model) -> Rotation:
    """Two sets, with start tokens and attention factors of their own."""
    pairs = model.shape.rotary_dim // 2
    short, long = np.linspace(1.0, 1.5, pairs).tolist(), np.linspace(1.0, 8.0, pairs).tolist()
    return Rotation(
        model.shape.theta, model.shape.rotary_dim, [FactorSet(64, short, 3, 1.0), FactorSet(512, long, 3, 1.2)]
    )


def read_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens go through the first layer, pass by pass, from now on."""
    seen: list[int] = []
    computed = Reference._attention

    def counted(self: Reference, x: torch.Tensor, layer: int, *more: Any) -> Any:
        if layer == 0:
            seen.append(len(x))
        return computed(self, x, layer, *more)

    monkeypatch.setattr(Reference, "_attention", counted)
    return seen


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 16}, {"num_key_value_heads": 4}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen3"])
def test_the_answer_is_that_of_a_whole_pass(
    pico: Pico, family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the same tokens and for others behind them, under one set and where the set changes on the way."""
    model = pico(family, **({} if family in ("llama", "qwen3") and "sliding_window" in changes else changes))
    fresh, other = (Reference(model, rotation(model)) for _ in range(2))
    kept = Reference(model, rotation(model))
    branched = np.concatenate([TOKENS[:60], TOKENS[:20]])
    growing = np.maximum(np.arange(80) + 1, 60)  # the last tokens have the long set
    kept.logits(TOKENS, length=64, keep=[89], remember=True)
    seen = read_tokens(monkeypatch)
    for tokens, length, keep in ((branched, 64, [59, 70, 79]), (branched, growing, [59, 64, 79])):
        wanted = fresh.logits(tokens, length=length, keep=keep)
        found = kept.logits(tokens, length=length, keep=keep)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11)
    assert seen == [80, 21, 80, 21]  # whole, and from the first token that is asked for
    changed = other.logits(branched, length=512, keep=[79])  # a control: the other set is far off
    assert np.abs(changed - fresh.logits(branched, length=64, keep=[79])).max() > 1e-3


def test_nothing_is_shared_where_the_rotation_differs(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another set, another base, other positions, forgotten tokens or other tokens: read as a whole."""
    model = pico("llama")
    reference = Reference(model, rotation(model))
    reference.logits(TOKENS, length=64, keep=[89], remember=True)
    seen = read_tokens(monkeypatch)
    keep = [88]
    reference.logits(TOKENS, length=512, keep=keep)
    reference.logits(TOKENS, length=64, keep=keep, positions=np.arange(90) + 1)
    reference.logits(TOKENS, length=64, keep=keep, forgotten=(4, 60))
    reference.logits(np.concatenate([[7], TOKENS[1:]]) if TOKENS[0] != 7 else TOKENS[::-1], length=64, keep=keep)
    reference.rotation = Rotation(5e5, model.shape.rotary_dim, rotation(model).sets)
    reference.logits(TOKENS, length=64, keep=keep)
    assert seen == [90] * 5
    reference.rotation = rotation(model)
    reference.logits(TOKENS, length=64, keep=keep)
    assert seen[-1] == 2


def test_decoding_repeats_no_prompt(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across a boundary: one pass over the prompt for each set, whoever asks and whatever was decoded."""
    model = pico("llama")
    spec = model.resolve(recipe_for(model))
    prompt, boundary = TOKENS[:60], spec.boundaries[0]
    assert boundary == 64
    whole = ReferenceRunner(model).decoded(spec, prompt, TOKENS[60:68].tolist())
    runner = ReferenceRunner(model)
    seen = read_tokens(monkeypatch)
    first = runner.decoded(spec, prompt, TOKENS[60:68].tolist())
    assert seen == [64, 67]
    again = runner.decoded(spec, prompt, TOKENS[60:68].tolist())
    runner.decoded(spec, prompt, TOKENS[10:18].tolist())
    runner.decoded(spec, prompt, TOKENS[20:28].tolist(), cached=True)
    assert max(seen[2:]) <= 9 and len(seen) == 7
    for found in (first, again):
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-11)


def sequence(first: int, count: int) -> Read:
    return Read(np.arange(first, first + count), np.arange(count), np.zeros(count, np.int64))


def test_the_oldest_go_where_there_is_no_room() -> None:
    layer = [(torch.zeros(1, 10, 4), torch.zeros(1, 10, 4))]  # 320 bytes
    kept = Prefixes(700)

    def read(first: int) -> Read:
        return sequence(first, 10)

    for first in (0, 100, 200):
        kept.keep(read(first), layer)
    assert [kept.longest(read(first))[0] for first in (0, 100, 200)] == [0, 10, 10]
    kept.keep(sequence(100, 12), layer)  # begins as another: one of them is enough
    assert [kept.longest(read(first))[0] for first in (100, 200)] == [10, 10]
    kept.keep(read(300), layer * 3)
    assert [kept.longest(read(first))[0] for first in (100, 200, 300)] == [0, 0, 0]
    assert sequence(0, 5).common(replace(sequence(0, 5), rotations=np.ones(5))) == 0
    assert sequence(0, 5).common(replace(sequence(0, 5), positions=np.array([0, 1, 2, 4, 5]))) == 3
