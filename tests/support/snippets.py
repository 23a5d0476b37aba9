# SPDX-License-Identifier: Apache-2.0
"""Code blocks of Markdown pages, and a model on which their commands take seconds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from lrconvert.checkpoint import locate

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block, in order."""
    return [(found[1], found[2]) for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def short_demo(folder: Path, *, window: int) -> Path:
    """The embedded model with a shorter window (tokens) in its config: verifying it takes seconds, not a minute."""
    folder.mkdir()
    for path in locate("demo").iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)  # links out of a folder are not followed
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    text = json.dumps({**config, "max_position_embeddings": window})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder
