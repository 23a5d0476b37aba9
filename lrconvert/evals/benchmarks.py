# SPDX-License-Identifier: Apache-2.0
"""Short benchmarks through lm-eval: it makes the prompts and counts, a session answers.

This module imports lm-eval: `require` it first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from lrconvert.checkpoint import open_checkpoint
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.evals.figures import mean_figure
from lrconvert.evals.perplexity import finite
from lrconvert.evals.prompts import PromptTokenizer, Row
from lrconvert.evals.scores import BenchmarkRow
from lrconvert.evals.tasks import PreparedBenchmark, quiet
from lrconvert.families import rope_section
from lrconvert.progress import Progress, Step
from lrconvert.runtimes.base import Session

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # padding included
PROTOCOL = (
    "lm-eval's: every answer is scored after the prompt; acc: the likeliest answer is right, acc_norm: the likeliest "
    "per character is; truthfulqa_mc2: the share of probability on true answers; examples are drawn for each question"
)


@dataclass
class Effort:
    """How much the session computed: requests (each once), their tokens, and how many prompts were cut because they
    are longer than the window."""

    requests: int = 0
    tokens: int = 0
    truncated: int = 0


@dataclass(eq=False)
class SessionModel(LM):
    """lm-eval's view of a session. `window`: the longest row; `boundary`: rows on different sides of it never share a
    batch, because native code chooses one factor set for a whole batch."""

    session: Session
    tokenizer: PromptTokenizer
    window: int
    boundary: int | None = None
    batch_tokens: int = BATCH_TOKENS["cpu"]
    progress: Progress | None = None
    effort: Effort = field(default_factory=Effort)
    asked: str = ""  # the benchmark that is being asked, for progress

    def __post_init__(self) -> None:
        super().__init__()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of every (prompt, answer): the answer's log probability in nats, and whether greedy decoding writes it."""
        pairs: list[Any] = [request.args for request in requests]
        unique = list(dict.fromkeys(pairs))
        self._tell("tokens", 0, len(unique), 0.0)
        found = dict(zip(unique, self._scored(self.tokenizer.rows(unique)), strict=True))
        return [found[pair] for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log probability in nats of whole texts, in parts of at most the window that share no judged token."""
        rows, owners = [], []
        texts = [request.args[0] for request in requests]
        ids, prefix = self.tokenizer.encode(texts), self.tokenizer.prefix
        if prefix is None:
            raise InputError("the first token of a text is scored after BOS or EOS; the tokenizer has neither")
        for owner, text in enumerate(texts):
            # A part of lm-eval's has one token more than the model is fed.
            parts = utils.get_rolling_token_windows(
                ids[text].tolist(), prefix_token=prefix, max_seq_len=self.window - 1, context_len=1
            )
            for context, judged in map(utils.make_disjoint_window, parts):
                rows.append(Row.of([*context, *judged], len(judged)))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (log, _) in zip(owners, self._scored(rows), strict=True):
            totals[owner] += log
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise UnsupportedError("this evaluation scores given answers and generates no text")

    def _scored(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        kept = [row.within(self.window) for row in rows]
        lengths = [len(row.tokens) for row in kept]
        self.effort.requests += len(kept)
        self.effort.tokens += sum(lengths)
        self.effort.truncated += sum(len(row.tokens) > length for row, length in zip(rows, lengths, strict=True))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(kept)
        done, read, total = 0, 0, sum(lengths)
        for batch in batches(lengths, self.batch_tokens, self.boundary):
            self._tell("", done, len(kept), read / max(total, 1))
            scores = self.session.score([kept[at].tokens.tolist() for at in batch], [kept[at].judged for at in batch])
            for at, score in zip(batch, scores, strict=True):
                finite(score, lengths[at])
                found[at] = -float(score.losses.sum()), bool(score.preferred.all())
            done, read = done + len(batch), read + sum(lengths[at] for at in batch)
        return found

    def _tell(self, what: str, done: int, total: int, share: float) -> None:
        if self.progress is not None:
            self.progress(Step(self.asked or "benchmark", what, done, total, "requests", share))


def batches(lengths: Sequence[int], most: int, boundary: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of at most `most` tokens, padding included, or of one row; the longest first, so that what
    does not fit is known at once. No batch has rows on both sides of `boundary`."""
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else 0
        crosses = boundary is not None and lengths[at] <= boundary < longest
        if batch and (crosses or longest * (len(batch) + 1) > most):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def session_model(
    session: Session, artifact: Path, batch_tokens: int, *, progress: Progress | None = None
) -> SessionModel:
    """The artifact's session as lm-eval sees it, with the window that its config promises."""
    config = open_checkpoint(artifact, tolerant=True).config
    window = config.get("max_position_embeddings")
    if not isinstance(window, int) or window < 2:
        raise InputError(f"{artifact}: max_position_embeddings is {window!r}; a number of tokens is needed")
    key = "original_max_position_embeddings"
    boundary = config.get(key, rope_section(config).get(key))
    boundary = boundary if isinstance(boundary, int) else None
    return SessionModel(session, PromptTokenizer.of(artifact), window, boundary, batch_tokens, progress)


def protocol(asked: Sequence[PreparedBenchmark], limit: int | None) -> str:
    """What is measured and how, in words."""
    parts = [PROTOCOL]
    if shared := [found.name for found in asked if found.shots and len(found.files) == 1]:
        parts.append(f"those of {', '.join(shared)} are questions of the same file that are never asked")
    if limit is not None:
        parts.append(f"{limit} questions per task, drawn with the seed")
    return "; ".join(parts)


def measure_benchmarks(model: SessionModel, asked: Sequence[PreparedBenchmark], seed: int) -> list[BenchmarkRow]:
    """Every benchmark, one after the other; `seed` draws the examples in the prompts."""
    rows = []
    for benchmark in asked:
        model.asked = benchmark.name
        with quiet():
            for task in benchmark.tasks.values():
                task.set_fewshot_seed(seed)
            found: Any = evaluate(model, {"tasks": benchmark.tasks}, samples=benchmark.drawn, bootstrap_iters=0)
        samples = [sample for name in benchmark.tasks for sample in found["samples"][name]]
        rows.append(_row(benchmark, samples))
    return rows


def _row(benchmark: PreparedBenchmark, samples: list[dict[str, Any]]) -> BenchmarkRow:
    scores = [float(sample[benchmark.metric]) for sample in samples]
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample["arguments"]).encode())
    stderr = mean_stderr(scores)
    return BenchmarkRow(
        benchmark.name,
        benchmark.metric,
        benchmark.shots,
        mean_figure(mean(scores), stderr),
        stderr,
        tuple(scores),
        digest.hexdigest(),
    )
