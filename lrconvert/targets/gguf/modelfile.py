# SPDX-License-Identifier: Apache-2.0
"""An Ollama Modelfile beside a GGUF: without it Ollama serves a few thousand tokens, regardless of the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrconvert.errors import UnsupportedError
from lrconvert.rope import RopeSpec


def name_of(output: Path) -> str:
    """`m.gguf` → `m.Modelfile`."""
    return f"{output.stem}.Modelfile"


def render(files: Sequence[str], spec: RopeSpec) -> str:
    """Raises `UnsupportedError` for a split file, which Ollama can't create a model from."""
    if len(files) > 1:
        raise UnsupportedError("Ollama can't load a split GGUF", remedy="Leave out --split-max-size or --modelfile")
    lines = [f"FROM ./{files[0]}", f"PARAMETER num_ctx {spec.window}"]
    if len(spec.tiers) > 1:
        short = spec.tiers[0].max_length
        lines.insert(0, f"# A num_ctx of up to {short} uses the short factors, a larger one the long ones, for every")
        lines.insert(1, f"# prompt. For short conversations create a second model with num_ctx {short} or less.")
    return "\n".join(lines) + "\n"
