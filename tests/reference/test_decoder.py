# SPDX-License-Identifier: Apache-2.0
"""The judge against an independent implementation: transformers' native models in float64, all families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import own_name, recipe_for
from support.float64 import of_experts
from support.pico import FAMILIES
from transformers import AutoModelForCausalLM

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import open_model
from lrconvert.reference import FactorSet, Reference, Rotation
from lrconvert.reference import decoder as decoder_module
from lrconvert.reference import weights as weights_module
from lrconvert.targets import hf

TOKENS = np.random.default_rng(3).integers(0, 101, size=40)
# What float32 inverse frequencies in native code leave of float64 agreement at 40 positions.
ROUNDING = 5e-4

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("qwen3", {"attention_bias": True}),
    ("phi3", {"partial_rotary_factor": None}),
]


def plain(model: Any, scale: float = 1.0) -> Rotation:
    """An unscaled rotation; `scale` spoils it, for controls."""
    width = model.shape.rotary_dim
    return Rotation(model.shape.theta, width, [FactorSet(2**20, [scale] * (width // 2), 0, 1.0)])


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=[f"{f}-{'-'.join(c) or 'plain'}" for f, c in VARIANTS])
def test_the_decoder_computes_what_transformers_computes(
    pico_folder: Callable[..., Path], family: str, changes: dict[str, Any]
) -> None:
    """Without any scaling, logits agree to the rounding of float32 tables; a spoiled rotation is far off."""
    folder = pico_folder(family, sliding_window=None, **changes)
    more = of_experts(family)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", **more)
    with torch.no_grad():
        theirs = native.eval()(torch.as_tensor(TOKENS)[None]).logits[0].numpy()
    model = open_model(folder)
    ours = Reference(model, plain(model)).logits(TOKENS)
    assert ours.dtype == np.float64
    assert np.abs(ours - theirs).max() < ROUNDING
    spoiled = Reference(model, plain(model, 1.5)).logits(TOKENS)
    assert np.abs(spoiled - theirs).max() > 100 * ROUNDING


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_chunks_do_not_change_the_result(
    pico_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Attention, feed-forward networks (one, or experts) and logits of a few tokens at a time are the same numbers;
    `keep` picks rows."""
    model = open_model(pico_folder(family))
    whole = Reference(model, plain(model)).logits(TOKENS)
    monkeypatch.setattr(decoder_module, "MAX_SCORES", 4 * 40 * 3)
    monkeypatch.setattr(decoder_module, "MAX_FED", 7)
    monkeypatch.setattr(decoder_module, "MAX_LOGITS", 101 * 7)
    chunked = Reference(model, plain(model)).logits(TOKENS)
    np.testing.assert_allclose(chunked, whole, atol=1e-12)
    picked = Reference(model, plain(model)).logits(TOKENS, keep=[3, 39])
    np.testing.assert_allclose(picked, whole[[3, 39]], atol=1e-12)


def test_weights_need_not_stay_in_memory(pico_folder: Callable[..., Path]) -> None:
    """With no room to keep weights they are read again for every pass, with the same result."""
    model = open_model(pico_folder("qwen2"))
    kept, read = Reference(model, plain(model)), Reference(model, plain(model), keep_bytes=0)
    np.testing.assert_array_equal(kept.logits(TOKENS), read.logits(TOKENS))
    assert kept.weights._kept and not read.weights._kept


