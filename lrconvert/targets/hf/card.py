# SPDX-License-Identifier: Apache-2.0
"""What a model card says of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence

from lrconvert.artifact.card import CardText, bullets
from lrconvert.engines.capability import native_hf
from lrconvert.families import Family

_STALE = "cached keys stay as they are when generation crosses the original window"


def _run(repo: str | None) -> list[str]:
    return [
        "## How to run",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'name = "{repo or "path/to/this/folder"}"',
        "model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        "```",
    ]


def _about(family: Family, dropped: Sequence[str], losses: Sequence[str]) -> list[str]:
    """What each piece of code in the artifact does, and does not."""
    exact = "everything in the recipe except what is listed below" if dropped else "the recipe exactly"
    parts = [
        "transformers 4.57 to 5.x, nothing else needed. `trust_remote_code=True` runs `modeling_longrope.py`, one file "
        f"in this folder: it computes {exact}, gives every row of a batch the tier of its own length, and `generate` "
        "stays exact when a sequence grows into another tier.",
        "Without it the native class runs, without a warning. Then:",
        bullets(
            "a batch gets one tier for all its rows",
            *([] if native_hf(family).switches else [_STALE]),
            *(losses or ["the factor sets themselves stay exact"]),
        ),
    ]
    if dropped:
        parts += ["Dropped in all code, for compatibility with other engines:", bullets(*dropped)]
    return parts


CARD_TEXT = CardText("transformers", ("longrope", "long-context", "custom_code"), _run, _about)
