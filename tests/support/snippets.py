# SPDX-License-Identifier: Apache-2.0
"""Code blocks of Markdown pages, and a model on which their commands take seconds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401 - teaches numpy the name bfloat16
from safetensors.numpy import load_file, save_file

from lrconvert.checkpoint import locate

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block, in order."""
    return [(found[1], found[2]) for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def short_demo(folder: Path, *, window: int, layers: int = 4) -> Path:
    """The embedded model with a shorter window (tokens), and the first of its four layers: verifying it takes seconds,
    not a minute, and what a page's commands and functions do does not depend on how well it writes."""
    folder.mkdir()
    for path in locate("demo").iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)  # links out of a folder are not followed
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    text = json.dumps({**config, "max_position_embeddings": window, "num_hidden_layers": layers})
    (folder / "config.json").write_text(text, encoding="utf-8")
    weights = load_file(locate("demo") / "model.safetensors")
    left_out = tuple(f"model.layers.{layer}." for layer in range(layers, config["num_hidden_layers"]))
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(left_out)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