def test_no_more_weights_are_kept_than_memory_has_room_for(
    pico_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of what is free."""
    model = open_model(pico_folder("llama"))
    for free in (0, 60_000, 2**40):
        monkeypatch.setattr(weights_module, "usable_memory", lambda free=free: free)
        reference = Reference(model, plain(model))
        reference.logits(TOKENS)
        kept = sum(tensor.nbytes for tensor in reference.weights._kept.values())
        assert kept <= free / 3 and (kept > 0) == (free > 0)


def test_weights_are_kept_as_they_are_stored(pico_folder: Callable[..., Path]) -> None:
    """Once for two references that compute in other types, each as if it had read them itself."""
    model = open_model(pico_folder("qwen2"))
    wide = Reference(model, plain(model), stored_dtype="BF16")
    narrow = Reference(model, plain(model), dtype=torch.float32, weights=wide.weights)
    alone = Reference(model, plain(model), dtype=torch.float32, stored_dtype="BF16")
    first = wide.logits(TOKENS)
    kept = dict(wide.weights._kept)
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    np.testing.assert_array_equal(narrow.logits(TOKENS), alone.logits(TOKENS))
    np.testing.assert_array_equal(wide.logits(TOKENS), first)
    assert all(wide.weights._kept[key] is tensor for key, tensor in kept.items())
    assert wide.weights._kept.keys() == kept.keys()


@pytest.mark.parametrize(("dequantises", "limit"), [(False, "KEEP_FLOATS"), (True, "KEEP_QUANTISED")])
def test_what_is_kept_has_a_limit(
    pico_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dequantises: bool, limit: str
) -> None:
    """One for floats, another for what takes longer to read."""
    model = open_model(pico_folder("llama"))
    monkeypatch.setattr(model.checkpoint, "dequantises", dequantises)
    monkeypatch.setattr(weights_module, "KEEP_FLOATS", 0)
    monkeypatch.setattr(weights_module, "KEEP_QUANTISED", 0)
    monkeypatch.setattr(weights_module, limit, 20_000)
    reference = Reference(model, plain(model))
    reference.logits(TOKENS)
    assert 0 < sum(tensor.nbytes for tensor in reference.weights._kept.values()) <= 20_000


def test_the_set_is_chosen_by_the_length_of_the_sequence(pico_folder: Callable[..., Path]) -> None:
    """Short and long sets, start tokens and magnitude all reach the logits, and only where they belong."""
    model = open_model(pico_folder("llama"))
    width = model.shape.rotary_dim // 2
    short, long = FactorSet(20, [1.0] * width, 0, 1.0), FactorSet(64, [3.0] * width, 0, 1.0)
    both = Rotation(model.shape.theta, 2 * width, [short, long])

    def logits(rotation: Rotation, count: int) -> np.ndarray:
        return Reference(model, rotation).logits(TOKENS[:count])

    def only(chosen: FactorSet) -> Rotation:
        return Rotation(model.shape.theta, 2 * width, [chosen])

    np.testing.assert_array_equal(logits(both, 20), logits(only(short), 20))
    np.testing.assert_array_equal(logits(both, 21), logits(only(long), 21))
    assert np.abs(logits(both, 21) - logits(only(short), 21)).max() > 0.1
    start = FactorSet(64, [3.0] * width, 8, 1.0)
    # Positions below n̂ are unscaled: while there are no others, the set is the plain one.
    np.testing.assert_allclose(logits(only(start), 8), logits(only(short), 8), atol=1e-12)
    assert np.abs(logits(only(start), 12) - logits(only(long), 12)).max() > 0.1
    loud = FactorSet(64, [3.0] * width, 0, 1.2)
    assert np.abs(logits(only(loud), 21) - logits(only(long), 21)).max() > 0.1


def test_stored_dtype_rounds_the_weights(pico_folder: Callable[..., Path]) -> None:
    """An artifact in bfloat16 is judged by a reference on the weights it stores."""
    model = open_model(pico_folder("llama"))
    exact = Reference(model, plain(model)).logits(TOKENS)
    rounded = Reference(model, plain(model), stored_dtype="BF16").logits(TOKENS)
    assert 1e-3 < np.abs(exact - rounded).max() < 2.0


# --- keys that were cached for a shorter sequence --------------------------------------------------------


def token_by_token(model: Any, sets: list[FactorSet], tokens: np.ndarray, prompt: int) -> np.ndarray:
    """Logits after every token of a Llama that reads one at a time, in NumPy, with a real cache of rotated keys: those
    of the prompt were made when the sequence had `prompt` tokens, each later one when it had come to it."""
    shape = model.shape
    weights = {key: model.tensor(*key).astype(np.float64) for key in model.roles}
    plain = shape.theta ** (-np.arange(0, shape.rotary_dim, 2) / shape.rotary_dim)

    def norm(x: np.ndarray, role: str, layer: int | None) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + shape.norm_eps) * weights[role, layer]

    def turned(x: np.ndarray, place: int, chosen: FactorSet) -> np.ndarray:
        angle = place * (plain if place < chosen.unscaled_positions else plain / np.array(chosen.divisors))
        spun = (x[:, : len(plain)] + 1j * x[:, len(plain) :]) * np.exp(1j * angle) * chosen.magnitude
        return np.concatenate([spun.real, spun.imag], axis=1)

    keys: list[list[np.ndarray]] = [[] for _ in range(shape.layers)]
    values: list[list[np.ndarray]] = [[] for _ in range(shape.layers)]
    answers = []
    for place, token in enumerate(tokens.tolist()):
        chosen = next(each for each in sets if each.reach >= max(place + 1, prompt))
        x = weights["embedding", None][token]
        for layer in range(shape.layers):
            normed = norm(x, "attention_norm", layer)
            q, k, v = (weights[role, layer] @ normed for role in "qkv")
            keys[layer].append(turned(k.reshape(shape.kv_heads, -1), place, chosen))
            values[layer].append(v.reshape(shape.kv_heads, -1))
            query = turned(q.reshape(shape.heads, -1), place, chosen)
            mixed = []
            for head in range(shape.heads):
                group = head // (shape.heads // shape.kv_heads)
                scores = np.array([key[group] @ query[head] for key in keys[layer]]) / np.sqrt(shape.head_dim)
                share = np.exp(scores - scores.max())
                mixed.append(share / share.sum() @ np.array([value[group] for value in values[layer]]))
            x = x + weights["o", layer] @ np.concatenate(mixed)
            normed = norm(x, "ffn_norm", layer)
            gate, up = weights["gate", layer] @ normed, weights["up", layer] @ normed
            x = x + weights["down", layer] @ (gate / (1 + np.exp(-gate)) * up)
        answers.append(weights["lm_head", None] @ norm(x, "final_norm", None))
    return np.stack(answers)


@pytest.mark.parametrize("prompt", [1, 7, 20, 21, 40])
def test_a_length_for_every_token_is_a_cache_that_is_kept(pico_folder: Callable[..., Path], prompt: int) -> None:
    """Three sets with start tokens, switched while decoding, at the end of the prompt and not at all: the same logits
    as real cached keys give, in float64. Reading all anew gives others."""
    model = open_model(pico_folder("llama"))
    width = model.shape.rotary_dim // 2
    sets = [
        FactorSet(8, [1.0] * width, 0, 1.0),
        FactorSet(20, np.linspace(1.5, 3, width).tolist(), 3, 1.1),
        FactorSet(64, np.linspace(1, 8, width).tolist(), 5, 1.3),
    ]
    reference = Reference(model, Rotation(model.shape.theta, 2 * width, sets))
    lengths = np.maximum(np.arange(len(TOKENS)) + 1, prompt)
    ours = reference.logits(TOKENS, length=lengths)
    np.testing.assert_allclose(ours, token_by_token(model, sets, TOKENS, prompt), atol=1e-11)
    anew = reference.logits(TOKENS, keep=[39])
    differs = np.abs(ours[39] - anew[0]).max()
    assert differs > 0.1 if prompt <= 20 else differs < 1e-11
    np.testing.assert_array_equal(reference.logits(TOKENS, length=[40] * 40), reference.logits(TOKENS))
    picked = reference.logits(TOKENS, length=lengths, keep=[39, 2])
    np.testing.assert_allclose(picked, ours[[39, 2]], atol=1e-12)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phimoe"])  # it has one set there
def test_cached_keys_are_those_of_transformers(pico: Callable[..., Any], tmp_path: Path, family: str) -> None:
    """Native longrope with its own cache, decoded across the boundary: the reference with a length for every token is
    as near as without a switch; the reference that reads anew is far off."""
    model = pico(family)
    recipe = recipe_for(model, even=True)
    artifact = own_name(tmp_path / "a")
    bake_plan(hf.plan(model, recipe, artifact))
    more = of_experts(family)
    native = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float64, attn_implementation="eager", **more)
    native.eval()
    tokens = np.random.default_rng(3).integers(0, 101, size=70)
    cache, theirs = None, []
    with torch.no_grad():
        for start, stop in ((0, 60), *((n, n + 1) for n in range(60, 70))):
            answer = native(torch.as_tensor(tokens[start:stop])[None], past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            theirs.append(answer.logits[0, -1].numpy())
    sets = [FactorSet(t.max_length, t.factors, t.start_tokens, t.attention_factor) for t in recipe.tiers]
    reference = Reference(model, Rotation(model.shape.theta, model.shape.rotary_dim, sets))
    keep = np.arange(59, 70)
    ours = reference.logits(tokens, length=np.maximum(np.arange(70) + 1, 60), keep=keep)
    assert np.abs(ours - np.stack(theirs)).max() < ROUNDING
    anew = reference.logits(tokens, keep=[69])
    assert np.abs(anew[0] - theirs[-1]).max() > 100 * ROUNDING
