# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder, read back."""

from __future__ import annotations

from pathlib import Path

from lrconvert.checkpoint import Checkpoint, open_checkpoint


def recognises(path: Path) -> bool:
    """Any folder: more special targets are asked first."""
    return path.is_dir() or not path.suffix


def open_artifact(path: Path) -> Checkpoint:
    """The folder's weights, under its own config."""
    return open_checkpoint(path, tolerant=True)
