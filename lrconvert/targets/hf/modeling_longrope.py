# SPDX-License-Identifier: Apache-2.0
"""LongRoPE for transformers: a native decoder with another rotary embedding and an exact generate.

This file ships inside the artifact it belongs to and runs with `trust_remote_code=True`. It needs
torch and transformers (4.57 to 5.x), and opens no file and no connection. Its data is the
`longrope` key of config.json:

    {"version": 1, "rope_theta": 10000.0, "rotary_dim": 64, "switch": "reprefill",
     "tiers": [{"max_length": 4096, "factors": [32 numbers], "start_tokens": 0,
                "attention_factor": 1.0}, ...],                      ordered by max_length
     "plain": {"sliding_attention": 10000.0}}     kinds of layers that no tier rotates, and their theta

A sequence of n tokens is rotated with the first tier whose max_length is at least n, or with the
last one. With base theta, the angle of position p at frequency index i is

    p * theta**(-2i / rotary_dim) / factors[i]        not divided where p < start_tokens

and both cosine and sine are multiplied by the attention factor.

Keys that were rotated and cached in one tier are therefore wrong in the next, and rotating them
again does not repair that: in every layer but the first they come from hidden states that were made
with the old tier. `switch` says what `generate` does about it:

    "reprefill"  When a row crosses into another tier, the cache is emptied and the whole sequence
                 is run again. What is computed at each length equals a full forward pass.
    "upfront"    The tier is that of prompt + new tokens, from the first step on. Nothing is run
                 twice, but the output depends on max_new_tokens. (Without a cache there is nothing
                 to fix up front, and each length has its own tier.)

Assisted and prompt-lookup decoding take tokens back, so they always work like "upfront". A loop
written by hand that carries a cache into another tier gets a ValueError, not a wrong answer; that
check is skipped inside torch.compile. In a row of packed documents the longest sets the tier.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationMixin

# The next line is the only one that differs between families
from transformers import LlamaForCausalLM as NativeForCausalLM
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_longrope(longrope, native_rotary_dim: int) -> None:
    """Raise one ValueError that names everything wrong with the `longrope` key of config.json."""
    if not isinstance(longrope, dict) or longrope.get("version") != 1:
        found = "missing" if longrope is None else "not an object"
        if isinstance(longrope, dict):
            found = f"of version {longrope.get('version')!r}"
        raise ValueError(
            f"config.json: longrope is {found}; modeling_longrope.py needs its tiers, version 1. "
            "Take config.json and modeling_longrope.py from one artifact, or load without "
            "trust_remote_code for what the native model can do."
        )
    wrong = []

    def need(name, value, good, what):
        if not good:
            wrong.append(f"{name} is {repr(value)[:60]}, needed: {what}")

    def is_positive(value):
        return type(value) in (int, float) and 0 < value < math.inf

    theta, dim, switch = (longrope.get(key) for key in ("rope_theta", "rotary_dim", "switch"))
    need("rope_theta", theta, is_positive(theta), "a number above 0")
    need("rotary_dim", dim, dim == native_rotary_dim, f"{native_rotary_dim}, as the model has")
    need("switch", switch, switch in ("reprefill", "upfront"), "'reprefill' or 'upfront'")
    tiers = longrope.get("tiers")
    if not isinstance(tiers, list) or not tiers or not all(isinstance(t, dict) for t in tiers):
        need("tiers", tiers, False, "a list of at least one object")
        tiers = []
    shorter = 0
    for k, tier in enumerate(tiers):
        bound, start, scale = (tier.get(key) for key in ("max_length", "start_tokens", "attention_factor"))
        ordered = type(bound) is int and bound > shorter
        need(f"tiers[{k}].max_length", bound, ordered, f"an integer above {shorter}")
        shorter = bound if ordered else shorter
        need(f"tiers[{k}].start_tokens", start, type(start) is int and start >= 0, "0 or more")
        need(f"tiers[{k}].attention_factor", scale, is_positive(scale), "a number above 0")
        factors = tier.get("factors")
        good = isinstance(factors, list) and all(is_positive(factor) for factor in factors)
        good = good and 2 * len(factors) == native_rotary_dim
        need(f"tiers[{k}].factors", factors, good, f"{native_rotary_dim // 2} numbers above 0")
    plain = longrope.get("plain", {})
    good = isinstance(plain, dict) and all(is_positive(theta) for theta in plain.values())
    need("plain", plain, good, "a number above 0 for each kind of layer")
    if wrong:
        raise ValueError("config.json: longrope: " + "; ".join(wrong))


class TieredRope(nn.Module):
    """cos and sin of every position, in the tier that the length of its row asks for.

    No buffers and no parameters, on purpose: transformers 5 builds models on the meta device and
    leaves the buffers of foreign modules uninitialised, and `.bfloat16()` would round them. The
    numbers are Python floats until the first forward on a device. Angles are made in float64, since
    a float32 angle is off by 6e-2 rad at position 2M; only cos and sin are rounded, to x's dtype.
    """

    def __init__(self, longrope: dict):
        super().__init__()
        self.rope_theta = longrope["rope_theta"]
        self.rotary_dim = longrope["rotary_dim"]
        self.tiers = longrope["tiers"]
        self.bounds = [tier["max_length"] for tier in self.tiers]
        # Rows count as at least this long: a tensor (rows,), or None. Set before each forward.
        self.floor = None
        self._tables = {}
        ones = {"factors": [1.0] * (self.rotary_dim // 2), "start_tokens": 0, "attention_factor": 1.0}
        self.plain = {
            kind: TieredRope({**longrope, "rope_theta": theta, "tiers": [{"max_length": 1, **ones}], "plain": {}})
            for kind, theta in longrope.get("plain", {}).items()
        }

    def tier_index(self, length: int) -> int:
        """The tier for a sequence of `length` tokens."""
        return min(bisect_left(self.bounds, length), len(self.bounds) - 1)

    def _tables_on(self, device: torch.device):
        if device in self._tables:
            return self._tables[device]
        half = range(self.rotary_dim // 2)
        inverse = [self.rope_theta ** (-2 * i / self.rotary_dim) for i in half]
        rescaled = [[inverse[i] / tier["factors"][i] for i in half] for tier in self.tiers]
        with torch.inference_mode(False):  # the tables outlive the mode of the first caller
            tables = (
                torch.tensor(self.bounds[:-1], dtype=torch.long, device=device),
                torch.tensor([tier["start_tokens"] for tier in self.tiers], device=device),
                torch.tensor(inverse, dtype=torch.float64, device=device),
                torch.tensor(rescaled, dtype=torch.float64, device=device),
                torch.tensor([tier["attention_factor"] for tier in self.tiers], dtype=torch.float64, device=device),
            )
        if not torch.compiler.is_compiling():  # what a tracer makes must not be kept
            self._tables[device] = tables
        return tables

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type=None):
        """Of x only dtype and device count; position_ids is (rows, positions). Reads nothing back from
        the device: it can be traced, and no GPU has to be waited for."""
        if layer_type in self.plain:
            return self.plain[layer_type](x, position_ids)
        # Apple's MPS has no float64
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        bounds, start_tokens, inverse, rescaled, scales = self._tables_on(device)
        positions = position_ids.to(device)
        lengths = positions.amax(-1) + 1
        if self.floor is not None:
            lengths = torch.maximum(lengths, self.floor.to(device))
        tier = torch.bucketize(lengths, bounds)  # the first whose bound is >= length, or the last
        frequencies = rescaled[tier][:, None]  # (rows, 1, rotary_dim / 2)
        if any(t["start_tokens"] for t in self.tiers):
            unscaled = positions < start_tokens[tier][:, None]
            frequencies = torch.where(unscaled[..., None], inverse, frequencies)
        angles = positions[..., None] * frequencies
        scale = scales[tier][:, None, None]
        cos, sin = angles.cos() * scale, angles.sin() * scale
        # Frequency index i turns the channels i and i + rotary_dim / 2
        return tuple(torch.cat((t, t), -1).to(device=x.device, dtype=x.dtype) for t in (cos, sin))


class CacheTag(NamedTuple):
    """Kept on a cache: which tiers its keys were rotated with, and up to where they are good.

    A "total" counts the positions in a cache and those that come now, padding included. A row grows
    by one when the total does, so comparing two integers tells whether any row leaves its tier,
    without asking the device. (Padding inside a row only makes that ask in vain.)
    """

    tiers: list  # a tier index for each row, or one for all where they share their positions
    above: float  # at or below this total some row belongs to a shorter tier (a cropped cache)
    upto: float  # beyond this total some row belongs to a longer tier


# GenerationMixin is a base of NativeForCausalLM already. Where it is not named, AutoModel takes the
# class for one from before it existed and loads a copy of it, which cannot be pickled.
class LongRopeForCausalLM(NativeForCausalLM, GenerationMixin):
    _auto_class = "AutoModelForCausalLM"  # makes save_pretrained copy this file (4.57 too)

    def __init__(self, config):
        super().__init__(config)
        _replace_rotary(self.model, getattr(config, "longrope", None))
        self.switch = config.longrope["switch"]
        # Hooks, since each transformers version has another signature of forward, and reads it
        self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.model.register_forward_hook(self._after_forward, with_kwargs=True)

    # ---- does a cache fit the sequence?

    def _tag(self, cache, total: int, lengths: list) -> CacheTag:
        """The tag for a cache that will hold `total` positions, in rows of these lengths."""
        rope = self.model.rotary_emb
        floor = getattr(cache, "longrope_floor", None)
        floors = [0] if floor is None else floor.tolist()
        rows = max(len(lengths), len(floors))
        lengths, floors = _spread(lengths, rows), _spread(floors, rows)
        tiers, above, upto = [], -math.inf, math.inf
        for row in range(rows):
            tier = rope.tier_index(max(lengths[row], floors[row]))
            if tier < len(rope.bounds) - 1:
                upto = min(upto, total + rope.bounds[tier] - lengths[row])
            if tier > rope.tier_index(floors[row]):
                above = max(above, total + rope.bounds[tier - 1] - lengths[row])
            tiers.append(tier)
        return CacheTag(tiers, above, upto)

    def _check(self, cache, past: int, total: int, positions):
        """The tag for `total` positions, and whether the `past` ones in the cache agree with it.
        positions: those of the new tokens, or of all tokens, or None for 0 ... total - 1."""
        lengths = [total] if positions is None else (positions.amax(-1) + 1).tolist()
        tag = self._tag(cache, total, lengths)
        if past == 0:
            return tag, True
        old = getattr(cache, "longrope_tag", None)
        if old is not None:
            tiers = old.tiers
        else:  # filled or rebuilt by others: it should be in the tiers of the lengths it has
            cached = [past] if positions is None else positions[:, past - total].tolist()
            tiers = [self.model.rotary_emb.tier_index(length) for length in cached]
        rows = max(len(tiers), len(tag.tiers))
        return tag, _spread(tiers, rows) == _spread(tag.tiers, rows)

    def _crossing(self, cache, total: int) -> ValueError:
        return ValueError(
            f"The {int(cache.get_seq_length())} positions in this key/value cache were rotated for "
            f"another tier than a sequence of {total} needs (tiers end at "
            f"{self.model.rotary_emb.bounds}), and cached keys cannot be rotated again. Use "
            "model.generate() with the whole sequence as its input, or run the whole sequence with "
            "an empty cache."
        )

    def _before_forward(self, module, args, kwargs):
        given = _by_name(args, kwargs)
        cache = given.get("past_key_values")
        module.rotary_emb.floor = getattr(cache, "longrope_floor", None)
        if torch.compiler.is_compiling():  # generate has checked this step already
            return
        if given.get("cache") is not None:
            raise ValueError(
                "Continuous batching packs several sequences into one row, where their tiers cannot "
                "be told apart. Use model.generate(), or load without trust_remote_code."
            )
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        past = 0 if cache is None else int(cache.get_seq_length())
        total = past + tokens.shape[1]
        longest = module.rotary_emb.bounds[-1]
        if total > longest:
            logger.warning_once(f"{total} positions: the last tier, made for {longest}, is used.")
        tag = getattr(cache, "longrope_tag", None)
        if cache is None or (past and tag is not None and tag.above < total <= tag.upto):
            return
        tag, fits = self._check(cache, past, total, _positions(given))
        if not fits:
            raise self._crossing(cache, total)
        cache.longrope_tag = tag

    def _after_forward(self, module, args, kwargs, output):
        """Tag a cache that this forward made itself."""
        cache = getattr(output, "past_key_values", None)
        if cache is None or torch.compiler.is_compiling() or hasattr(cache, "longrope_tag"):
            return
        total = int(cache.get_seq_length())
        if total:  # gradient checkpointing leaves it empty
            cache.longrope_tag, _ = self._check(cache, 0, total, _positions(_by_name(args, kwargs)))

    # ---- generate

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        """The native one, after emptying a cache whose keys belong to another tier.
        (generate looks for a last parameter with the name `kwargs`.)"""
        if past_key_values is not None:
            inputs_embeds = self._refill_if_crossed(input_ids, past_key_values, attention_mask, inputs_embeds, kwargs)
        # Not super(): Phi3 has its own version, which drops the cache by its own rule
        return GenerationMixin.prepare_inputs_for_generation(
            self,
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _refill_if_crossed(self, input_ids, cache, mask, inputs_embeds, kwargs):
        """Where a row leaves its tier, empty the cache and change kwargs so that all tokens are run.
        Returns inputs_embeds, which is longer then: the prompt's, and those of the new tokens."""
        mask = mask if mask is not None and mask.ndim == 2 else None
        positions = kwargs.get("position_ids")
        embedded = 0 if inputs_embeds is None else inputs_embeds.shape[1]
        # Except for a chunk of a prefill, something that is passed spans the whole sequence
        spans = [t.shape[-1] for t in (input_ids, positions, mask) if t is not None]
        total = max(embedded, *spans)
        tag = getattr(cache, "longrope_tag", None)
        if tag is not None and tag.above < total <= tag.upto:
            return inputs_embeds
        if positions is None or positions.shape[-1] != total:
            positions = torch.arange(total, device=input_ids.device)[None]
            if mask is not None:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if mask is None:  # so there is no padding, and a chunk can be recognised
            total = max(total, int(positions.max()) + 1)
        tag, fits = self._check(cache, int(cache.get_seq_length()), total, positions)
        if fits:
            return inputs_embeds
        new = total - embedded
        if new > input_ids.shape[1]:  # the older tokens are not here
            raise self._crossing(cache, total)
        _empty(cache)
        cache.longrope_tag = tag
        kwargs.pop("next_sequence_length", None)  # 5.x: all of input_ids, not the last one
        if "cache_position" in kwargs:  # 4.x: the same
            kwargs["cache_position"] = torch.arange(total, device=input_ids.device)
        if embedded:
            kwargs["is_first_iteration"] = True  # 5.x looks at inputs_embeds only then
            tail = self.get_input_embeddings()(input_ids[:, input_ids.shape[1] - new :])
            inputs_embeds = torch.cat((inputs_embeds, tail.to(inputs_embeds)), 1)
        return inputs_embeds

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Called by each generate once prompt and budget are known: fix the tier where needed. The
        only private method of transformers that is replaced. Were it not called any more, prefill in
        chunks would raise at a boundary and "upfront" would act like "reprefill"."""
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            return
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if mask is not None and mask.ndim == 2:
            prompt, lengths = mask.shape[1], mask.long().sum(-1)
        elif positions is not None:  # 5.x drops a mask of ones, and always has positions
            prompt, lengths = positions.shape[-1], positions.amax(-1) + 1
        else:
            return
        cache.longrope_floor = None
        if self.switch == "upfront" or generation_mode.value == "assisted_generation":
            cache.longrope_floor = lengths + (max_cache_length + 1 - prompt)
        elif generation_config.prefill_chunk_size is not None:
            cache.longrope_floor = lengths  # the first chunk needs the tier of the whole prompt
        if getattr(cache, "longrope_tag", None) is not None:
            # From an earlier call, maybe with another floor: compare tiers once, not totals
            cache.longrope_tag = cache.longrope_tag._replace(above=math.inf)


def _replace_rotary(decoder, longrope) -> None:
    """Put the tiers where native code rotates; in 4.57 kinds of layers may have modules of their own."""
    kinds = getattr(decoder, "rotary_embs", None)
    native = decoder.rotary_emb if kinds is None else kinds["full_attention"]
    table = getattr(native, "inv_freq", getattr(native, "full_attention_inv_freq", None))
    if table is None:  # Phi-3.5-MoE in 4.57: one table for all rows
        name = NativeForCausalLM.__name__
        raise ImportError(f"modeling_longrope.py needs transformers 5 for {name}; here native code alone can run it.")
    check_longrope(longrope, 2 * table.shape[-1])
    decoder.rotary_emb = rope = TieredRope(longrope)
    for kind in kinds or ():
        kinds[kind] = rope.plain.get(kind, rope)
    if hasattr(decoder, "rotary_emb_local"):
        decoder.rotary_emb_local = rope.plain["sliding_attention"]


def _by_name(args: tuple, kwargs: dict) -> dict:
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _positions(given: dict):
    """The positions in a call of forward, or None for the default. (cache_position: 4.x only.)"""
    if given.get("position_ids") is not None:
        return given["position_ids"]
    cache_position = given.get("cache_position")
    return None if cache_position is None else cache_position[None]


def _spread(values: list, rows: int) -> list:
    return values * rows if len(values) == 1 else values


def _empty(cache) -> None:
    """Empty a cache in place: callers keep the object, and pass it to generate again."""
    for layer in cache.layers:
        if not layer.is_compileable:  # it grows; 4.57 would zero its keys and keep its length
            layer.keys = layer.values = None
            layer.is_initialized = False
    cache.reset()
    if int(cache.get_seq_length()):
        raise RuntimeError(f"{type(cache).__name__} could not be emptied for the next tier")
