# SPDX-License-Identifier: Apache-2.0
"""LongRoPE for transformers: a native decoder with another rotary embedding and an exact `generate`.

This file ships inside the checkpoint it belongs to and runs with `trust_remote_code=True`. It needs
torch and transformers (4.57 to 5.x) only; it opens no file and no connection. Its data is the
`longrope` key of config.json:

    {"version": 1, "rope_theta": 10000.0, "rotary_dim": 64, "switch": "reprefill",
     "tiers": [{"max_length": 4096, "factors": [32 numbers], "start_tokens": 0,
                "attention_factor": 1.0}, ...]}                      ordered by max_length

A sequence of n tokens is rotated with the first tier whose max_length is at least n (with the last
tier, and a warning, when there is none). With base theta, the angle of position p at frequency index
i is  p * theta**(-2i/rotary_dim) / factors[i],  not divided where p < start_tokens; cosine and sine
are both multiplied by the attention factor.

So keys that were rotated and cached in one tier are wrong in the next: in every layer but the first
they come from hidden states that were themselves made with the old tier, and rotating them again
does not repair that. `switch` says what `generate` does about it:

    "reprefill"  when a row crosses into another tier, the cache is emptied and the whole sequence is
                 run again. What is computed at each length equals a full forward pass at that length.
    "upfront"    the tier is that of prompt + new tokens, from the first token on: never runs twice,
                 but the output can depend on max_new_tokens. Assisted and prompt-lookup decoding
                 always work this way, since they take tokens back. Needs a cache.

A hand-written loop that carries a cache into another tier gets a ValueError, not a wrong answer.
The code that checks it is skipped inside torch.compile; `generate` with a compiled step is safe.
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
            f"config.json: longrope is {found}; modeling_longrope.py reads its tiers there, version 1. "
            "Take config.json and modeling_longrope.py from one artifact, or load without "
            "trust_remote_code for what the native model can do."
        )

    def is_number(value):
        return type(value) in (int, float) and math.isfinite(value)

    wrong = []

    def need(where, value, good, what):
        if not good:
            wrong.append(f"{where} is {repr(value)[:60]}, needed: {what}")

    theta, dim, switch = (longrope.get(key) for key in ("rope_theta", "rotary_dim", "switch"))
    need("rope_theta", theta, is_number(theta) and theta > 0, "a number above 0")
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
        good = is_number(scale) and scale > 0
        need(f"tiers[{k}].attention_factor", scale, good, "a number above 0")
        factors = tier.get("factors")
        good = isinstance(factors, list) and all(is_number(f) and f > 0 for f in factors)
        what = f"{native_rotary_dim // 2} numbers above 0"
        need(f"tiers[{k}].factors", factors, good and 2 * len(factors) == native_rotary_dim, what)
    if wrong:
        raise ValueError("config.json: longrope: " + "; ".join(wrong))


class TieredRope(nn.Module):
    """cos and sin of every position, in the tier that the length of its row asks for.

    No buffers and no parameters, on purpose: transformers 5 builds models on the meta device and then
    leaves foreign non-persistent buffers uninitialised, and `.bfloat16()` would round them. The
    numbers are Python floats until the first forward on a device. Angles are made in float64, since
    a float32 angle is off by 6e-2 rad at position 2M; only cos and sin are rounded, to x's dtype.
    """

    def __init__(self, longrope: dict):
        super().__init__()
        self.rope_theta = longrope["rope_theta"]
        self.rotary_dim = longrope["rotary_dim"]
        self.tiers = longrope["tiers"]
        self.bounds = [tier["max_length"] for tier in self.tiers]
        # Rows are treated as at least this long: a tensor (rows,), or None. Set before each forward.
        self.floor = None
        self._tables = {}

    def tier_index(self, length: int) -> int:
        """The tier for a sequence of `length` tokens."""
        return min(bisect_left(self.bounds, length), len(self.bounds) - 1)

    def _tables_on(self, device: torch.device):
        tables = self._tables.get(device)
        if tables is None:
            inverse = [self.rope_theta ** (-i / self.rotary_dim) for i in range(0, self.rotary_dim, 2)]
            rows = [[f / x for f, x in zip(inverse, tier["factors"])] for tier in self.tiers]
            with torch.inference_mode(False):  # the tables outlive the mode of the first caller
                kwargs = {"device": device, "dtype": torch.float64}
                tables = (
                    torch.tensor(self.bounds[:-1], device=device, dtype=torch.long),
                    torch.tensor(inverse, **kwargs),
                    torch.tensor(rows, **kwargs),
                    torch.tensor([tier["start_tokens"] for tier in self.tiers], device=device),
                    torch.tensor([tier["attention_factor"] for tier in self.tiers], **kwargs),
                )
            if not torch.compiler.is_compiling():  # what a tracer makes must not be kept
                self._tables[device] = tables
        return tables

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor):
        """x: only its dtype and device count. position_ids: (rows, positions). Reads no value back
        from the device, so that it can be traced and never makes a GPU wait."""
        # Apple's MPS has no float64
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        bounds, inverse, rescaled, start_tokens, attention_factor = self._tables_on(device)
        positions = position_ids.to(device)
        lengths = positions.amax(-1) + 1
        if self.floor is not None:
            lengths = torch.maximum(lengths, self.floor.to(device))
        tier = torch.bucketize(lengths, bounds)  # the first whose bound is >= length, else the last
        rates = rescaled[tier][:, None]
        if any(t["start_tokens"] for t in self.tiers):
            unscaled = positions < start_tokens[tier][:, None]
            rates = torch.where(unscaled[..., None], inverse, rates)
        angles = positions[..., None] * rates
        scale = attention_factor[tier][:, None, None]
        cos, sin = angles.cos() * scale, angles.sin() * scale
        # frequency index i turns the channels i and i + rotary_dim / 2
        return tuple(torch.cat((t, t), -1).to(device=x.device, dtype=x.dtype) for t in (cos, sin))


class CacheTag(NamedTuple):
    """Kept on a cache: what its keys were rotated with, and up to where they are good.

    "Total" counts what is in the cache plus what comes now, padding included. Each row grows by one
    when the total does, so two integers say for all rows whether a tier is left, without asking the
    device. Padding inside a row breaks that, but only towards asking in vain.
    """

    tiers: list  # a tier index per row; a single one where all rows share their positions
    above: float  # at this total or below, some row belongs to a shorter tier (a cropped cache)
    upto: float  # beyond this total, some row belongs to a longer tier


class LongRopeForCausalLM(NativeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        longrope = getattr(config, "longrope", None)
        check_longrope(longrope, 2 * self.model.rotary_emb.inv_freq.shape[-1])
        self.switch = longrope["switch"]
        self.model.rotary_emb = TieredRope(longrope)
        # Hooks, because the signature of forward is another one in each transformers version, and
        # `generate` reads it.
        self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.model.register_forward_hook(self._after_forward, with_kwargs=True)

    # ---- which tier the keys in a cache belong to

    def _tag(self, cache, total: int, lengths: list) -> CacheTag:
        """The tag of a cache that will hold `total` positions, with rows of these lengths."""
        rope = self.model.rotary_emb
        floor = getattr(cache, "longrope_floor", None)
        floors = [0] if floor is None else floor.tolist()
        rows = max(len(lengths), len(floors))
        tiers, above, upto = [], -math.inf, math.inf
        for length, least in zip(_spread(lengths, rows), _spread(floors, rows)):
            tier = rope.tier_index(max(length, least))
            if tier < len(rope.bounds) - 1:
                upto = min(upto, total + rope.bounds[tier] - length)
            if tier > rope.tier_index(least):
                above = max(above, total + rope.bounds[tier - 1] - length)
            tiers.append(tier)
        return CacheTag(tiers, above, upto)

    def _check(self, cache, past: int, total: int, positions):
        """(tag for `total` positions, whether the `past` ones in the cache were made with its tiers).

        positions: those of the new tokens, or of all tokens, or None for 0 ... total - 1."""
        lengths = [total] if positions is None else (positions.amax(-1) + 1).tolist()
        tag = self._tag(cache, total, lengths)
        if past == 0:
            return tag, True
        old = getattr(cache, "longrope_tag", None)
        if old is not None:
            tiers = old.tiers
        else:  # filled or rebuilt by others: assume the tier of the length that each row has
            first_new = past - total if past < total else 0
            started = [past] if positions is None else positions[:, first_new].tolist()
            tiers = [self.model.rotary_emb.tier_index(length) for length in started]
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
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
        given = {**dict(zip(names, args)), **kwargs}
        cache = given.get("past_key_values")
        module.rotary_emb.floor = getattr(cache, "longrope_floor", None)
        if torch.compiler.is_compiling():  # generate has checked this step already
            return
        if given.get("cache") is not None:
            raise ValueError(
                "Continuous batching packs several sequences into one row, where tiers cannot be told "
                "apart. Use model.generate(), or load without trust_remote_code."
            )
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        past = 0 if cache is None else int(cache.get_seq_length())
        total = past + tokens.shape[1]
        if total > module.rotary_emb.bounds[-1]:
            logger.warning_once(
                f"{total} positions: the longest tier was made for {module.rotary_emb.bounds[-1]}, "
                "and is used beyond it."
            )
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
        if total:  # 0: a training step with gradient checkpointing leaves it empty
            given = {**dict(zip(("input_ids", "attention_mask", "position_ids"), args)), **kwargs}
            cache.longrope_tag = self._check(cache, 0, total, _positions(given))[0]

    # ---- generate

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        """The native one, after emptying a cache whose keys belong to another tier.

        (The last parameter must be named `kwargs`: generate looks for that name.)
        """
        cache = past_key_values
        if cache is not None:
            mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            positions = kwargs.get("position_ids")
            # Every call but a chunk of a prefill brings something that spans the whole sequence
            spans = [t.shape[-1] for t in (input_ids, positions, mask) if t is not None]
            if inputs_embeds is not None:
                spans.append(inputs_embeds.shape[1])
            total = max(spans)
            tag = getattr(cache, "longrope_tag", None)
            if tag is None or not tag.above < total <= tag.upto:
                if positions is None or positions.shape[-1] != total:
                    positions = torch.arange(total, device=input_ids.device)[None]
                    if mask is not None:
                        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                tag, fits = self._check(cache, int(cache.get_seq_length()), total, positions)
                if not fits:
                    new = total - (0 if inputs_embeds is None else inputs_embeds.shape[1])
                    if new > input_ids.shape[1]:  # only the new tokens were passed
                        raise self._crossing(cache, total)
                    _empty(cache)
                    cache.longrope_tag = tag
                    kwargs["position_ids"] = positions
                    if inputs_embeds is not None:  # the prompt; what came after it has token ids
                        tail = input_ids[:, input_ids.shape[1] - new :]
                        tail = self.get_input_embeddings()(tail).to(inputs_embeds)
                        inputs_embeds = torch.cat((inputs_embeds, tail), 1)
                        kwargs["is_first_iteration"] = True  # 5.x looks at inputs_embeds only then
                    kwargs.pop("next_sequence_length", None)  # 5.x: take all of input_ids
                    if "cache_position" in kwargs:  # 4.x
                        kwargs["cache_position"] = torch.arange(total, device=input_ids.device)
        # Not super(): Phi3's own version would drop the cache by its own rule, in which padding counts
        return GenerationMixin.prepare_inputs_for_generation(
            self,
            input_ids,
            past_key_values=cache,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Called once by every generate, when prompt and budget are known: fix tiers where needed.

        The one private method of transformers that is overridden. Were it no longer called, prefill
        in chunks would raise at a boundary, and "upfront" would behave like "reprefill".
        """
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            return
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if mask is not None and mask.ndim == 2:
            slots, lengths = mask.shape[1], mask.sum(-1)
        elif positions is not None:
            slots, lengths = positions.shape[-1], positions.amax(-1) + 1
        else:
            return
        cache.longrope_floor = None
        if self.switch == "upfront" or generation_mode.value == "assisted_generation":
            cache.longrope_floor = lengths + (max_cache_length + 1 - slots)
        elif generation_config.prefill_chunk_size is not None:
            cache.longrope_floor = lengths  # the first chunk needs the tier of the whole prompt
        tag = getattr(cache, "longrope_tag", None)
        if tag is not None:  # it comes from an earlier call: compare tiers, not totals, once
            cache.longrope_tag = tag._replace(above=math.inf)


def _positions(given: dict):
    """The positions of a forward call, or None for the default. (cache_position: 4.x only.)"""
    if given.get("position_ids") is not None:
        return given["position_ids"]
    cache_position = given.get("cache_position")
    return None if cache_position is None else cache_position[None]


def _spread(values: list, rows: int) -> list:
    return values * rows if len(values) == 1 else values


def _empty(cache) -> None:
    """Empty a cache in place: callers keep the object, and pass it to generate again."""
    for layer in cache.layers:
        if not layer.is_compileable:  # it grows; 4.57 would keep its length and only zero the keys
            layer.keys = layer.values = None
            layer.is_initialized = False
    cache.reset()
    if int(cache.get_seq_length()):
        raise RuntimeError(f"{type(cache).__name__} could not be emptied for the next tier")
