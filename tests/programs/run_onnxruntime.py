# SPDX-License-Identifier: Apache-2.0
"""A consumer: greedy tokens from an exported folder by ONNX Runtime alone, as a user may write it.

Reads {"folder", "prompts", "new_tokens"} as JSON from stdin, writes {"versions", "tokens"} to stdout. Every prompt is
read in one pass and continued with the graph's own cache, so keys keep the set that they were made with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def open_graph(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options, providers=["CPUExecutionProvider"])


def continued(session: onnxruntime.InferenceSession, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens after one prompt."""
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    past = {
        name: np.zeros((1, value.shape[1], 0, value.shape[3]), kinds[value.type])
        for name, value in inputs.items()
        if name.startswith("past_key_values")
    }
    step, seen, made = list(prompt), 0, []
    for _ in range(new_tokens):
        total = seen + len(step)
        feed = {
            "input_ids": np.array([step], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(seen, total, dtype=np.int64)[None],
            **past,
        }
        answer = dict(zip(outputs, session.run(None, {name: feed[name] for name in inputs}), strict=True))
        past = {name: answer[name.replace("past_key_values", "present")] for name in past}
        seen, step = total, [int(np.argmax(np.asarray(answer["logits"])[0, -1]))]
        made += step
    return made


def main() -> None:
    request = json.load(sys.stdin)
    session = open_graph(Path(request["folder"]))
    tokens = [continued(session, prompt, request["new_tokens"]) for prompt in request["prompts"]]
    json.dump({"versions": {"onnxruntime": onnxruntime.__version__}, "tokens": tokens}, sys.stdout)


if __name__ == "__main__":
    main()
