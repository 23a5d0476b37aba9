# SPDX-License-Identifier: Apache-2.0
"""Runs in an interpreter of its own: loads a Hugging Face folder with mlx-lm and answers logits."""

import importlib.util
from importlib.metadata import version
from pathlib import Path

REMEDY = "Name an interpreter that has mlx-lm with --python (on Linux: pip install mlx mlx-cpu mlx-lm)"


class Worker:
    def __init__(self, request):
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self.mx, self.folder, self.new_cache = mx, Path(request["folder"]), make_prompt_cache
        self.model, _ = load_model(Path(request["artifact"]))
        self.model.set_dtype(getattr(mx, request["dtype"]))
        self.count = 0
        self.info = {
            "mlx-lm": version("mlx-lm"),
            "mlx": version("mlx"),
            "class": type(self.model).__module__,
            "device": str(mx.default_device()),
            "dtype": request["dtype"],
        }

    def save(self, rows):
        import numpy

        name = f"{self.count}.npy"
        self.count += 1
        numpy.save(self.folder / name, numpy.stack([numpy.array(row.astype(self.mx.float32)) for row in rows]))
        return name

    def logits(self, request):
        if request["positions"] is not None:
            raise ValueError("mlx-lm supports only the positions of a whole prompt")
        answers = []
        for row in request["rows"]:
            keep = self.mx.array([index % len(row) for index in request["keep"]])
            answers.append(self.model(self.mx.array([row]))[0, keep])
        return {"logits": self.save(answers)}

    def generate(self, request):
        """Greedy, a token at a time on mlx-lm's own cache, as its `generate_step` does."""
        mx, cache = self.mx, self.new_cache(self.model)
        tokens, rows, given = [], [], request["prompt"]
        for _ in range(request["new_tokens"]):
            rows.append(self.model(mx.array([given]), cache=cache)[0, -1])
            given = [mx.argmax(rows[-1]).item()]
            tokens += given
        return {"tokens": tokens, "logits": self.save(rows)}


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("worker_loop", Path(__file__).with_name("worker_loop.py"))
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    loop.serve(Worker, REMEDY)
