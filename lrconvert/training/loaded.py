# SPDX-License-Identifier: Apache-2.0
"""A model in memory: losses of tokens under a rotation, and their gradient in ln λ or in the weights.

Shapes: b documents, n tokens, c hidden channels, d rotated channels. Of a team (`processes`) every process has its part
of the n. Positions are [b, n], or [n] where all documents share them; None: 0 … n − 1.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrconvert.checkpoint.fold import in_weights
from lrconvert.errors import UnsupportedError
from lrconvert.shortage import is_shortage
from lrconvert.training.attention import PROBE_TOKENS, check_kernel, choose_kernel, use_kernel
from lrconvert.training.devices import default_dtype, free_memory, process_device
from lrconvert.training.losses import (
    Taught,
    chunked_choices,
    chunked_gradient,
    chunked_losses,
    chunks,
    of_targets,
    of_teacher,
)
from lrconvert.training.network import fuse_norms, load_network, recomputing
from lrconvert.training.processes import Workers
from lrconvert.training.rotation import Rotation, TrialRope, replace_rotation

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model

Tokens = NDArray[np.int64]


def _capped(network: Any, cap: float) -> Any:
    """From hidden states to logits, within ±`cap` where that isn't 0."""
    head = network.get_output_embeddings()
    return head if cap == 0.0 else lambda hidden: cap * torch.tanh(head(hidden) / cap)


