# SPDX-License-Identifier: Apache-2.0
"""The model of a search: transformers' own class with our rotation in it.

Every family comes with its own decoder; what is replaced is the module that makes cos and sin. Angles are made in
float64 and only their cos and sin are rounded.

Shapes: n tokens, d rotated channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lrconvert.errors import UnsupportedError
from lrconvert.rope import Tier

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model

TABLE_ROWS = 65536  # positions whose angles are held in float64 at once


class Rotation(Protocol):
    """What is tried: a factor set with its start tokens and its attention factor."""

    @property
    def factors(self) -> tuple[float, ...]: ...
    @property
    def start_tokens(self) -> int: ...
    @property
    def attention_factor(self) -> float: ...


class TrialRope(nn.Module):
    """cos and sin of the candidate that is set, for any decoder of transformers.

    `log_factors` (float64, [d/2]) stands for the factors while a gradient is wanted; tables are float32 then, and are
    rounded where each layer reads them, so that the layers' gradients add up in float32.
    """

    def __init__(self, base: float, rotary_dim: int) -> None:
        super().__init__()
        self.base, self.rotary_dim = base, rotary_dim
        self.candidate: Rotation = Tier(2, (1.0,) * (rotary_dim // 2))
        self.log_factors: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x only dtype and device count; all rows share their positions. Two tensors [1, n, d]."""
        given = self.log_factors
        if given is None:
            factors = torch.tensor(self.candidate.factors, dtype=torch.float64, device=x.device)
            dtype = x.dtype
        else:
            factors, dtype = given.exp(), torch.float32
        even = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=x.device)
        plain = self.base ** (-even / self.rotary_dim)
        parts = [self._tables(part, plain, plain / factors, dtype) for part in position_ids[0].split(TABLE_ROWS)]
        cos, sin = (torch.cat(tables) for tables in zip(*parts, strict=True))
        # Frequency index i turns the channels i and i + d/2.
        return torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]

    def _tables(
        self, positions: torch.Tensor, plain: torch.Tensor, scaled: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        where = positions.to(torch.float64)[:, None]
        start = self.candidate.start_tokens
        angles = where * (torch.where(where < start, plain, scaled) if start else scaled)
        scale = self.candidate.attention_factor
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def load_network(model: Model, dtype: torch.dtype) -> Any:
    """The model as transformers' own class. A folder is loaded by transformers; the tensors of a GGUF file and of a
    merged adapter, which our own reader makes, are put into a model made from the config."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoint = model.checkpoint
    config = _full_attention(transformers.AutoConfig.for_model(**_plain_rope(checkpoint.config)))
    kind = transformers.AutoModelForCausalLM
    if checkpoint.native and not checkpoint.touched:
        return kind.from_pretrained(str(checkpoint.path), config=config, dtype=dtype, attn_implementation="sdpa")
    network = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    weights = {
        name: torch.from_numpy(checkpoint.read(name).astype(np.float32)).to(dtype) for name in checkpoint.tensors
    }
    missing, unexpected = network.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if model.shape.tied else set()
    if set(missing) - tied or unexpected:
        raise UnsupportedError(f"{model.reference}: transformers has other tensors: {missing}, {unexpected}")
    network.tie_weights()
    return network


def _plain_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A config without scaling: the rotation is ours, and a broken one would only stop transformers from loading."""
    kept = {key: value for key, value in config.items() if key not in ("rope_scaling", "auto_map")}
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = section.get("rope_theta", config.get("rope_theta"))
    parameters = {"rope_type": "default", **({"rope_theta": theta} if theta else {})}
    partial = section.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial:
        parameters["partial_rotary_factor"] = kept["partial_rotary_factor"] = partial
    if theta:
        kept["rope_theta"] = theta
    return {**kept, "rope_parameters": parameters}


def _full_attention(config: Any) -> Any:
    """Every layer attends to everything, as artifacts do, whose sliding window is the target."""
    config.sliding_window = None
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.attention_dropout = 0.0
    return config


def replace_rotation(decoder: Any, rope: TrialRope) -> None:
    """Put our rotation in the place of the decoder's; every layer rounds the tables to its own dtype."""
    if not isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
        raise UnsupportedError(f"{type(decoder).__name__} of transformers has no rotary_emb to replace")
    decoder.rotary_emb = rope
    dtype = next(decoder.parameters()).dtype

    def round_tables(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos.to(dtype), sin.to(dtype))}

    for layer in decoder.layers:
        layer.register_forward_pre_hook(round_tables, with_kwargs=True)


def fuse_norms(network: nn.Module) -> int:
    """Let PyTorch's one kernel do what RMSNorm modules do in six; how many changed.

    It rounds once, where transformers rounds before the weights too. A module that computes something else, with
    weights that count from one for example, is seen by trying and left alone.
    """
    changed = 0
    for module in network.modules():
        weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
            continue
        fused = _FusedNorm(module, epsilon)
        probe = torch.linspace(-3.0, 5.0, 4 * weight.numel(), dtype=weight.dtype, device=weight.device).reshape(4, -1)
        with torch.inference_mode():
            wanted, found = module(probe).float(), fused(probe).float()
        if (wanted - found).abs().max() <= 4 * torch.finfo(weight.dtype).eps * wanted.abs().max():
            module.forward = fused
            changed += 1
    return changed


class _FusedNorm:
    """In the place of a module's forward; the module keeps its weight, which may be sharded meanwhile."""

    def __init__(self, module: nn.Module, epsilon: float) -> None:
        self._module, self._epsilon = module, epsilon

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight: Any = self._module.weight
        return functional.rms_norm(hidden_states, weight.shape, weight, self._epsilon)
