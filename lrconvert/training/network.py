# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as transformers' own class, with full attention and without a scaled rotation.

Every family comes with its own decoder. `rotation.replace_rotation` then puts ours into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lrconvert.checkpoint.folder_code import refuses_native
from lrconvert.errors import UnsupportedError
from lrconvert.families.layers import FULL, SLIDING
from lrconvert.families.query_scale import QueryScale

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model


ENDLESS = 2**31 - 1  # tokens: a window that no sequence goes beyond


def load_network(model: Model, dtype: torch.dtype) -> Any:
    """The model as transformers' own class.

    transformers loads a folder itself. Everything else (a GGUF file, a merged adapter) is read by our own reader, into
    a model made from the config. Raises `UnsupportedError` where transformers has other tensors.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoint = model.checkpoint
    config = transformers.AutoConfig.for_model(**_plain_rope(model))
    config.attention_dropout = 0.0
    if model.shape.plain_theta is None:
        config = _full_attention(config)
    kind = transformers.AutoModelForCausalLM
    given: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": "sdpa"}
    if model.shape.experts is not None and dtype == torch.float64:
        given["experts_implementation"] = "eager"  # one by one: the fused products take no float64
    if checkpoint.native and not checkpoint.touched:
        if (reason := refuses_native(checkpoint.path)) is not None:
            raise UnsupportedError(f"{model.reference}: {reason}", remedy="Take that out of the folder")
        return kind.from_pretrained(str(checkpoint.path), **given)
    weights = {
        name: torch.from_numpy(checkpoint.read(name).astype(np.float32)).to(dtype) for name in checkpoint.tensors
    }
    if model.shape.experts is None:
        network = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
        missing, unexpected = network.load_state_dict(weights, strict=False)
    else:  # transformers 5 joins experts as it loads them
        network, found = getattr(transformers, model.family.hf_class).from_pretrained(
            None, state_dict=weights, output_loading_info=True, **given
        )
        missing, unexpected = found["missing_keys"], found["unexpected_keys"]
    tied = {"lm_head.weight"} if model.shape.tied else set()
    if set(missing) - tied or unexpected:
        raise UnsupportedError(f"{model.reference}: transformers has other tensors: {missing}, {unexpected}")
    network.tie_weights()
    return network


def _plain_rope(model: Model) -> dict[str, Any]:
    """A config without scaling: it is replaced anyway, and a broken one would stop transformers from loading."""
    config, shape = model.checkpoint.config, model.shape
    kept = {key: value for key, value in config.items() if key not in ("rope_scaling", "auto_map")}
    if shape.plain_theta is not None:
        kinds = {FULL: shape.theta, SLIDING: shape.plain_theta}
        kept |= {"rope_theta": shape.theta}
        nested = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in kinds.items()}
        return {**kept, "rope_parameters": nested}
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = section.get("rope_theta", config.get("rope_theta"))
    parameters = {"rope_type": "default", **({"rope_theta": theta} if theta else {})}
    partial = section.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial:
        parameters["partial_rotary_factor"] = kept["partial_rotary_factor"] = partial
    if theta:
        kept["rope_theta"] = theta
    if model.family.query_scale is not None:
        scale = shape.query_scale or QueryScale(0.0, shape.window)
        parameters |= {model.family.query_scale: scale.growth, "original_max_position_embeddings": scale.window}
    return {**kept, "rope_parameters": parameters}


def _full_attention(config: Any) -> Any:
    """Every layer attends to every token. Where a sliding window acts on the model, `artifact.sliding.lifted_note` says
    so: an artifact keeps it unless it is lifted there too."""
    config.sliding_window = None
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        config.sliding_window = ENDLESS  # Qwen2-MoE makes this mask though no layer uses it; so it makes none
    return config


@contextlib.contextmanager
def recomputing(network: Any) -> Iterator[None]:
    """Within, layers keep only their inputs for the backward pass and compute the rest again:
    slower, with less memory."""
    # Another name since transformers 5.22; the old one goes away in 6.
    name = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
    was_training = network.training
    getattr(network, f"{name}_checkpointing_enable")({"use_reentrant": False})
    network.train()  # transformers recomputes in training alone
    for module in network.modules():  # in which routers choose at random, and experts' inputs are disturbed
        if type(module).__name__.endswith("SparseMoeBlock"):
            module.eval()
    try:
        yield
    finally:
        network.train(was_training)
        getattr(network, f"{name}_checkpointing_disable")()


def fuse_norms(network: nn.Module) -> int:
    """Let PyTorch's one kernel do what RMSNorm modules do in six; how many changed.

    The kernel rounds once; transformers also rounds before it multiplies with the weights. Each module is tried first:
    one that computes something else (1 + weight, for example) stays as it is.
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
    """Replaces a module's forward. The module keeps its weight, which may be sharded later."""

    def __init__(self, module: nn.Module, epsilon: float) -> None:
        self._module, self._epsilon = module, epsilon

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight: Any = self._module.weight
        return functional.rms_norm(hidden_states, weight.shape, weight, self._epsilon)
