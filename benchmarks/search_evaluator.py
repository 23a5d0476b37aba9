# SPDX-License-Identifier: Apache-2.0
"""How fast a search's evaluations are, beside a bare loop over the same attention and matrix products.

    python benchmarks/search_evaluator.py MODEL [--lengths 64k] [--gradient] [--longest 2048k] [--device cuda]
        [--dtype bfloat16] [--attention cudnn] [--rounds 5] [--name NAME] [--workers 2]

The bare loop has nothing but the products of every layer and of the head, and the attention, in the shapes, the dtype
and the kernel of the model: no norms, no rotation, no activation, no loss. It prints tokens a second of both, their
ratio, and the share of the rate that a large product reaches on this card. `--gradient` also times an evaluation with
its gradient, in forward passes. `--longest` evaluates one document of that length, whether it fits and its peak memory.
`--workers` runs a search of the model under torchrun with one process and with so many, one thread each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Figure, median, report, save
from torch.nn import functional

from lrconvert.checkpoint import open_model
from lrconvert.cli._common import TOKENS
from lrconvert.families.base import ModelShape
from lrconvert.searching.evaluator import TransformersEvaluator
from lrconvert.searching.objective import Document, Objective
from lrconvert.searching.protocol import Question
from lrconvert.searching.space import Candidate
from lrconvert.training.attention import use_kernel
from lrconvert.training.losses import MAX_LOGITS

PRODUCT = 8192  # side of the matrices whose product tells the card's rate
WORKER_OPTIONS = ["--original-window", "256", "--target", "1024", "--tier", "long", "--budget", "64"]


class BareLoop:
    """The products and the attention of one forward pass, weights and inputs of any values."""

    def __init__(self, shape: ModelShape, length: int, evaluator: TransformersEvaluator) -> None:
        self.shape, self.length, self.evaluator = shape, length, evaluator
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.sizes = [(shape.hidden, query), (shape.hidden, key), (shape.hidden, key), (query, shape.hidden)]
        self.sizes += [(shape.hidden, shape.ffn)] * 2 + [(shape.ffn, shape.hidden)]
        place: Any = {"dtype": evaluator.model.dtype, "device": evaluator.model.device}
        self.weights = [torch.randn(out, into, **place) * into**-0.5 for into, out in self.sizes]
        self.inputs = {width: torch.randn(length, width, **place) for width in {into for into, _ in self.sizes}}
        self.head = torch.randn(shape.vocab, shape.hidden, **place)
        self.rows = max(1, MAX_LOGITS[evaluator.model.device.type] // shape.vocab)
        counts = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.qkv = [torch.randn(1, count, length, shape.head_dim, **place) for count in counts]

    @torch.inference_mode()
    def run(self) -> None:
        gqa = self.shape.heads != self.shape.kv_heads
        query, key, value = self.qkv
        with use_kernel(self.evaluator.model.attention):
            for _ in range(self.shape.layers):
                functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)
                for (into, _), weight in zip(self.sizes, self.weights, strict=True):
                    functional.linear(self.inputs[into], weight)
            for part in self.inputs[self.shape.hidden].split(self.rows):
                functional.linear(part, self.head)

    @property
    def operations(self) -> float:
        """Floating-point operations: two a product and addition; causal attention computes half of all pairs."""
        shape = self.shape
        layer = 2.0 * self.length * sum(into * out for into, out in self.sizes)
        attention = 2.0 * shape.heads * shape.head_dim * self.length**2
        return shape.layers * (layer + attention) + 2.0 * self.length * shape.hidden * shape.vocab


def timed(evaluator: TransformersEvaluator, rounds: int, work: Callable[[], Any]) -> float:
    """Median seconds after one run that is not counted."""
    times = []
    for _ in range(rounds + 1):
        _wait(evaluator)
        started = time.perf_counter()
        work()
        _wait(evaluator)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _wait(evaluator: TransformersEvaluator) -> None:
    if evaluator.model.device.type == "cuda":
        torch.cuda.synchronize()


def document(length: int, vocab: int) -> Objective:
    tokens = np.random.default_rng(0).integers(0, vocab, length)
    return Objective("perplexity", (Document("text", tokens, ((length, 0, length - 1),)),), {length: 1.0})


def measure(
    evaluator: TransformersEvaluator, shape: ModelShape, length: int, options: Any, rate: float
) -> dict[str, Any]:
    """One length: the evaluator and the bare loop in turn, so that a card that slows down slows both."""
    objective = document(length, shape.vocab)
    question = Question(Candidate((100,) * (shape.rotary_dim // 2)))
    bare = BareLoop(shape, length, evaluator)
    ours, theirs = [], []
    for _ in range(3):
        ours.append(timed(evaluator, options.rounds, lambda: evaluator.answer(objective, [question])))
        theirs.append(timed(evaluator, options.rounds, bare.run))
    seconds, least = median(ours), median(theirs)
    report(Figure(f"one evaluation of {length} tokens", seconds, "s", "bare loop", least, limit=1 / 0.85))
    found = {
        "tokens": length,
        "seconds": seconds,
        "bare_seconds": least,
        "tokens_per_second": length / seconds,
        "share_of_bare_speed": least / seconds,
        "teraflops": bare.operations / seconds / 1e12,
        "share_of_product_rate": bare.operations / seconds / rate,
    }
    if options.gradient:
        with_gradient = Question(question.candidate, gradient=True)
        slow = timed(evaluator, max(1, options.rounds // 2), lambda: evaluator.answer(objective, [with_gradient]))
        found |= {"gradient_seconds": slow, "gradient_forward_equivalents": slow / seconds}
        if evaluator.model.device.type == "cuda":
            found["gradient_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            found["gradient_recomputes"] = evaluator.model.recompute
    return found


def product_rate(evaluator: TransformersEvaluator, rounds: int) -> float:
    """Operations a second of one large product."""
    side = PRODUCT if evaluator.model.device.type == "cuda" else 1024
    matrix = torch.randn(side, side, dtype=evaluator.model.dtype, device=evaluator.model.device)
    return 2.0 * side**3 / timed(evaluator, rounds, lambda: matrix @ matrix)


def longest(evaluator: TransformersEvaluator, shape: ModelShape, length: int) -> dict[str, Any]:
    """One evaluation of one long document."""
    cuda = evaluator.model.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    question = Question(Candidate((100,) * (shape.rotary_dim // 2)))
    (answer,) = evaluator.answer(document(length, shape.vocab), [question])
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"tokens": length, "seconds": answer.seconds, "error": answer.error, "peak_gib": peak}


def workers(model: str, count: int) -> dict[str, Any]:
    """Evaluations a minute of a search in one process and in `count`, and whether their journals agree."""
    from lrconvert.data import DATA
    from lrconvert.searching.journal import read_journal

    seconds, journals = {}, []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "start.py"
        script.write_text("from lrconvert.cli import main\nmain()\n")
        for processes in (1, count):
            output = Path(folder) / str(processes)
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            arguments = ["search", model, "--text", str(DATA / "demo" / "heldout.txt"), "-o", str(output)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [*launch, str(script), *arguments, *WORKER_OPTIONS, "--algorithm", "evolution", "--device", "cpu"]
            subprocess.run(command, env=environment, check=True, capture_output=True)
            journal = output.with_name(f"{processes}.journal.jsonl")
            found = read_journal(journal)
            seconds[processes] = journal.stat().st_mtime - found.runs[0]["began"]  # models were loaded before
            journals.append([{**record.to_json(), "seconds": 0} for record in found.records])
    rates = {str(number): 60 * len(journals[0]) / took for number, took in seconds.items()}
    return {"evaluations_per_minute": rates, "ratio": seconds[1] / seconds[count], "same": journals[0] == journals[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", default="64k", help="with commas")
    parser.add_argument("--gradient", action="store_true")
    parser.add_argument("--longest", help="tokens")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--attention")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="model")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    model = open_model(options.model)
    evaluator = TransformersEvaluator(model, device=options.device, dtype=options.dtype, attention=options.attention)
    rate = product_rate(evaluator, options.rounds)
    lengths = [TOKENS.convert(length, None, None) for length in options.lengths.split(",")]
    result: dict[str, Any] = {
        "model": options.name,
        "environment": evaluator.describe(),
        "product_teraflops": rate / 1e12,
        "lengths": [measure(evaluator, model.shape, length, options, rate) for length in lengths],
    }
    if options.longest:
        result["longest"] = longest(evaluator, model.shape, TOKENS.convert(options.longest, None, None))
    if options.workers:
        del evaluator
        result["workers"] = workers(options.model, options.workers)
    save(f"search-evaluator-{options.name}", result)


if __name__ == "__main__":
    main()
