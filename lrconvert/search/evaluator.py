# SPDX-License-Identifier: Apache-2.0
"""Losses of candidates: the transformers model with our rotation in it. The only module of the search that needs torch.

Every family comes with its own decoder; all that is replaced is the module that makes cos and sin. Angles are made in
float64 and only their cos and sin are rounded. Logits are made for a chunk of tokens at a time, so a document of two
million tokens needs none of its own size. Started by torchrun, every process answers its share of the questions and
all of them see all answers.

Shapes: b documents, n tokens, c hidden channels, d rotated channels, v words.
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
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrconvert.errors import EnvironmentFailure, UnsupportedError, UsageError
from lrconvert.search.objective import Document, Objective
from lrconvert.search.protocol import Answer, Question
from lrconvert.search.space import Candidate

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
TABLE_ROWS = 65536  # positions whose angles are held in float64 at once


class TrialRope(nn.Module):
    """cos and sin of the candidate that is set, for any decoder of transformers.

    `log_factors` (float64, [d/2]) stands for the factors while a gradient is wanted; tables are float32 then, and are
    rounded where each layer reads them, so that the layers' gradients add up in float32.
    """

    def __init__(self, base: float, rotary_dim: int) -> None:
        super().__init__()
        self.base, self.rotary_dim = base, rotary_dim
        self.candidate = Candidate((100,) * (rotary_dim // 2))
        self.log_factors: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x only dtype and device count; all rows share their positions. Two tensors [1, n, d]."""
        given = self.log_factors
        if given is None:
            factors = torch.tensor(self.candidate.factors, dtype=torch.float64, device=x.device)
            dtype = x.dtype
        else:
            factors, dtype = given.exp(), torch.float32
        even = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=x.device)
        plain = self.base ** (-even / self.rotary_dim)
        parts = [self._tables(part, plain, plain / factors, dtype) for part in position_ids[0].split(TABLE_ROWS)]
        cos, sin = (torch.cat(tables) for tables in zip(*parts, strict=True))
        # Frequency index i turns the channels i and i + d/2.
        return torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]

    def _tables(
        self, positions: torch.Tensor, plain: torch.Tensor, scaled: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        where = positions.to(torch.float64)[:, None]
        start = self.candidate.start_tokens
        angles = where * (torch.where(where < start, plain, scaled) if start else scaled)
        scale = self.candidate.attention_factor
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class TransformersEvaluator:
    """A model, asked for the losses of candidates. See `protocol.Evaluator`.

    `attention` names one of `KERNELS`; on a GPU the fastest is chosen by measurement where none is named, and a CPU has
    its own. `dtype` defaults to bfloat16 on a GPU and float32 elsewhere.
    """

    def __init__(
        self, model: Model, *, device: str | None = None, dtype: str | None = None, attention: str | None = None
    ) -> None:
        self.width, self._rank = _join_workers()
        self.leading = self._rank == 0
        self.device = _device(device)
        self.dtype: torch.dtype = getattr(torch, dtype or ("bfloat16" if self.device.type == "cuda" else "float32"))
        self.rope = TrialRope(model.shape.theta, model.shape.rotary_dim)
        self.network = load_network(model, self.dtype).to(self.device).eval()
        self.network.requires_grad_(False)
        self._decoder, self._head = self.network.get_decoder(), self.network.get_output_embeddings()
        replace_rotation(self._decoder, self.rope)
        self._vocab = model.shape.vocab
        self._recompute = False  # activations again in the backward pass: once they didn't fit
        if attention is not None and attention not in KERNELS:
            raise UsageError(f"no attention kernel {attention!r}; there are {', '.join(KERNELS)}")
        self.attention: str | None = None
        if self.device.type == "cuda":  # every process has the same, or a loss depended on who computes it
            self.attention = self.agree((attention or self._fastest_kernel()) if self.leading else None)

    # --- answering ---------------------------------------------------------------------------------------

    def answer(self, objective: Objective, questions: Sequence[Question]) -> list[Answer]:
        """Process r answers question r; then every process has all answers."""
        if len(questions) > self.width:
            raise ValueError(f"{len(questions)} questions for {self.width} processes")
        own = self._one(objective, questions[self._rank]) if self._rank < len(questions) else None
        if self.width == 1:
            return [own] if own is not None else []
        everyone: list[Answer | None] = [None] * self.width
        dist.all_gather_object(everyone, own)
        return [answer for answer in everyone if answer is not None]

    def agree(self, value: Any) -> Any:
        if self.width == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

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

    @torch.inference_mode()
    def _losses(self, documents: Sequence[Document]) -> np.ndarray:
        """Losses of the tokens that are judged; float32, shape [b, n − 1], zero elsewhere."""
        ids = self._ids(documents)
        with self._kernel():
            hidden = self._hidden(ids)
        losses = torch.zeros(ids.shape[0], ids.shape[1] - 1, device=self.device)
        for rows in self._chunks(documents):
            losses[:, rows] = self._cross_entropy(hidden[:, rows], ids[:, rows.start + 1 : rows.stop + 1])
        return losses.cpu().numpy()

    def _with_gradient(self, documents: Sequence[Document], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses as `_losses`, and d Σ weights·losses / d ln λ_i, float64, shape [d/2].

        The loss's gradient at the hidden states is made chunk by chunk, each with its logits, then taken back through
        the decoder at once. Weights are multiplied by n meanwhile: float16 would lose numbers as small as 1/n.
        """
        ids, count = self._ids(documents), len(documents[0].tokens)
        scaled = torch.as_tensor(weights * count, dtype=torch.float32, device=self.device)
        log_factors = torch.tensor(self.rope.candidate.factors, dtype=torch.float64, device=self.device).log()
        self.rope.log_factors = log_factors.requires_grad_()
        try:
            with self._kernel(), self._recomputing():
                hidden = self._hidden(ids)
                losses = torch.zeros(ids.shape[0], count - 1, device=self.device)
                upstream = torch.zeros_like(hidden)
                for rows in self._chunks(documents):
                    part = hidden[:, rows].detach().requires_grad_()
                    found = self._cross_entropy(part, ids[:, rows.start + 1 : rows.stop + 1])
                    (upstream[:, rows],) = torch.autograd.grad((found * scaled[:, rows]).sum(), part)
                    losses[:, rows] = found.detach()
                (gradient,) = torch.autograd.grad(hidden, log_factors, upstream)
        finally:
            self.rope.log_factors = None
        return losses.cpu().numpy(), (gradient / count).cpu().numpy()

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The decoder's last hidden states, [b, n, c].

        A mask of ones lets transformers leave causality to the attention kernel. Without any it looks for packed
        documents, and transformers 4.57 then makes a mask of n × n.
        """
        mask = torch.ones_like(ids, dtype=torch.bool)
        return self._decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def _cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # Widened inside the kernel: a float32 copy of the logits would be half of its memory traffic.
        log_probabilities = functional.log_softmax(self._head(hidden), dim=-1, dtype=torch.float32)
        return -log_probabilities.gather(-1, targets[..., None])[..., 0]

    def _chunks(self, documents: Sequence[Document]) -> Iterator[slice]:
        """The judged losses, as many at a time as their logits may take."""
        first = min(document.judged[0] for document in documents)
        end = max(document.judged[1] for document in documents)
        size = max(1, MAX_LOGITS[self.device.type] // (self._vocab * len(documents)))
        return (slice(start, min(start + size, end)) for start in range(first, end, size))

    def _ids(self, documents: Sequence[Document]) -> torch.Tensor:
        return torch.from_numpy(np.stack([document.tokens for document in documents])).to(self.device)

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


# --- loading ---------------------------------------------------------------------------------------------


def load_network(model: Model, dtype: torch.dtype) -> Any:
    """The model as transformers' own class. A folder is loaded by transformers; a GGUF file's tensors, which our own
    reader widens, are put into a model made from its config."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoint = model.checkpoint
    config = _full_attention(transformers.AutoConfig.for_model(**_plain_rope(checkpoint.config)))
    kind = transformers.AutoModelForCausalLM
    if checkpoint.format == "safetensors":
        return kind.from_pretrained(str(checkpoint.path), config=config, dtype=dtype, attn_implementation="sdpa")
    network = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    weights = {
        name: torch.from_numpy(checkpoint.read(name).astype(np.float32)).to(dtype) for name in checkpoint.tensors
    }
    missing, unexpected = network.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if model.shape.tied else set()
    if set(missing) - tied or unexpected:
        raise UnsupportedError(f"{model.reference}: transformers has other tensors: {missing}, {unexpected}")
    network.tie_weights()
    return network


def _plain_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A config without scaling: the rotation is ours, and a broken one would only stop transformers from loading."""
    kept = {key: value for key, value in config.items() if key not in ("rope_scaling", "auto_map")}
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = section.get("rope_theta", config.get("rope_theta"))
    parameters = {"rope_type": "default", **({"rope_theta": theta} if theta else {})}
    partial = section.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial:
        parameters["partial_rotary_factor"] = kept["partial_rotary_factor"] = partial
    if theta:
        kept["rope_theta"] = theta
    return {**kept, "rope_parameters": parameters}


def _full_attention(config: Any) -> Any:
    """Every layer attends to everything, as artifacts do, whose sliding window is the target."""
    config.sliding_window = None
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.attention_dropout = 0.0
    return config


def replace_rotation(decoder: Any, rope: TrialRope) -> None:
    """Put our rotation in the place of the decoder's; every layer rounds the tables to its own dtype."""
    if not isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
        raise UnsupportedError(f"{type(decoder).__name__} of transformers has no rotary_emb to replace")
    decoder.rotary_emb = rope
    dtype = next(decoder.parameters()).dtype

    def round_tables(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos.to(dtype), sin.to(dtype))}

    for layer in decoder.layers:
        layer.register_forward_pre_hook(round_tables, with_kwargs=True)


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


# --- processes -------------------------------------------------------------------------------------------


def _join_workers() -> tuple[int, int]:
    """How many processes torchrun started, and which one this is."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        # Only answers are exchanged, which are small and lie in main memory.
        dist.init_process_group("gloo")
    return size, dist.get_rank() if size > 1 else 0


def _device(name: str | None) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {str(error).partition(chr(10))[0]}") from error
    if device.type not in MAX_LOGITS:
        raise UsageError(f"--device {name}: a search runs on cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise EnvironmentFailure("--device cuda: this PyTorch sees no GPU", remedy="Use --device cpu")
        device = torch.device("cuda", device.index if device.index is not None else local)
        torch.cuda.set_device(device)
    return device


def _out_of_memory(error: BaseException) -> bool:
    """PyTorch says it by a class on a GPU and in words on a CPU."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error).lower() for word in words)
