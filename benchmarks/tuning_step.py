# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning step of `lrconvert extend` against transformers.Trainer with PEFT: same weights, adapter, rows, card.

    python benchmarks/tuning_step.py MODEL [--length 64k] [--steps 6] [--rank 24] [--device cuda] [--name NAME]

Both train LoRA on every projection and the norms, in bf16, on one row a step, with the default attention kernel of
each. Every side has a process of its own, so that its peak of memory is its own. The first two steps are not timed.
Written: results/tuning-step-NAME.json: tokens a second, peak memory, losses, where the time of our step goes, and its
share of the card's rate of bf16 products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Figure, report, save

from lrconvert.checkpoint import open_model
from lrconvert.cli._common import TOKENS
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.network import load_network
from lrconvert.training.projections import PROJECTIONS
from lrconvert.training.rows import Row, StepRows
from lrconvert.training.tuning import StepResult, TuneOptions, Tuning, load_trainable

UNTIMED = 2
RATE = 1e-4
SQUARE = 8192  # side of the matrices whose product says what the card can do
KERNELS = {"attention": ("attn", "fmha", "flash", "sdpa", "cudnn"), "products": ("gemm", "nvjet", "cutlass", "matmul")}


def tokens_of(options: argparse.Namespace, vocab: int) -> np.ndarray:
    """Rows [steps, length] of any tokens: what they are doesn't change the time."""
    rng = np.random.default_rng(0)
    return rng.integers(0, vocab, (options.steps, options.length), dtype=np.int64)


# --- the sides -------------------------------------------------------------------------------------------


def ours(options: argparse.Namespace) -> dict[str, Any]:
    model = open_model(options.model)
    tokens = tokens_of(options, model.shape.vocab)
    everything, nothing = np.ones(options.length - 1, bool), np.zeros(options.length - 1, bool)
    positions = np.arange(options.length)
    tune = TuneOptions(steps=options.steps, rate=RATE, norm_rate=RATE, rank=options.rank, warmup=0, final=1.0)
    loaded, _ = load_trainable(model, tune, device=options.device)

    def rows_of(step: int) -> StepRows:
        return StepRows(loaded.rotation, (Row(tokens[step], positions, everything, nothing),))

    results: list[StepResult] = []
    with tempfile.TemporaryDirectory() as folder:
        tuning = Tuning(loaded, tune, rows_of, Path(folder), every=1e9)
        tuning.run(results.append)
    times, losses = [result.seconds for result in results], [result.text for result in results]
    facts: dict[str, Any] = {"attention": loaded.attention, "recomputed": loaded.recompute}
    if loaded.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        row = Row(tokens[0], positions, everything, nothing)
        seconds = statistics.median(times[UNTIMED:])
        facts |= {"memory": peak, "kernels": kernels(loaded, row), **share_of_card(model, options, seconds)}
    return {"seconds": times, "losses": losses, **facts}


def peer(options: argparse.Namespace) -> dict[str, Any]:
    import peft
    import transformers

    model = open_model(options.model)
    tokens = tokens_of(options, model.shape.vocab)
    network = load_network(model, torch.bfloat16 if options.device == "cuda" else torch.float32)
    network.config.use_cache = False
    names = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    norms = sorted(name for name in names if name.endswith("norm"))
    network = peft.get_peft_model(network, peft.LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules=[name for name in PROJECTIONS["all"] if name in names],
        modules_to_save=norms, task_type="CAUSAL_LM",
    ))  # fmt: skip
    rows: Any = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in tokens]
    times, losses = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize(options.device)
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(options.device)
            times.append(time.perf_counter() - self.started)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in (logs or {}) else [])

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=1, max_steps=options.steps, learning_rate=RATE,
            bf16=options.device == "cuda", use_cpu=options.device == "cpu", logging_steps=1, save_strategy="no",
            report_to=[], max_grad_norm=1.0, adam_beta2=0.95, lr_scheduler_type="constant", disable_tqdm=True,
            gradient_checkpointing=options.checkpointing,
        )  # fmt: skip
        transformers.Trainer(model=network, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    memory = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
    return {"seconds": times, "losses": losses, "memory": memory}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- where the time goes ---------------------------------------------------------------------------------


def kernels(loaded: LoadedModel, row: Row) -> dict[str, float]:
    """Seconds of a forward and backward pass by kind of kernel."""
    weights = np.full((1, len(row.tokens) - 1), 1 / len(row.tokens))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loaded.backward(row.tokens[None], weights, row.positions)
        torch.cuda.synchronize()
    found = dict.fromkeys((*KERNELS, "everything else"), 0.0)
    for event in profile.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "everything else")
        found[kind] += event.self_device_time_total / 1e6
    return {kind: round(seconds, 4) for kind, seconds in found.items()}


def share_of_card(model: Any, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Products of a step over what the card multiplies in that time. Frozen weights have no gradient of their own: a
    weight costs 2 operations forward and 2 backward for every token. Causal attention: 2 products of n²/2 forward, 5
    backward."""
    shape = model.shape
    weights = sum(int(np.prod(info.shape)) for info in model.checkpoint.tensors.values() if len(info.shape) == 2)
    linear = 4 * weights * options.length
    attention = 7 * 2 * options.length**2 / 2 * shape.heads * shape.head_dim * shape.layers
    one, two = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(one, two)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        torch.mm(one, two)
    torch.cuda.synchronize()
    rate = 10 * 2 * SQUARE**3 / (time.perf_counter() - started)
    return {"operations": linear + attention, "card": rate, "share": round((linear + attention) / seconds / rate, 3)}


# --- both ------------------------------------------------------------------------------------------------


def measured(side: str, options: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *options, "--side", side], capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--length", type=lambda text: TOKENS.convert(text, None, None), default=65536)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", default="model")
    parser.add_argument("--checkpointing", action="store_true", help="the peer recomputes activations")
    parser.add_argument("--side", choices=["ours", "peer"])
    options = parser.parse_args()
    if options.side:
        print(json.dumps(ours(options) if options.side == "ours" else peer(options)))
        return
    given = sys.argv[1:]
    sides = {"lrconvert": measured("ours", given), "Trainer + PEFT": measured("peer", given),
             "Trainer + PEFT, recomputing": measured("peer", [*given, "--checkpointing"])}  # fmt: skip
    for side in sides.values():
        if "seconds" in side:
            side["tokens_per_second"] = round(options.length / statistics.median(side["seconds"][UNTIMED:]))
    (_, rate), *peers = ((name, side.get("tokens_per_second")) for name, side in sides.items())
    for name, theirs in peers:
        if rate and theirs:
            report(Figure(f"tuning at {options.length} tokens", rate, "tokens/s", name, theirs, limit=1.5, least=True))
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    ran = {"gpu": gpu, **{package: version(package) for package in ("torch", "transformers", "peft")}}
    save(f"tuning-step-{options.name}", {"ran": ran, "length": options.length, "rank": options.rank, "sides": sides})
    print(json.dumps(sides, indent=1))


if __name__ == "__main__":
    main()
