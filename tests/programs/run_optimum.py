# SPDX-License-Identifier: Apache-2.0
"""A consumer: greedy tokens from an exported folder by optimum's ORTModelForCausalLM.

Reads {"folder", "prompts", "new_tokens", "together", "mended"} as JSON from stdin, writes {"versions", "tokens"} to
stdout. `together`: one batch, shorter prompts padded on the left. `mended`: tell the model the shape of its cache, that
optimum-onnx 0.1.0 gets wrong where heads aren't hidden / heads channels wide, and in a Phi-3 with grouped heads.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForCausalLM  # pyright: ignore[reportMissingImports]

PACKAGES = ("optimum-onnx", "onnxruntime", "transformers")


def continued(model: ORTModelForCausalLM, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens after every prompt of a batch."""
    width = max(map(len, prompts))
    padding = model.config.pad_token_id or 0
    rows = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    made = model.generate(
        input_ids=torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=padding,
    )
    return made[:, width:].tolist()


def main() -> None:
    request = json.load(sys.stdin)
    model = ORTModelForCausalLM.from_pretrained(request["folder"], local_files_only=True)
    if request.get("mended"):
        model.num_key_value_heads = model.config.num_key_value_heads
        model.embed_size_per_head = getattr(model.config, "head_dim", model.embed_size_per_head)
    prompts = request["prompts"]
    batches = [prompts] if request.get("together") else [[prompt] for prompt in prompts]
    tokens = [row for batch in batches for row in continued(model, batch, request["new_tokens"])]
    json.dump({"versions": {name: version(name) for name in PACKAGES}, "tokens": tokens}, sys.stdout)


if __name__ == "__main__":
    main()
