# SPDX-License-Identifier: Apache-2.0
"""A consumer: greedy tokens from an exported folder by onnxruntime-genai, which reads genai_config.json.

Reads {"folder", "prompts", "new_tokens"} as JSON from stdin, writes {"versions", "tokens"} to stdout.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import onnxruntime_genai  # pyright: ignore[reportMissingImports]


def continued(model: onnxruntime_genai.Model, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens after one prompt; fewer when the end of the text comes."""
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + new_tokens, batch_size=1)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def main() -> None:
    request = json.load(sys.stdin)
    model = onnxruntime_genai.Model(request["folder"])
    tokens = [continued(model, prompt, request["new_tokens"]) for prompt in request["prompts"]]
    json.dump({"versions": {"onnxruntime-genai": version("onnxruntime-genai")}, "tokens": tokens}, sys.stdout)


if __name__ == "__main__":
    main()
