# SPDX-License-Identifier: Apache-2.0
"""The formats that are read dequantised: one row each, by the `quant_method` of a config.

To add one, write a decoder `(Settings, Parts) → Weight` and its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lrconvert.checkpoint.quantised import bitsandbytes, compressed_tensors, fp8, gptq
from lrconvert.checkpoint.quantised.settings import Settings
from lrconvert.checkpoint.quantised.weight import Parts, Weight

# Scales of activations and of a quantised cache, stored beside weights. An artifact computes both in full.
BESIDE = (
    "activation_scale",
    "input_scale",
    "input_scale_ub",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    *(f"{name}_{what}" for name in "qkv" for what in ("scale", "zero_point")),
)


def _nothing(settings: Settings) -> None: ...


@dataclass(frozen=True)
class Format:
    """How one method stores a module. `parts`: what follows a module's name in those of its tensors; `check` refuses
    settings, before any tensor is looked at; `activations`: the method rounds them too, as it runs."""

    parts: tuple[str, ...]
    decoder: Callable[[Settings, Parts], Weight]
    check: Callable[[Settings], None] = _nothing
    activations: Callable[[Mapping[str, Any]], bool] = lambda _: False


def _rounds_activations(section: Mapping[str, Any]) -> bool:
    """Whether a config of compressed-tensors does, or rounds keys and values in the cache."""
    groups = section.get("config_groups")
    each = groups.values() if isinstance(groups, Mapping) else ()
    rounded = any(isinstance(group, Mapping) and group.get("input_activations") for group in each)
    return rounded or bool(section.get("kv_cache_scheme"))


FORMATS: dict[str, Format] = {
    "fp8": Format(fp8.PARTS, fp8.weight, activations=lambda _: True),
    "mxfp8": Format(fp8.PARTS, fp8.weight, activations=lambda _: True),
    "fbgemm_fp8": Format(fp8.PARTS, fp8.weight, activations=lambda _: True),
    "compressed-tensors": Format(
        compressed_tensors.PARTS, compressed_tensors.weight, compressed_tensors.check, _rounds_activations
    ),
    "gptq": Format(gptq.GPTQ_PARTS, gptq.gptq, gptq.gptq_settings),
    "awq": Format(gptq.AWQ_PARTS, gptq.awq, gptq.awq_settings),
    "bitsandbytes": Format(bitsandbytes.PARTS, bitsandbytes.weight),
}


@dataclass(frozen=True)
class Sign:
    """What a tensor's name says about a config that lost its section: the methods, and the keys that they need."""

    part: str
    methods: str
    keys: str


SIGNS = (
    Sign("weight_scale_inv", '"fp8"', "weight_block_size, such as [128, 128]"),
    Sign("qweight", '"gptq" or "awq"', "bits and group_size"),
    Sign("weight_packed", '"compressed-tensors"', "format and config_groups"),
    Sign("weight_scale", '"compressed-tensors", "fp8" or "fbgemm_fp8"', "what the method needs"),
    Sign("weight.absmax", '"bitsandbytes"', "load_in_4bit"),
    Sign("SCB", '"bitsandbytes"', "load_in_8bit"),
)