class LoadedModel:
    """A checkpoint's network on this process's device, with a rotation that can be exchanged. Its weights are frozen,
    except for those that `adapt` lets train: it is called with the network before that is placed and sharded.

    `device` and `dtype` default to what `devices` says, `attention` names one of `attention.KERNELS`: on a GPU the
    fastest is the default, a CPU has its own. `team` and `sharded` are those of `Workers`. `purpose` is what an error
    says that the model is for.
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
        purpose: str = "a search",
        adapt: Callable[[Any], None] | None = None,
    ) -> None:
        check_kernel(attention, team)
        self.device: torch.device = process_device(device, purpose)
        self.workers = Workers(self.device, team=team, sharded=sharded)
        self.dtype: torch.dtype = getattr(torch, dtype or default_dtype(self.device.type, purpose))
        self.vocab = model.shape.vocab
        model = in_weights(model, rounded=False)
        self._logits = model.shape.multipliers.logits
        own = model.shape.plain_theta
        if own is not None and team > 1:
            raise UnsupportedError(
                f"{model.reference}: layers with a sliding window can't share a document among GPUs: PyTorch's context "
                "parallelism knows no window",
                remedy="Do without --context-parallel",
            )
        self.rope = TrialRope(model.shape.theta, model.shape.rotary_dim, own)
        self.network = load_network(model, self.dtype).eval()
        self.network.requires_grad_(False)
        self.decoder, self.head = self.network.get_decoder(), _capped(self.network, model.shape.logits_cap)
        replace_rotation(self.decoder, self.rope)
        fuse_norms(self.network)
        if adapt is not None:
            adapt(self.network)
        self.workers.place(self.network, self.decoder.layers, self.device)
        # Afterwards: where processes share weights, their parts are other objects.
        self.trainable = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.recompute = False  # activations in a backward pass
        self.attention: str | None = None
        if self.device.type == "cuda":  # the same in every process, or a loss would depend on who computes it
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's reasons why it does not use the other kernels
                # The name too: of a search that goes on, the leading process alone knows its kernel.
                named = self.workers.agree(attention)
                self.attention = self.workers.agree(choose_kernel(named, self._time_kernel))
            check_kernel(self.attention, team)

    @property
    def rotation(self) -> Rotation:
        """What the model is rotated with; any value with factors, start tokens and an attention factor."""
        return self.rope.rotation

    @rotation.setter
    def rotation(self, rotation: Rotation) -> None:
        self.rope.rotation = rotation

    # --- losses ------------------------------------------------------------------------------------------

    def losses(
        self, tokens: Tokens, judged: tuple[int, int] | None = None, at: Tokens | None = None
    ) -> NDArray[np.float32]:
        """Losses in nats of documents [b, n] of equal length: [b, n − 1], entry t of token t + 1.

        Only entries within `judged` (first, end) are computed, the others are zero; None: all, as a team always does.
        `at`: positions.
        """
        ids, positions, targets = self._tensors(tokens, at)
        # Not inference_mode: FSDP keeps buffers that it makes here, and a gradient needs them later.
        with torch.no_grad(), use_kernel(self.attention), self.workers.spread(ids, positions, targets):
            hidden = self.hidden(ids, positions)
            found = chunked_losses(self.head, hidden, targets, self._parts(targets, judged))
            return self._numbers(found, tokens)

    def scores(self, tokens: Tokens, judged: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Of the last `judged` of one document's tokens [n]: losses in nats, and whether each is the first choice."""
        ids, positions, targets = self._tensors(tokens[None], None)
        last = (len(tokens) - judged - 1, len(tokens) - 1)
        with torch.no_grad(), use_kernel(self.attention), self.workers.spread(ids, positions, targets):
            hidden = self.hidden(ids, positions)
            parts = self._parts(targets, last)
            losses = self._numbers(chunked_losses(self.head, hidden, targets, parts), tokens[None])
            choices = self._numbers(chunked_choices(self.head, hidden, targets, parts), tokens[None])
        return losses[0, last[0] :].astype(np.float64), choices[0, last[0] :]

    def losses_and_gradient(
        self,
        tokens: Tokens,
        weights: NDArray[np.float64],
        judged: tuple[int, int] | None = None,
        at: Tokens | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Losses as `losses`, and d Σ weights·losses / d ln λ_i, shape [d/2]; `weights` [b, n − 1].

        The gradient at the hidden states is made in chunks, then taken back through the decoder at once. Weights are
        multiplied by n meanwhile: float16 would lose numbers as small as 1/n.
        """
        ids, positions, targets = self._tensors(tokens, at)
        count = tokens.shape[1]
        scaled = self._weights(weights * count, ids)
        log_factors = torch.tensor(self.rotation.factors, dtype=torch.float64, device=self.device).log()
        self.rope.log_factors = log_factors.requires_grad_()
        try:
            with use_kernel(self.attention), self._memory(), self.workers.spread(ids, positions, targets, scaled):
                hidden = self.hidden(ids, positions)
                losses_of = of_targets(self.head, targets)
                found, upstream = chunked_gradient(hidden, losses_of, scaled, self._parts(targets, judged))
                (gradient,) = torch.autograd.grad(hidden, log_factors, upstream)
                losses = self._numbers(found, tokens)
        finally:
            self.rope.log_factors = None
        return losses, (self.workers.total(gradient) / count).cpu().numpy()

    def backward(
        self,
        tokens: Tokens,
        weights: NDArray[np.float64],
        at: Tokens | None = None,
        taught: Taught | None = None,
    ) -> NDArray[np.float32]:
        """Losses as `losses`, or divergences where something is `taught`; d Σ weights·losses is added to the gradients
        of `trainable`. The head stays as it is."""
        ids, positions, targets = self._tensors(tokens, at)
        scaled = self._weights(weights, ids)
        with use_kernel(self.attention), self._memory(), self.workers.spread(ids, positions, targets, scaled):
            hidden = self.hidden(ids, positions)
            losses_of = of_targets(self.head, targets) if taught is None else of_teacher(self.head, targets, taught)
            found, upstream = chunked_gradient(hidden, losses_of, scaled, self._parts(targets, None))
            hidden.backward(upstream)
            return self._numbers(found, tokens)

    def _memory(self) -> AbstractContextManager[None]:
        return recomputing(self.network) if self.recompute else contextlib.nullcontext()

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The decoder's last hidden states, [b, n, c], as the head takes them.

        A mask of ones lets transformers leave causality to the attention kernel. Without any it looks for packed
        documents, and transformers 4.57 then makes a mask of n × n.
        """
        mask = torch.ones_like(ids, dtype=torch.bool)
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        return self.run(**given, use_cache=False)

    def run(self, **given: Any) -> torch.Tensor:
        """The decoder's last hidden states times the multiplier of logits, which transformers applies neither in the
        decoder nor in the head."""
        hidden = self.decoder(**given).last_hidden_state
        return hidden if self._logits == 1.0 else hidden * self._logits

    def _tensors(self, tokens: Tokens, at: Tokens | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [b, n], their positions ([1, n] where rows share them), and the token that each predicts, [b, n]; n
        rounded up to what a team can share. The padding is at the end, where no token sees it."""
        padding = -tokens.shape[1] % self.workers.multiple
        ids = torch.from_numpy(np.pad(tokens, ((0, 0), (0, padding)))).to(self.device)
        at = np.arange(tokens.shape[1]) if at is None else at
        positions = torch.from_numpy(np.pad(np.atleast_2d(at), ((0, 0), (0, padding)), mode="edge")).to(self.device)
        return ids, positions, ids.roll(-1, dims=1)

    def _weights(self, weights: NDArray[np.float64], ids: torch.Tensor) -> torch.Tensor:
        """[b, n − 1] as [b, n], padding included: zero there."""
        padded = np.pad(weights, ((0, 0), (0, ids.shape[1] - weights.shape[1])))
        return torch.as_tensor(padded, dtype=torch.float32, device=self.device)

    def _parts(self, targets: torch.Tensor, judged: tuple[int, int] | None) -> list[slice]:
        """Chunks of the judged tokens. The members of a team have parts from here and there, and judge all."""
        rows, count = targets.shape
        first, end = judged if judged is not None and self.workers.team == 1 else (0, count)
        return chunks(first, end, vocab=self.vocab, rows=rows, device=self.device)

    def _numbers(self, losses: torch.Tensor, tokens: Tokens) -> NDArray[Any]:
        """[b, n − 1]: without the last token, which predicts nothing, and without the padding."""
        return self.workers.whole(losses)[:, : tokens.shape[1] - 1].cpu().numpy()

    # --- the machine -------------------------------------------------------------------------------------

    def largest_fitting(self, length: int) -> int:
        """The longest document, in sixteenths of `length`, whose losses fit the memory; 0 when none does."""
        step = max(length // 16, 2)
        least, most = 0, 16
        while most - least > 1:
            middle = (least + most) // 2
            if self._fits(middle * step):
                least = middle
            else:
                most = middle
        return least * step

    def free(self) -> None:
        """Give back memory after an error; outside of its `except` block."""
        free_memory(self.device)

    def describe(self) -> dict[str, Any]:
        """Device, precision, attention kernel and versions."""
        import transformers

        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.attention,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _any_tokens(self, length: int) -> Tokens:
        return (np.arange(length, dtype=np.int64) % self.vocab)[None]

    def _fits(self, length: int) -> bool:
        try:
            self.losses(self._any_tokens(length))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
        else:
            return True
        self.free()
        return False

    def _time_kernel(self, name: str) -> float | None:
        """Seconds of the faster of two passes after a first one, backward too where weights train; None where the
        kernel refuses."""
        before, self.attention = self.attention, name
        tokens, times = self._any_tokens(PROBE_TOKENS), []
        try:
            for _ in range(3):
                torch.cuda.synchronize(self.device)
                started = time.perf_counter()
                self._probe(tokens)
                torch.cuda.synchronize(self.device)
                times.append(time.perf_counter() - started)
        except RuntimeError:  # no such kernel for this card, dtype or shape; out of memory is one too
            times = []
        finally:
            self.attention = before
        if not times:
            self.free()
            return None
        return min(times[1:])

    def _probe(self, tokens: Tokens) -> None:
        if not self.trainable:
            self.losses(tokens, (0, 1))
            return
        self.backward(tokens, np.zeros((1, tokens.shape[1] - 1)))
        for weight in self.trainable:
            weight.grad = None
