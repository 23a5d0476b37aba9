# SPDX-License-Identifier: Apache-2.0
"""Runs in an interpreter of its own: loads a Hugging Face folder with vLLM and answers logits.

The engine serves the window in config.json: by default, vLLM (0.32) would serve the original window
of a longrope config, with the short set.
"""

import importlib.util
import json
import os
from pathlib import Path

REMEDY = "Name an interpreter that has vLLM with --python (CONTRIBUTING.md says how to install its CPU build)"

MOST_VALUES = 2**21  # about 400 MB of objects

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: it ends with it
os.environ["VLLM_NO_USAGE_STATS"] = "1"


class Worker:
    def __init__(self, request):
        if request.get("threads"):
            os.environ["OMP_NUM_THREADS"] = str(request["threads"])
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        import torch
        import vllm

        if request.get("threads"):
            torch.set_num_threads(request["threads"])
        self.folder, self.sampling = Path(request["folder"]), vllm.SamplingParams
        config = json.loads((Path(request["artifact"]) / "config.json").read_bytes())
        self.vocabulary = config["vocab_size"]
        self.engine = vllm.LLM(
            model=request["artifact"],
            max_model_len=config["max_position_embeddings"],
            dtype=request["dtype"],
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_logprobs=self.vocabulary,
            logprobs_mode="raw_logits",
            disable_log_stats=True,
        )
        self.count = 0
        self.info = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "class": ", ".join(config["architectures"]),
            "device": str(self.engine.llm_engine.vllm_config.device_config.device),
            "dtype": request["dtype"],
        }

    def run(self, rows, new_tokens, **wanted):
        sampling = self.sampling(
            temperature=0.0,
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=self.vocabulary,
            **wanted,
        )
        return self.engine.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)

    def save(self, rows):
        import numpy

        name = f"{self.count}.npy"
        self.count += 1
        numpy.save(self.folder / name, numpy.asarray(rows, dtype=numpy.float32))
        return name

    def values(self, found):
        """A position's logits, in the order of the vocabulary."""
        return [found[token].logprob for token in range(self.vocabulary)]

    def logits(self, request):
        if request["positions"] is not None:
            raise ValueError("vLLM supports only the positions of a whole prompt")
        return {"logits": self.save([self.of_row(row, request["keep"]) for row in request["rows"]])}

    def of_row(self, row, keep):
        """Every position's logits are Python objects here: where they would be too many, prompts that end at the
        positions wanted are asked instead."""
        if len(row) * self.vocabulary > MOST_VALUES:
            prefixes = [row[: index % len(row) + 1] for index in keep]
            return [self.values(one.outputs[0].logprobs[0]) for one in self.run(prefixes, 1)]
        (whole,) = self.run([row], 1, prompt_logprobs=self.vocabulary)
        # prompt_logprobs[i] is what the tokens before i predict; the last one predicts the token that is made.
        predicted = [*whole.prompt_logprobs[1:], whole.outputs[0].logprobs[0]]
        return [self.values(predicted[index]) for index in keep]

    def generate(self, request):
        (row,) = self.run([request["prompt"]], request["new_tokens"])
        output = row.outputs[0]
        logits = [self.values(step) for step in output.logprobs]
        return {"tokens": list(output.token_ids), "logits": self.save(logits)}


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("worker_loop", Path(__file__).with_name("worker_loop.py"))
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    loop.serve(Worker, REMEDY)
