# SPDX-License-Identifier: Apache-2.0
"""Adapters as files: written beside their config, and weakened."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, merged, open_adapter
from lrconvert.errors import UnsupportedError


def write_weights(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """An adapter's weights, beside its config and as readable as that: safetensors makes files for their owner."""
    ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(ordered, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)


def weaken(model: Model, adapter: Path, share: float, folder: Path) -> None:
    """Write an adapter that changes `model` by a share of what another one changes: pairs of LoRA by their second
    factor, and tensors that were trained whole by their difference from the model's.

    Raises `InputError` for an adapter that doesn't fit the model, `UnsupportedError` for one that does more than that,
    such as DoRA.
    """
    opened = open_adapter(adapter)
    merged(model, opened)  # refuses what doesn't fit
    made, base = {}, model.checkpoint
    for name, tensor in load_file(adapter / WEIGHTS).items():
        plain = name.removeprefix(PREFIX)
        if ".lora_A" in name or ".lora_embedding_A" in name:
            made[name] = tensor
        elif (".lora_B" in name or ".lora_embedding_B" in name) and not opened.config.dora:
            made[name] = tensor * share
        elif plain in base.tensors and base.tensors[plain].shape == tuple(tensor.shape):
            before = torch.from_numpy(base.read(plain).astype(np.float32))
            made[name] = (before + share * (tensor.float() - before)).to(tensor.dtype)
        else:
            raise UnsupportedError(f"{adapter}: {name} can't be weakened", remedy="Leave the calibration out")
    folder.mkdir(parents=True)
    shutil.copyfile(adapter / CONFIG, folder / CONFIG)
    write_weights(made, folder)
