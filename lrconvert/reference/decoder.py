# SPDX-License-Identifier: Apache-2.0
"""The reference: a plain decoder in PyTorch, float64 on a CPU, float32 with float64 angles on a GPU.

One sequence at a time, no batch, nothing fused: every step is a line that can be held against the papers. Keys and
values of a sequence are kept where that was asked for, and used where another begins with the same tokens under the
same rotation (`prefix`). Attention is computed in chunks of queries, logits only at the positions wanted, so that 64k
tokens fit a GPU. Weights are read layer by layer and kept while there is room (`weights`).

Shapes: n tokens, c hidden channels, h query heads, g key/value heads, d channels a head, v words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from lrconvert.machine import release_freed
from lrconvert.reference.prefix import Layer, Prefixes, Read
from lrconvert.reference.rotation import FactorSet, Rotation
from lrconvert.reference.routing import gates_of
from lrconvert.reference.weights import Weights

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [n, rotated channels / 2] each
# Attention scores held at once: 32 MB of float64 stay near a CPU's caches. A GPU wants larger matrices: a part of its
# memory in float32, 2.2 GB of an H200's.
MAX_SCORES, SCORES_PART = 2**22, 1 / 64
MAX_LOGITS = 2**26
MAX_FED = 2**12  # tokens in a feed-forward network at once: 0.7 GB of a 7B's float32, where 256k tokens are 45 GB
MAX_SCORED = 2**24  # logits held at once where only losses are wanted
# Keys and values of sequences that are kept between passes; on a GPU, a part of its memory.
PREFIX_BYTES, PREFIX_PART = 2**30, 1 / 4


class Reference:
    """What a checkpoint computes under a rotation.

    `weights` are those of another reference over the same model, to be read once for both; without them, `stored_dtype`
    and `keep_bytes` make some, as `Weights` says. `cache` rounds both sides of attention's products as a cache of that
    type does; `activation_block` what weights are multiplied with, as programs that multiply integers do: to 8 bits, so
    many channels with one scale (0: not at all). `results` rounds all that is computed to that type, step by step.
    """

    def __init__(
        self,
        model: Model,
        rotation: Rotation,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        stored_dtype: str | None = None,
        cache: torch.dtype | None = None,
        activation_block: int = 0,
        results: torch.dtype | None = None,
        keep_bytes: int | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.model, self.shape, self.rotation = model, model.shape, rotation
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float64 if self.device.type == "cpu" else torch.float32)
        self.weights = weights or Weights(model, self.device, stored_dtype, keep_bytes)
        self._block, self._results = activation_block, results
        self._cache = results if cache is None else cache
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(self.device).total_memory if on_gpu else 0
        self._prefixes = Prefixes(int(memory * PREFIX_PART) if on_gpu else PREFIX_BYTES)
        self._scores = int(memory * SCORES_PART) // 4 if on_gpu else MAX_SCORES
        self.watch: Callable[[float], None] | None = None  # gets the part of a forward pass that is done

    # --- weights -----------------------------------------------------------------------------------------

    def _weight(self, role: str, layer: int | None = None, expert: int | None = None) -> torch.Tensor:
        tensor = self._maybe(role, layer, expert)
        if tensor is None:
            raise KeyError(f"{self.model.family.name} has no {role} in layer {layer}")
        return tensor

    def _maybe(self, role: str, layer: int | None = None, expert: int | None = None) -> torch.Tensor | None:
        return self.weights.get((role, layer, expert), self.dtype)

    def _embedded(self, ids: np.ndarray) -> torch.Tensor:
        rows = self.weights.get(("embedding", None, None), self.dtype, torch.as_tensor(ids, device=self.device))
        assert rows is not None
        return rows

    def _linear(self, x: torch.Tensor, role: str, layer: int, expert: int | None = None) -> torch.Tensor:
        weight, bias = self._weight(role, layer, expert), self._maybe(f"{role}_bias", layer, expert)
        return self._made(functional.linear(self._multiplied(x), weight, bias))

    def _made(self, x: torch.Tensor) -> torch.Tensor:
        """A result of a step, as it is written down."""
        return _rounded(x, self._results)

    def _multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, c] as products see it. Where they see 8 bits, the largest value of a block of channels is 127 steps."""
        if not self._block:
            return x
        n, channels = x.shape
        blocks = functional.pad(x, (0, -channels % self._block)).reshape(n, -1, self._block)
        step = blocks.abs().amax(dim=-1, keepdim=True) / 127
        rounded = torch.where(step > 0, blocks / step, 0.0).round() * step
        return rounded.reshape(n, -1)[:, :channels]

    # --- the decoder -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(
        self,
        tokens: Sequence[int] | np.ndarray,
        *,
        positions: Sequence[int] | np.ndarray | None = None,
        length: int | Sequence[int] | np.ndarray | None = None,
        keep: Sequence[int] | np.ndarray | None = None,
        forgotten: tuple[int, int] | None = None,
        remember: bool = False,
    ) -> np.ndarray:
        """Logits of one sequence, float64, shape [len(keep), v].

        `positions` default to 0 … n−1; `length` is the sequence length that chooses the factor set, by
        default the last position plus one, or one length for every token (keys that were cached earlier, when the
        sequence was shorter); `keep` are the indices whose logits are wanted, by default all;
        `forgotten` (count, since): tokens from index `since` on don't see the first `count` ones, and are so much
        nearer to the start, which changes no distance; `remember`: other sequences will begin as this one does.
        """
        wanted = np.arange(len(tokens)) if keep is None else np.asarray(keep, dtype=np.int64)
        x = self._hidden(tokens, wanted, positions, length, forgotten, remember=remember)
        parts = [logits.double().cpu() for logits in self._answers(x, MAX_LOGITS)]
        self._release()
        return torch.cat(parts).numpy()

    @torch.inference_mode()
    def losses(self, tokens: Sequence[int] | np.ndarray, judged: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the last `judged` of `tokens`: the loss of each in nats (float64), and whether no other token was more
        likely. The sequence's length chooses the factor set."""
        states = self._hidden(tokens, np.arange(len(tokens) - judged - 1, len(tokens) - 1))
        targets = torch.as_tensor(np.asarray(tokens, dtype=np.int64)[-judged:], device=self.device)
        losses, preferred = [], []
        done = 0
        for logits in self._answers(states, MAX_SCORED):
            wanted = targets[done : done + len(logits)]
            done += len(logits)
            chosen = logits.gather(1, wanted[:, None])[:, 0]
            losses.append((torch.logsumexp(logits, dim=-1) - chosen).double().cpu())
            preferred.append((logits.argmax(dim=-1) == wanted).cpu())
        return torch.cat(losses).numpy(), torch.cat(preferred).numpy()

    def _release(self) -> None:
        """What a pass has freed goes back: the runtime under test needs it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            release_freed()

    def _hidden(
        self,
        tokens: Sequence[int] | np.ndarray,
        wanted: np.ndarray,
        positions: Sequence[int] | np.ndarray | None = None,
        length: int | Sequence[int] | np.ndarray | None = None,
        forgotten: tuple[int, int] | None = None,
        *,
        remember: bool = False,
    ) -> torch.Tensor:
        """What the last layer leaves of the tokens at the indices `wanted`, [len(wanted), c], before the last norm. The
        other tokens are only attended to there; those that an earlier pass has read are not read again."""
        ids = np.asarray(tokens, dtype=np.int64)
        where = np.arange(len(ids)) if positions is None else np.asarray(positions, dtype=np.int64)
        lengths = np.broadcast_to(int(where.max()) + 1 if length is None else np.asarray(length), where.shape)
        past, layers, made = 0, list[Layer](), list[Layer]()  # what was read, and what is now
        read = self._read(ids, where, lengths) if forgotten is None else None
        if read is not None:
            past, layers = self._prefixes.longest(read)
            past = min(past, int(wanted.min(initial=len(ids))))
        turns = {self.shape.turn(layer) for layer in range(self.shape.layers)}
        tables = {turn: self._tables(turn, where[past:], lengths[past:]) for turn in turns}
        nearer = where if forgotten is None else where - forgotten[0] * (np.arange(len(ids)) >= forgotten[1])
        times, grown = self.shape.multipliers, self._query_scale(nearer[past:])
        x = self._embedded(ids[past:]) * times.embedding
        for layer in range(self.shape.layers):
            before = (layers[layer][0][:, :past], layers[layer][1][:, :past]) if past else None
            normed, cos_sin = self._normed(x, "attention_norm", layer), tables[self.shape.turn(layer)]
            asked = torch.as_tensor(wanted - past, device=self.device) if layer == self.shape.layers - 1 else None
            mixed, seen = self._attention(normed, layer, cos_sin, forgotten, before, asked, grown)
            added = self._normed(mixed, "attention_post_norm", layer)
            x = self._made((x if asked is None else x[asked]) + times.residual * added)
            if remember and past < len(ids) // 2:  # most of it is new
                made.append((seen[0].contiguous(), seen[1].contiguous()))
            made_of = self._feed_forward(self._normed(x, "ffn_norm", layer), layer)
            x = self._made(x + times.residual * self._normed(made_of, "ffn_post_norm", layer))
            if self.watch is not None:
                self.watch((layer + 1) / self.shape.layers)
        if made and read is not None:
            self._prefixes.keep(read, made)
        return x

    def _read(self, ids: np.ndarray, where: np.ndarray, lengths: np.ndarray) -> Read:
        """A sequence for comparison with others."""
        turned, rotation = np.empty(len(ids), np.int64), self.rotation
        for length in np.unique(lengths).tolist():
            exact = (rotation.theta, rotation.width, rotation.angles, rotation.choose(length))
            turned[lengths == length] = self._prefixes.number(exact)
        return Read(ids, where, turned)

    def _answers(self, x: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
        """Logits [·, v] of hidden states, at most `most` of them at a time."""
        x = self._multiplied(self._norm(x, "final_norm", None))
        head = self._weight("embedding") if self.shape.tied else self._weight("lm_head")
        bias = self._maybe("lm_head_bias")
        for part in x.split(max(1, most // head.shape[0])):
            logits = self._made(functional.linear(part, head, bias)) * self.shape.multipliers.logits
            yield _capped(logits, self.shape.logits_cap)

    def _tables(self, turn: float | None, where: np.ndarray, lengths: np.ndarray) -> Tables | None:
        """cos and sin of every token, of the set for its length; of layers with a θ of their own (`turn`) of that.
        None for those that don't rotate."""
        if turn == 0.0:
            return None
        rotation = self.rotation if turn is None else self.rotation.plain(turn)
        chosen = {length: rotation.choose(length) for length in np.unique(lengths).tolist()}
        shape = (len(where), rotation.width // 2)
        cos, sin = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        for length, factor_set in chosen.items():
            rows = torch.as_tensor(np.flatnonzero(lengths == length), device=self.device)
            at = torch.as_tensor(where, device=self.device)[rows]
            cos[rows], sin[rows] = rotation.tables(at, factor_set, self.dtype)
        return self._made(cos), self._made(sin)

    def _query_scale(self, where: np.ndarray) -> torch.Tensor | None:
        """What the query at each position is multiplied with, [n, 1]: 1 + β ln(1 + ⌊p / L⌋). None where all are 1."""
        scale = self.shape.query_scale
        if scale is None:
            return None
        windows = torch.as_tensor(where // scale.window, dtype=torch.float64)
        found = 1.0 + scale.growth * torch.log1p(windows)
        return self._made(found.to(device=self.device, dtype=self.dtype)[:, None])

    def _normed(self, x: torch.Tensor, role: str, layer: int) -> torch.Tensor:
        """x through a norm that not every family has."""
        return self._norm(x, role, layer) if (role, layer) in self.model.roles else x

    def _norm(self, x: torch.Tensor, role: str, layer: int | None) -> torch.Tensor:
        if self.shape.norm == "layer":
            x = x - x.mean(dim=-1, keepdim=True)
        mean_square = x.square().mean(dim=-1, keepdim=True)
        weight = self._weight(role, layer) + self.shape.norm_offset
        x = x * torch.rsqrt(mean_square + self.shape.norm_eps) * weight
        bias = self._maybe(f"{role}_bias", layer)
        return self._made(x if bias is None else x + bias)

    def _feed_forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """Tokens don't see each other here, so a part of them at a time."""
        one = self._mlp if self.shape.experts is None else self._mixture
        return torch.cat([one(part, layer) for part in x.split(MAX_FED)])

    def _mixture(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        assert self.shape.experts is not None
        gates = gates_of(self._linear(x, "router", layer), self.shape.experts)
        made = torch.zeros_like(x)
        for expert in range(gates.shape[-1]):
            used = gates[:, expert].nonzero()[:, 0]
            if len(used):
                made[used] += gates[used, expert, None] * self._expert(x[used], layer, expert)
        if self.shape.experts.shared:
            gate, up = self._linear(x, "shared_gate", layer), self._linear(x, "shared_up", layer)
            own = self._linear(self._made(self._activated(gate) * up), "shared_down", layer)
            made += torch.sigmoid(self._linear(x, "shared_router", layer)) * own
        return self._made(made)

    def _expert(self, x: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
        gate, up = (self._linear(x, role, layer, expert) for role in ("expert_gate", "expert_up"))
        return self._linear(self._made(self._activated(gate) * up), "expert_down", layer, expert)

    def _activated(self, gate: torch.Tensor) -> torch.Tensor:
        if self.shape.activation == "gelu_tanh":
            return functional.gelu(gate, approximate="tanh")
        return functional.silu(gate)

    def _mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        if ("gate_up", layer) in self.model.roles:
            gate, up = self._linear(x, "gate_up", layer).chunk(2, dim=-1)
        else:
            gate, up = self._linear(x, "gate", layer), self._linear(x, "up", layer)
        return self._linear(self._made(self._activated(gate) * up), "down", layer)

    def _attention(
        self,
        x: torch.Tensor,
        layer: int,
        cos_sin: Tables | None,
        forgotten: tuple[int, int] | None,
        before: Layer | None,
        asked: torch.Tensor | None,
        grown: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Layer]:
        """What tokens [n, c] take from those `before` and each other, and keys and values of all of them. `asked`:
        indices of the tokens that take something, all of them by default. `grown`: what queries are multiplied with."""
        shape, n = self.shape, len(x)
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if ("qkv", layer) in self.model.roles:
            q, k, v = self._linear(x, "qkv", layer).split([q_width, kv_width, kv_width], dim=-1)
        else:
            q, k, v = (self._linear(x, role, layer) for role in ("q", "k", "v"))
        whole = self.model.family.whole_qk_norms
        if whole:
            q, k = self._norm(q, "q_norm", layer), self._norm(k, "k_norm", layer)
        q = q.reshape(n, shape.heads, shape.head_dim).transpose(0, 1)  # [h, n, d]
        k = k.reshape(n, shape.kv_heads, shape.head_dim).transpose(0, 1)  # [g, n, d]
        v = v.reshape(n, shape.kv_heads, shape.head_dim).transpose(0, 1)
        if not whole:
            q, k = self._normed(q, "q_norm", layer), self._normed(k, "k_norm", layer)
        if cos_sin is not None:
            q, k = (self.rotation.rotate(part, *cos_sin, neighbours=shape.neighbours) for part in (q, k))
        if grown is not None:
            q = self._made(q * grown)
        q, k, v = self._as_cached(q), self._as_cached(k), self._as_cached(v)
        asked = torch.arange(n, device=self.device) if asked is None else asked
        own, q = asked, q[:, asked]
        if before is not None:
            own = asked + before[0].shape[1]
            k, v = torch.cat([before[0], k], dim=1), torch.cat([before[1], v], dim=1)
        reach = shape.sliding[layer] if shape.sliding else 0
        mixed = self._made(self._attend(q, k, v, own, forgotten, reach)).transpose(0, 1).reshape(len(own), q_width)
        return self._linear(mixed, "o", layer), (k, v)

    def _as_cached(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded to the type of the cache: what is kept in it, and what is multiplied with that."""
        return _rounded(x, self._cache)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        own: torch.Tensor,
        forgotten: tuple[int, int] | None,
        reach: int,
    ) -> torch.Tensor:
        """Causal softmax attention, a chunk of queries at a time; query head j reads key head j // (h/g). `own` are the
        indices of the queries among the keys. A token sees the last `reach` tokens, itself included; all where that is
        0."""
        heads, n, width = q.shape
        groups = len(k)
        q, k, v = q * (self.shape.multipliers.attention / width**0.5), k.transpose(1, 2).contiguous(), v.contiguous()
        out, everyone = torch.empty_like(q), torch.arange(k.shape[2], device=q.device)
        rows = max(1, min(n, self._scores // (heads * len(everyone))))
        for start in range(0, n, rows):
            at = own[start : start + rows, None]
            seen = int(at.max()) + 1
            grouped = q[:, start : start + rows].reshape(groups, (heads // groups) * len(at), width)
            scores = (grouped @ k[:, :, :seen]).reshape(heads, len(at), seen)
            key = everyone[:seen]
            hidden = key > at
            if reach:
                hidden |= at - key >= reach
            if forgotten is not None:
                hidden |= (at >= forgotten[1]) & (key < forgotten[0])
            weights = self._as_cached(torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1))
            mixed = weights.reshape(groups, -1, seen) @ v[:, :seen]
            out[:, start : start + rows] = mixed.reshape(heads, len(at), width)
        return out


def _rounded(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


def _capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Within ±`cap`, bent softly; as it is where that is 0."""
    return x if cap == 0.0 else cap * torch.tanh(x / cap)


__all__ = ["FactorSet", "Reference", "Rotation"]
