# SPDX-License-Identifier: Apache-2.0
"""What a model card says of a GGUF."""

from __future__ import annotations

from collections.abc import Sequence

from lrconvert.artifact.card import CardText, bullets
from lrconvert.families import Family


def _run(repo: str | None) -> list[str]:
    source = f"-hf {repo}" if repo else "-m path/to/this/file.gguf"
    return [
        "## How to run",
        "",
        "With llama.cpp, Ollama or LM Studio. The size of the context chooses the factor set:",
        "",
        "```sh",
        f"llama-cli {source} -c 65536",
        "```",
    ]


def _about(family: Family, dropped: Sequence[str], losses: Sequence[str]) -> list[str]:
    parts = ["llama.cpp chooses the short or the long set once, when a context is made, by the context's size."]
    return [*parts, "llama.cpp can't express, and this file drops:", bullets(*dropped)] if dropped else parts


CARD_TEXT = CardText("gguf", ("longrope", "long-context", "gguf"), _run, _about)
