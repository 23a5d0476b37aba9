# SPDX-License-Identifier: Apache-2.0
"""The reference: a plain decoder in PyTorch, float64 on a CPU, float32 with float64 angles on a GPU.

One sequence at a time, no cache, no batch, nothing fused: every step is a line that can be held against
the papers. Attention is computed in chunks of queries, logits only at the positions wanted, so that 64k
tokens fit a GPU. Weights are read layer by layer and kept while they fit `keep_bytes`.

Shapes: n tokens, c hidden channels, h query heads, g key/value heads, d channels a head, v words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from lrconvert.reference.rotation import FactorSet, Rotation
from lrconvert.reference.routing import gates_of

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model

# Attention scores held at once: 32 MB of float64 stay near a CPU's caches, a GPU wants larger matrices.
MAX_SCORES = {"cpu": 2**22, "cuda": 2**27}
MAX_LOGITS = 2**26
MAX_SCORED = 2**24  # logits held at once where only losses are wanted
KEEP_BYTES = 6 * 2**30


class Reference:
    """What a checkpoint computes under a rotation.

    `stored_dtype` (a safetensors name) rounds the weights to what an artifact stores before they are widened,
    so that the artifact is not blamed for a rounding that the user asked for. `cache` rounds both sides of attention's
    products as a cache of that type does.
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
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self.model, self.shape, self.rotation = model, model.shape, rotation
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float64 if self.device.type == "cpu" else torch.float32)
        self._stored_dtype, self._cache = stored_dtype, cache
        self._kept: dict[tuple[str, int | None, int | None], torch.Tensor] = {}
        self._room = keep_bytes
        self.watch: Callable[[float], None] | None = None  # gets the part of a forward pass that is done

    # --- weights -----------------------------------------------------------------------------------------

    def _weight(self, role: str, layer: int | None = None, expert: int | None = None) -> torch.Tensor:
        tensor = self._maybe(role, layer, expert)
        if tensor is None:
            raise KeyError(f"{self.model.family.name} has no {role} in layer {layer}")
        return tensor

    def _maybe(self, role: str, layer: int | None = None, expert: int | None = None) -> torch.Tensor | None:
        if (role, layer, expert) in self._kept:
            return self._kept[role, layer, expert]
        array = self.model.tensor(role, layer, expert)
        if array is None:
            return None
        if self._stored_dtype is not None:
            from lrconvert.checkpoint.base import numpy_dtype

            array = array.astype(numpy_dtype(self._stored_dtype))
        wide = array.astype(np.float64 if self.dtype == torch.float64 else np.float32)
        tensor = torch.from_numpy(wide).to(self.device)
        size = tensor.numel() * tensor.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[role, layer, expert] = tensor
        return tensor

    def _linear(self, x: torch.Tensor, role: str, layer: int, expert: int | None = None) -> torch.Tensor:
        return functional.linear(x, self._weight(role, layer, expert), self._maybe(f"{role}_bias", layer, expert))

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
    ) -> np.ndarray:
        """Logits of one sequence, float64, shape [len(keep), v].

        `positions` default to 0 … n−1; `length` is the sequence length that chooses the factor set, by
        default the last position plus one, or one length for every token (keys that were cached earlier, when the
        sequence was shorter); `keep` are the indices whose logits are wanted, by default all;
        `forgotten` (count, since): tokens from index `since` on don't see the first `count` ones.
        """
        x = self._hidden(tokens, positions, length, forgotten)
        if keep is not None:
            x = x[torch.as_tensor(np.asarray(keep, dtype=np.int64), device=self.device)]
        parts = [logits.double().cpu() for logits in self._answers(x, MAX_LOGITS)]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the runtime under test shares the GPU with the reference
        return torch.cat(parts).numpy()

    @torch.inference_mode()
    def losses(self, tokens: Sequence[int] | np.ndarray, judged: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the last `judged` of `tokens`: the loss of each in nats (float64), and whether no other token was more
        likely. The sequence's length chooses the factor set."""
        states = self._hidden(tokens, None, None, None)[-judged - 1 : -1]
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

    def _hidden(
        self,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray | None,
        length: int | Sequence[int] | np.ndarray | None,
        forgotten: tuple[int, int] | None,
    ) -> torch.Tensor:
        """What the last layer leaves of every token, [n, c], before the last norm."""
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=self.device)
        where = np.arange(len(ids)) if positions is None else np.asarray(positions, dtype=np.int64)
        lengths = np.broadcast_to(int(where.max()) + 1 if length is None else np.asarray(length), where.shape)
        cos_sin = self._tables(where, lengths)
        times = self.shape.multipliers
        x = self._weight("embedding")[ids] * times.embedding
        for layer in range(self.shape.layers):
            x = x + times.residual * self._attention(self._norm(x, "attention_norm", layer), layer, cos_sin, forgotten)
            x = x + times.residual * self._feed_forward(self._norm(x, "ffn_norm", layer), layer)
            if self.watch is not None:
                self.watch((layer + 1) / self.shape.layers)
        return x

    def _answers(self, x: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
        """Logits [·, v] of hidden states, at most `most` of them at a time."""
        x = self._norm(x, "final_norm", None)
        head = self._weight("embedding") if self.shape.tied else self._weight("lm_head")
        bias = self._maybe("lm_head_bias")
        for part in x.split(max(1, most // head.shape[0])):
            yield functional.linear(part, head, bias) * self.shape.multipliers.logits

    def _tables(self, where: np.ndarray, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every token, of the set for its length."""
        chosen = {length: self.rotation.choose(length) for length in np.unique(lengths).tolist()}
        shape = (len(where), self.rotation.width // 2)
        cos, sin = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        for length, factor_set in chosen.items():
            rows = torch.as_tensor(np.flatnonzero(lengths == length), device=self.device)
            at = torch.as_tensor(where, device=self.device)[rows]
            cos[rows], sin[rows] = self.rotation.tables(at, factor_set, self.dtype)
        return cos, sin

    def _norm(self, x: torch.Tensor, role: str, layer: int | None) -> torch.Tensor:
        if self.shape.norm == "layer":
            x = x - x.mean(dim=-1, keepdim=True)
        mean_square = x.square().mean(dim=-1, keepdim=True)
        x = x * torch.rsqrt(mean_square + self.shape.norm_eps) * self._weight(role, layer)
        bias = self._maybe(f"{role}_bias", layer)
        return x if bias is None else x + bias

    def _feed_forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        if self.shape.experts is None:
            return self._mlp(x, layer)
        gates = gates_of(self._linear(x, "router", layer), self.shape.experts)
        made = torch.zeros_like(x)
        for expert in range(gates.shape[-1]):
            used = gates[:, expert].nonzero()[:, 0]
            if len(used):
                made[used] += gates[used, expert, None] * self._expert(x[used], layer, expert)
        return made

    def _expert(self, x: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
        gate, up = (self._linear(x, role, layer, expert) for role in ("expert_gate", "expert_up"))
        return self._linear(functional.silu(gate) * up, "expert_down", layer, expert)

    def _mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        if ("gate_up", layer) in self.model.roles:
            gate, up = self._linear(x, "gate_up", layer).chunk(2, dim=-1)
        else:
            gate, up = self._linear(x, "gate", layer), self._linear(x, "up", layer)
        return self._linear(functional.silu(gate) * up, "down", layer)

    def _attention(
        self,
        x: torch.Tensor,
        layer: int,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        forgotten: tuple[int, int] | None,
    ) -> torch.Tensor:
        shape, n = self.shape, len(x)
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if ("qkv", layer) in self.model.roles:
            q, k, v = self._linear(x, "qkv", layer).split([q_width, kv_width, kv_width], dim=-1)
        else:
            q, k, v = (self._linear(x, role, layer) for role in ("q", "k", "v"))
        q = q.reshape(n, shape.heads, shape.head_dim).transpose(0, 1)  # [h, n, d]
        k = k.reshape(n, shape.kv_heads, shape.head_dim).transpose(0, 1)  # [g, n, d]
        v = v.reshape(n, shape.kv_heads, shape.head_dim).transpose(0, 1)
        if ("q_norm", layer) in self.model.roles:
            q, k = self._norm(q, "q_norm", layer), self._norm(k, "k_norm", layer)
        q, k = self.rotation.rotate(q, *cos_sin), self.rotation.rotate(k, *cos_sin)
        q, k, v = self._as_cached(q), self._as_cached(k), self._as_cached(v)
        reach = shape.sliding[layer] if shape.sliding else 0
        mixed = self._attend(q, k, v, forgotten, reach).transpose(0, 1).reshape(n, q_width)
        return self._linear(mixed, "o", layer)

    def _as_cached(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded to the type of the cache: what is kept in it, and what is multiplied with that."""
        return x if self._cache is None else x.to(self._cache).to(self.dtype)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forgotten: tuple[int, int] | None, reach: int
    ) -> torch.Tensor:
        """Causal softmax attention, a chunk of queries at a time; query head j reads key head j // (h/g). A token sees
        the last `reach` tokens, itself included; all where that is 0."""
        heads, n, width = q.shape
        groups = len(k)
        q, k, v = q * (self.shape.multipliers.attention / width**0.5), k.transpose(1, 2).contiguous(), v.contiguous()
        out = torch.empty_like(q)
        rows = max(1, min(n, MAX_SCORES.get(q.device.type, 2**22) // (heads * n)))
        for start in range(0, n, rows):
            end = min(start + rows, n)
            grouped = q[:, start:end].reshape(groups, (heads // groups) * (end - start), width)
            scores = (grouped @ k[:, :, :end]).reshape(heads, end - start, end)
            future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
            scores[:, :, start:].masked_fill_(future, float("-inf"))
            if reach:
                own, other = (torch.arange(*ends, device=q.device) for ends in ((start, end), (0, end)))
                scores.masked_fill_(own[:, None] - other >= reach, float("-inf"))
            if forgotten is not None and end > forgotten[1]:
                scores[:, max(forgotten[1] - start, 0) :, : forgotten[0]] = float("-inf")
            weights = self._as_cached(torch.softmax(scores, dim=-1))
            mixed = weights.reshape(groups, -1, end) @ v[:, :end]
            out[:, start:end] = mixed.reshape(heads, end - start, width)
        return out


__all__ = ["FactorSet", "Reference", "Rotation"]
