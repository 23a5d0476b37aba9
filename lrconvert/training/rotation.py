# SPDX-License-Identifier: Apache-2.0
"""A rotation under trial, in the place of a transformers decoder's own.

Angles are made in float64; only their cos and sin are rounded. Shapes: n tokens, d rotated channels.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from lrconvert.errors import UnsupportedError
from lrconvert.families.layers import FULL, SLIDING
from lrconvert.rope import Tier

TABLE_ROWS = 65536  # positions whose angles are held in float64 at once


class Rotation(Protocol):
    """A factor set with its start tokens and its attention factor; a `rope.Tier` is one."""

    @property
    def factors(self) -> tuple[float, ...]: ...
    @property
    def start_tokens(self) -> int: ...
    @property
    def attention_factor(self) -> float: ...


class TrialRope(nn.Module):
    """cos and sin of `rotation`, for any decoder of transformers. Before one is set, nothing is scaled.

    While a gradient is wanted, `log_factors` (ln λ: float64, [d/2]) takes the place of the factors. Tables are float32
    then and each layer rounds them, so that the gradients of all layers are added in float32.
    """

    def __init__(self, base: float, rotary_dim: int, plain: float | None = None) -> None:
        """`plain`: θ of the layers that slide, where they rotate by themselves."""
        super().__init__()
        self.plain = None if plain is None else TrialRope(plain, rotary_dim)
        self.base, self.rotary_dim = base, rotary_dim
        self.rotation: Rotation = Tier(2, (1.0,) * (rotary_dim // 2))
        self.log_factors: torch.Tensor | None = None

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors [b, n, d] for positions [b, n], which have one row where all rows of x share them; only dtype and
        device of x matter."""
        if layer_type == SLIDING and self.plain is not None:
            return self.plain(x, position_ids)
        given = self.log_factors
        if given is None:
            factors = torch.tensor(self.rotation.factors, dtype=torch.float64, device=x.device)
            dtype = x.dtype
        else:
            factors, dtype = given.exp(), torch.float32
        even = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=x.device)
        plain = self.base ** (-even / self.rotary_dim)
        parts = [self._tables(part, plain, plain / factors, dtype) for part in position_ids.flatten().split(TABLE_ROWS)]
        cos, sin = (torch.cat(tables).unflatten(0, position_ids.shape) for tables in zip(*parts, strict=True))
        # Frequency index i turns the channels i and i + d/2.
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def _tables(
        self, positions: torch.Tensor, plain: torch.Tensor, scaled: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        where = positions.to(torch.float64)[:, None]
        start = self.rotation.start_tokens
        angles = where * (torch.where(where < start, plain, scaled) if start else scaled)
        scale = self.rotation.attention_factor
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def replace_rotation(decoder: Any, rope: TrialRope) -> None:
    """Put `rope` in the place of the decoder's own module; every layer rounds the tables to its own dtype.

    Raises `UnsupportedError` for a decoder without such a module.
    """
    kinds = getattr(decoder, "rotary_embs", None)  # OLMo 3 in transformers 4.57: one for each kind of layer
    if kinds is not None:
        kinds[FULL] = rope
    elif isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
        decoder.rotary_emb = rope
    else:
        raise UnsupportedError(f"{type(decoder).__name__} of transformers has no rotary_emb to replace")
    dtype = next(decoder.parameters()).dtype

    def round_tables(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tables = {name: value for name, value in kwargs.items() if name.startswith("position_embeddings")}
        return args, kwargs | {name: (cos.to(dtype), sin.to(dtype)) for name, (cos, sin) in tables.items()}

    for layer in decoder.layers:
        layer.register_forward_pre_hook(round_tables, with_kwargs=True)
