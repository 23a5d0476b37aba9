# SPDX-License-Identifier: Apache-2.0
"""Losses of candidates. This module, `network` and `workers` are the only ones of the search that need torch.

Logits are made for a chunk of tokens at a time, so a document of two million tokens needs none of its own size. Started
by torchrun, every process answers its share of the questions and all of them see all answers.

Shapes: b documents, n tokens, c hidden channels, d rotated channels, v words. Of a team (`workers`) every process has
its part of the n.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrconvert.errors import UsageError
from lrconvert.search.objective import Document, Objective
from lrconvert.search.protocol import Answer, Question
from lrconvert.training.devices import torch_device
from lrconvert.training.network import TrialRope, fuse_norms, load_network, replace_rotation
from lrconvert.training.processes import Workers

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model

# Attention kernels that are measured on a GPU; the last one holds all scores and is for what the others refuse.
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PROBE_TOKENS = 16384  # long enough that attention dominates, short enough to take no time
MAX_LOGITS = {"cpu": 2**23, "cuda": 2**28}  # entries held at once: 1 GiB of float32 on a GPU
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}  # documents are batched up to so many tokens a forward pass


class TransformersEvaluator:
    """A model, asked for the losses of candidates. See `protocol.Evaluator`.

    `attention` names one of `KERNELS`; on a GPU the fastest is chosen by measurement where none is named, and a CPU has
    its own. `dtype` defaults to bfloat16 on a GPU and float32 elsewhere. `team`, `sharded`: see `Workers`.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        team: int = 1,
        sharded: bool = False,
    ) -> None:
        self.device = _device(device)
        self._workers = Workers(self.device, team=team, sharded=sharded)
        self.width, self.leading = self._workers.width, self._workers.rank == 0
        self.dtype: torch.dtype = getattr(torch, dtype or ("bfloat16" if self.device.type == "cuda" else "float32"))
        self.rope = TrialRope(model.shape.theta, model.shape.rotary_dim)
        self.network = load_network(model, self.dtype).eval()
        self.network.requires_grad_(False)
        self._decoder, self._head = self.network.get_decoder(), self.network.get_output_embeddings()
        replace_rotation(self._decoder, self.rope)
        fuse_norms(self.network)
        self._workers.place(self.network, self._decoder.layers, self.device)
        self._vocab = model.shape.vocab
        self._recompute = False  # activations again in the backward pass: once they didn't fit
        if attention is not None and attention not in KERNELS:
            raise UsageError(f"no attention kernel {attention!r}; there are {', '.join(KERNELS)}")
        self.attention: str | None = None
        if self.device.type == "cuda":  # every process has the same, or a loss depended on who computes it
            self.attention = self.agree(self._able_kernel(attention) if attention else self._fastest_kernel())

    # --- answering ---------------------------------------------------------------------------------------

    def answer(self, objective: Objective, questions: Sequence[Question]) -> list[Answer]:
        """Every team answers one question; then every process has all answers."""
        if len(questions) > self.width:
            raise ValueError(f"{len(questions)} questions for {self.width} teams")
        if self._workers.together and len({question.gradient for question in questions}) > 1:
            raise ValueError("processes that wait for each other can't do different things")
        index = self._workers.own(len(questions))
        own = None if index is None else self._one(objective, questions[index])
        return self._workers.gather(own, len(questions))

    def agree(self, value: Any) -> Any:
        return self._workers.agree(value)

    def _one(self, objective: Objective, question: Question) -> Answer:
        """A candidate that fails costs itself alone."""
        started = time.perf_counter()
        try:
            return self._evaluate(objective, question, started)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            message = str(error).partition("\n")[0]
        self._free()  # only here: the exception held the frames that hold the tensors
        if question.gradient and not self._recompute:
            self._recompute = True
            return self._one(objective, question)
        return Answer.failed(f"out of memory: {message}", time.perf_counter() - started)

    def _evaluate(self, objective: Objective, question: Question, started: float) -> Answer:
        self.rope.candidate = question.candidate
        found: list[np.ndarray] = [np.empty(0)] * len(objective.documents)
        total = np.zeros(len(question.candidate.steps))
        for batch in batches(objective.documents, BATCH_TOKENS[self.device.type]):
            documents = [objective.documents[index] for index in batch]
            if question.gradient:
                weights = np.stack([objective.token_weights(index) for index in batch])
                losses, gradient = self._with_gradient(documents, weights)
                total += gradient
            else:
                losses = self._losses(documents)
            for index, row in zip(batch, losses, strict=True):
                found[index] = row
        loss, losses_by_length = objective.score(found)
        seconds = time.perf_counter() - started
        if not math.isfinite(loss) or not np.isfinite(total).all():
            return Answer.failed("the loss is not a number", seconds)
        gradient = tuple(total.tolist()) if question.gradient else None
        return Answer(loss, losses_by_length, gradient, None, seconds)

    def _losses(self, documents: Sequence[Document]) -> np.ndarray:
        """Losses of the tokens that are judged; float32, shape [b, n − 1], zero elsewhere."""
        ids, positions, targets = self._tensors(documents)
        # Not inference_mode: FSDP keeps buffers that it makes here, and a gradient needs them later.
        with torch.no_grad(), self._kernel(), self._workers.spread(ids, positions, targets):
            hidden = self._hidden(ids, positions)
            losses = torch.zeros(targets.shape, device=self.device)
            for rows in self._chunks(documents, targets.shape[1]):
                losses[:, rows] = self._cross_entropy(hidden[:, rows], targets[:, rows])
            return self._told(losses, documents)

    def _with_gradient(self, documents: Sequence[Document], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses as `_losses`, and d Σ weights·losses / d ln λ_i, float64, shape [d/2].

        The loss's gradient at the hidden states is made chunk by chunk, each with its logits, then taken back through
        the decoder at once. Weights are multiplied by n meanwhile: float16 would lose numbers as small as 1/n.
        """
        ids, positions, targets = self._tensors(documents)
        count = len(documents[0].tokens)
        padded = np.pad(weights * count, ((0, 0), (0, ids.shape[1] - weights.shape[1])))
        scaled = torch.as_tensor(padded, dtype=torch.float32, device=self.device)
        log_factors = torch.tensor(self.rope.candidate.factors, dtype=torch.float64, device=self.device).log()
        self.rope.log_factors = log_factors.requires_grad_()
        try:
            with self._kernel(), self._recomputing(), self._workers.spread(ids, positions, targets, scaled):
                hidden = self._hidden(ids, positions)
                losses = torch.zeros(targets.shape, device=self.device)
                upstream = torch.zeros_like(hidden)
                for rows in self._chunks(documents, targets.shape[1]):
                    part = hidden[:, rows].detach().requires_grad_()
                    found = self._cross_entropy(part, targets[:, rows])
                    (upstream[:, rows],) = torch.autograd.grad((found * scaled[:, rows]).sum(), part)
                    losses[:, rows] = found.detach()
                (gradient,) = torch.autograd.grad(hidden, log_factors, upstream)
                told = self._told(losses, documents)
        finally:
            self.rope.log_factors = None
        return told, (self._workers.total(gradient) / count).cpu().numpy()

    def _tensors(self, documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, their positions, and the token that each predicts: [b, n], n rounded up to what a team can share.
        What is added stands at the end, where no other token sees it."""
        plain = np.stack([document.tokens for document in documents])
        ids = torch.from_numpy(np.pad(plain, ((0, 0), (0, -plain.shape[1] % self._workers.multiple)))).to(self.device)
        positions = torch.arange(ids.shape[1], device=self.device).repeat(len(documents), 1)
        return ids, positions, ids.roll(-1, dims=1)

    def _told(self, losses: torch.Tensor, documents: Sequence[Document]) -> np.ndarray:
        """Without those of the last token, which predicts nothing, and of what was added."""
        return self._workers.whole(losses)[:, : len(documents[0].tokens) - 1].cpu().numpy()

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The decoder's last hidden states, [b, n, c].

        A mask of ones lets transformers leave causality to the attention kernel. Without any it looks for packed
        documents, and transformers 4.57 then makes a mask of n × n.
        """
        mask = torch.ones_like(ids, dtype=torch.bool)
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        return self._decoder(**given, use_cache=False).last_hidden_state

    def _cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # Widened inside the kernel: a float32 copy of the logits would be half of its memory traffic.
        log_probabilities = functional.log_softmax(self._head(hidden), dim=-1, dtype=torch.float32)
        return -log_probabilities.gather(-1, targets[..., None])[..., 0]

    def _chunks(self, documents: Sequence[Document], count: int) -> Iterator[slice]:
        """The judged ones of `count` losses, as many at a time as their logits may take. A team, whose members have
        parts from here and there, judges all."""
        first, end = 0, count
        if self._workers.team == 1:
            first = min(document.judged[0] for document in documents)
            end = max(document.judged[1] for document in documents)
        size = max(1, MAX_LOGITS[self.device.type] // (self._vocab * len(documents)))
        return (slice(start, min(start + size, end)) for start in range(first, end, size))

    # --- the machine -------------------------------------------------------------------------------------

    def _kernel(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.attention is None else sdpa_kernel([KERNELS[self.attention]])

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Layers that keep only their inputs for the backward pass, where `_recompute` asks for it."""
        if not self._recompute:
            yield
            return
        network = self.network
        # Another name since transformers 5.22; the old one goes away in 6.
        name = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
        getattr(network, f"{name}_checkpointing_enable")({"use_reentrant": False})
        network.train()  # transformers recomputes in training alone
        try:
            yield
        finally:
            network.eval()
            getattr(network, f"{name}_checkpointing_disable")()

    def _able_kernel(self, name: str) -> str:
        if name != "math" and self._time_kernel(name) is None:
            raise UsageError(f"--attention {name}: PyTorch has none of that name for this card, dtype and model")
        return name

    def _fastest_kernel(self) -> str:
        """The attention kernel with the fastest forward pass of this model on this card."""
        times = {name: self._time_kernel(name) for name in KERNELS if name != "math"}
        able = {name: seconds for name, seconds in times.items() if seconds is not None}
        self.attention = None
        return min(able, key=lambda name: able[name]) if able else "math"

    def _time_kernel(self, name: str) -> float | None:
        """Seconds of the faster of two passes after a first one; None where the kernel refuses."""
        self.attention = name
        probe = Document("text", np.arange(PROBE_TOKENS) % self._vocab, ((2, 0, 1),))
        times = []
        try:
            for _ in range(3):
                torch.cuda.synchronize(self.device)
                started = time.perf_counter()
                self._losses([probe])
                torch.cuda.synchronize(self.device)
                times.append(time.perf_counter() - started)
        except RuntimeError:  # no such kernel for this card, dtype or shape; out of memory is one too
            self._free()
            return None
        return min(times[1:])

    def largest_fitting(self, length: int) -> int:
        """By bisection in steps of a sixteenth of `length`, with one document of any tokens."""
        step = max(length // 16, 2)
        least, most = 0, 16
        while most - least > 1:
            middle = (least + most) // 2
            if self._fits(middle * step):
                least = middle
            else:
                most = middle
        return least * step

    def _fits(self, length: int) -> bool:
        try:
            self._losses([Document("text", np.arange(length) % self._vocab, ((length, 0, length - 1),))])
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
        else:
            return True
        self._free()
        return False

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        import transformers

        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.attention,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def batches(documents: Sequence[Document], tokens: int) -> list[list[int]]:
    """Indices of documents of equal length that share a forward pass. It depends on nothing else, so that a loss is
    the same whatever is evaluated beside it."""
    made: list[list[int]] = []
    for index, document in enumerate(documents):
        length = len(document.tokens)
        last = made[-1] if made else []
        if last and len(documents[last[0]].tokens) == length and (len(last) + 1) * length <= tokens:
            last.append(index)
        else:
            made.append([index])
    return made


def _device(name: str | None) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch_device(name, "search", "a search")
    if device.type == "cuda":
        device = torch.device("cuda", device.index if device.index is not None else local)
        torch.cuda.set_device(device)
    return device


def _out_of_memory(error: BaseException) -> bool:
    """PyTorch says it by a class on a GPU and in words on a CPU."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error).lower() for word in words)
