# SPDX-License-Identifier: Apache-2.0
"""What a model card says of an ONNX folder."""

from __future__ import annotations

from lrconvert.artifact.card import CardText

_ABOUT = (
    "The rotation is a function inside the graph, made of standard operators: every row of a batch gets the tier of "
    "its last position. Programs with a cache keep the keys cached before a boundary; only recomputing the sequence "
    "there is exact."
)


def _run(repo: str | None) -> list[str]:
    name = repo or "path/to/this/folder"
    return [
        "## How to run",
        "",
        "In Python, with `optimum` or `onnxruntime-genai`; in JavaScript with transformers.js:",
        "",
        "```python",
        "from optimum.onnxruntime import ORTModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        f'name = "{name}"',
        "model = ORTModelForCausalLM.from_pretrained(name)",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        "```",
        "",
        "```js",
        'import { pipeline } from "@huggingface/transformers";',
        "",
        f'const generate = await pipeline("text-generation", "{name}");',
        "```",
    ]


CARD_TEXT = CardText("onnx", ("longrope", "long-context", "onnx"), _run, lambda family, dropped, losses: [_ABOUT])
