# SPDX-License-Identifier: Apache-2.0
"""Seconds per decoded token: the artifact's own code against the native class, same weights, same process.

    python benchmarks/decode_speed.py [--model MODEL] [--device cuda] [--dtype bfloat16] [--pairs 15]

Both decode the same number of tokens from the same prompt inside the first tier, in turn, A B B A …; the ratio is
taken pair by pair.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import Figure, median, report, save

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import open_model
from lrconvert.recipe import derive_recipe
from lrconvert.targets import hf

PROMPT = 256
ALLOWED = 1.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--name", help="what the result calls the model; default: its name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lrconvert-bench-") as scratch:
        os.environ["HF_MODULES_CACHE"] = str(Path(scratch) / "modules")
        measure(arguments, Path(scratch) / "artifact")


def measure(arguments: argparse.Namespace, artifact: Path) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    source = open_model(arguments.model)
    recipe = derive_recipe(
        "yarn",
        8.0,
        family=source.family.name,
        rotary_dim=source.shape.rotary_dim,
        theta=source.shape.theta,
        original_window=source.shape.window,
    )
    bake_plan(hf.plan(source, recipe, artifact))
    models = {}
    for name, custom in (("native", False), ("custom", True)):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            artifact, trust_remote_code=custom, dtype=getattr(torch, arguments.dtype)
        )
        models[name] = loaded.to(arguments.device).eval()
    prompt = torch.arange(10, 10 + PROMPT, device=arguments.device)[None] % source.shape.vocab

    def seconds_per_token(model: Any) -> float:
        mask = torch.ones_like(prompt)
        options = {"do_sample": False, "min_new_tokens": arguments.tokens, "max_new_tokens": arguments.tokens}
        started = time.perf_counter()
        model.generate(input_ids=prompt, attention_mask=mask, pad_token_id=0, **options)
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / arguments.tokens

    for model in models.values():  # not counted: kernels are chosen and caches filled here
        seconds_per_token(model)
    pairs = []
    for index in range(arguments.pairs):
        order = ("native", "custom") if index % 2 == 0 else ("custom", "native")
        taken = {name: seconds_per_token(models[name]) for name in order}
        pairs.append((taken["native"], taken["custom"]))
    name = arguments.name or Path(arguments.model).stem
    native, custom = (median(list(side)) * 1e3 for side in zip(*pairs, strict=True))
    report(Figure(f"decoding, {name}, {arguments.device}", custom, "ms/token", "native class", native, limit=ALLOWED))
    save(
        f"decode-speed-{name}-{arguments.device}".lower(),
        {
            "model": name,
            "dtype": arguments.dtype,
            "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
            "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
            "native_ms_per_token": [round(native * 1e3, 3) for native, _ in pairs],
            "custom_ms_per_token": [round(custom * 1e3, 3) for _, custom in pairs],
            "ratio_median": round(median([custom / native for native, custom in pairs]), 4),
            "ratio_allowed": ALLOWED,
        },
    )


if __name__ == "__main__":
    main()
