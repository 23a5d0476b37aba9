# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: which weights train, the loop over steps, and its exact continuation after an interruption.

PEFT makes and writes the adapter; PyTorch has the optimizer. The model computes in its own dtype (bf16 on a GPU); the
optimizer works on float32 copies, since a step of a small learning rate is less than bf16's last digit.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.adapter import PREFIX, merged, open_adapter
from lrconvert.checkpoint.fold import refuse_training
from lrconvert.errors import InputError, UnsupportedError, require
from lrconvert.shortage import is_shortage
from lrconvert.training.adapter_file import write_weights
from lrconvert.training.distilling import Teacher
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.projections import PROJECTIONS
from lrconvert.training.rows import Row, StepRows

LOG, STATE = "log.jsonl", "state.safetensors"
FORWARD_TOKENS = {"cpu": 4096, "cuda": 65536}  # short rows share a forward pass up to this many tokens
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0  # of the gradient
# A killed run repeats the steps since its last state: a few, and saving takes no more than this share of the time.
SAVED_EVERY, SAVING_SHARE = 3.0, 0.05

Method = Literal["lora", "full"]
Projections = Literal["all", "attention", "turned"]


@dataclass(frozen=True)
class TuneOptions:
    """How weights are trained. Embeddings and head stay frozen: they know nothing of positions.

    `lora` trains an adapter of `rank` on `projections`, and the norms; `full` all weights of the blocks, and the last
    norm.
    `norm_rate` is the learning rate of norms, `answer_weight` what the mean loss of answers counts beside the mean loss
    of text. Rates rise over `warmup` steps, then fall along a cosine to `final` of themselves.
    """

    method: Method = "lora"
    steps: int = 200
    rate: float = 1e-3
    norm_rate: float = 2e-4
    rank: int = 32
    projections: Projections = "all"
    warmup: int = 8
    final: float = 0.05
    answer_weight: float = 0.5
    weight_decay: float = 0.0
    seed: int = 0

    def share(self, step: int) -> float:
        """Of the learning rates, at a step (from 0)."""
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        return rising * (self.final + (1 - self.final) * cosine)


@dataclass(frozen=True)
class StepResult:
    """One step done. Losses are means in nats: of text, and of answers where there were any."""

    step: int
    kind: str
    text: float
    answers: float | None
    gradient_norm: float
    seconds: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        rounded = {"seconds": round(self.seconds, 3)}
        return {key: value for key, value in {**self.__dict__, **rounded}.items() if value is not None}


Watch = Callable[[StepResult], None]


# --- which weights train ---------------------------------------------------------------------------------


class Trainable:
    """A model prepared for `TuneOptions`: `adapt` is what `LoadedModel` calls; then `model` is loaded.

    `adapter` is the folder of one that goes on training; of full fine-tuning it is merged already. `base` is what the
    adapter will call its model. Raises `InputError` where the adapter is of another rank.
    """

    def __init__(self, options: TuneOptions, adapter: Path | None = None, base: str | None = None) -> None:
        self.options, self.adapter, self.base = options, adapter, base
        self.peft: Any = None

    def adapt(self, network: Any) -> None:
        peft = require("peft", "train", "fine-tuning")
        if self.options.method == "full":
            decoder = network.get_decoder()
            for part in (decoder.layers, decoder.norm):
                part.requires_grad_(True)
            return
        norms = sorted({name.rpartition(".")[2] for name, module in network.named_modules() if _is_norm(module)})
        if self.adapter is not None:
            with _quiet():
                self.peft = peft.PeftModel.from_pretrained(
                    network, str(self.adapter), is_trainable=True, autocast_adapter_dtype=False
                )
            if (rank := self.peft.peft_config["default"].r) != self.options.rank:
                raise InputError(f"{self.adapter} has rank {rank}, not {self.options.rank}")
        else:
            there = {name.rpartition(".")[2] for name, _ in network.named_modules()}
            config = peft.LoraConfig(
                r=self.options.rank,
                lora_alpha=self.options.rank,
                target_modules=[name for name in PROJECTIONS[self.options.projections] if name in there],
                modules_to_save=norms,
                task_type="CAUSAL_LM",
            )
            with torch.random.fork_rng(), _quiet():
                torch.manual_seed(self.options.seed)
                self.peft = peft.get_peft_model(network, config, autocast_adapter_dtype=False)

    def save(self, model: LoadedModel, folder: Path) -> None:
        """What was trained, as an adapter in PEFT layout; after full fine-tuning it replaces whole tensors.

        Every process calls it, and the leading one writes.
        """
        network = model.network if self.peft is None else self.peft
        trained = {name: _whole(weight).cpu() for name, weight in network.named_parameters() if weight.requires_grad}
        if not model.workers.rank:
            folder.mkdir(parents=True, exist_ok=True)
            config, tensors = self._adapter(trained)
            config.inference_mode, config.base_model_name_or_path = True, self.base
            config.save_pretrained(str(folder))
            write_weights(tensors, folder)
        model.workers.everyone(None)  # nobody reads it before it is whole

    def _adapter(self, trained: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
        """PEFT's config, and the tensors under the names that its files have."""
        import peft

        if self.peft is not None:
            found = peft.get_peft_model_state_dict(self.peft, trained, save_embedding_layers=False)
            config = copy.copy(self.peft.peft_config["default"])
            config.target_modules = sorted(config.target_modules)  # a set: its order is another one in every process
            return config, found
        modules = sorted({name.rpartition(".")[0] for name in trained})
        nothing = peft.utils.constants.DUMMY_TARGET_MODULES  # otherwise it would not load what has no pairs
        config = peft.LoraConfig(r=1, target_modules=nothing, modules_to_save=modules, task_type="CAUSAL_LM")
        return config, {PREFIX + name: tensor for name, tensor in trained.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, PEFT's own use of an old name in transformers is not reported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1 and not list(module.children())


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """Of a weight that processes share, all of it."""
    gather = getattr(weight, "full_tensor", None)
    return (weight if gather is None else gather()).detach()


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Of a weight that processes share, this one's part."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


# --- the loop --------------------------------------------------------------------------------------------


class Tuning:
    """A run of fine-tuning. `rows_of(step)` makes the rows of a step; `folder` has the state and the log. With a
    `teacher`, losses of text are divergences from what that says.

    A run that finds its state goes on from it: with the same rows and the same state of the optimizer, losses are those
    of a run without interruption.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: TuneOptions,
        rows_of: Callable[[int], StepRows],
        folder: Path,
        *,
        teacher: Teacher | None = None,
        every: float = SAVED_EVERY,
    ) -> None:
        self.model, self.options, self.rows_of, self.folder = model, options, rows_of, folder
        self.teacher = teacher
        self._every = every  # seconds between two saved states, at least; 0: every step is saved
        self._saving = 0.0  # seconds that the last one took
        self._masters = [_own(weight.detach()).float().clone() for weight in model.trainable]
        norms = [index for index, weight in enumerate(model.trainable) if weight.ndim == 1]
        groups = [
            {"params": [m for i, m in enumerate(self._masters) if (i in norms) == is_norm], "base": rate, "lr": rate}
            for is_norm, rate in ((False, options.rate), (True, options.norm_rate))
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=BETAS, weight_decay=options.weight_decay
        )
        self.step = 0
        self._restore()

    def run(self, watch: Watch | None = None) -> None:
        """Train to the last step. Raises `InputError` where a loss is no number."""
        saved = time.monotonic()
        while self.step < self.options.steps:
            result = self._train(self.rows_of(self.step))
            self.step += 1
            self._write_log(result)
            if watch is not None:
                watch(result)
            pause = max(self._every, self._saving / SAVING_SHARE) if self._every else 0.0
            due = time.monotonic() - saved >= pause or self.step == self.options.steps
            if self.model.workers.agree(due) if self.model.workers.sharded else due:
                started = time.monotonic()
                self._save()
                saved = time.monotonic()
                self._saving = saved - started

    def _train(self, given: StepRows) -> StepResult:
        started = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * self.options.share(self.step)
        self.model.rotation = given.rotation
        counts = [sum(int(mask.sum()) for mask in masks) for masks in _masks(given.rows)]
        sums = self.model.workers.sum_of_all(self._gradients(given.rows, counts))
        self.model.workers.sum_gradients(self.model.trainable)
        norm = self._update()
        text, answers = (float(total / count) if count else None for total, count in zip(sums, counts, strict=True))
        if not np.isfinite(sums).all() or not math.isfinite(norm):
            raise InputError(f"step {self.step}: the loss is not a number", remedy="Use a smaller learning rate")
        tokens = sum(len(row.tokens) for row in given.rows)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return StepResult(self.step, given.kind, text or 0.0, answers, norm, time.perf_counter() - started, tokens)

    def _gradients(self, rows: Sequence[Row], counts: list[int]) -> np.ndarray:
        """Add up the gradients of this process's rows; the sums of their losses of text and of answers.

        Where memory is short, from the first row again with activations recomputed: a backward pass that failed may
        have added some of its gradients. Processes that wait for each other can't do that one by one.
        """
        try:
            return sum((self._backward(batch, counts) for batch in self._batches(rows)), np.zeros(2))
        except RuntimeError as error:
            if not is_shortage(error) or self.model.recompute or self.model.workers.together:
                raise
        for weight in self.model.trainable:
            weight.grad = None
        self.model.free()
        self.model.recompute = True
        return self._gradients(rows, counts)

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """This process's rows, those of equal length together as far as they fit a forward pass.

        Processes that wait for each other have equally many: one with fewer repeats a row that counts nothing.
        """
        workers, most = self.model.workers, FORWARD_TOKENS[self.model.device.type]
        own = list(rows[workers.rank // workers.team :: workers.width])
        size = max(1, most // max(len(row.tokens) for row in rows))
        share = -(-len(rows) // workers.width)
        if workers.together and len(own) < share:
            nothing = np.zeros(len(rows[0].tokens) - 1, bool)
            own.append(Row(rows[0].tokens, rows[0].positions, nothing, nothing))
        for start in range(0, len(own), size):
            yield own[start : start + size]

    def _backward(self, batch: list[Row], counts: list[int]) -> np.ndarray:
        """Add a batch's gradients; its sums of the losses of text and of answers."""
        tokens, at = np.stack([row.tokens for row in batch]), np.stack([row.positions for row in batch])
        text, answers = (np.stack(masks) for masks in _masks(batch))
        weights = text / max(counts[0], 1) + self.options.answer_weight * answers / max(counts[1], 1)
        taught = None if self.teacher is None else self.teacher.of(tokens, text)
        losses = self.model.backward(tokens, weights, at, taught)
        return np.array([losses[text].sum(dtype=np.float64), losses[answers].sum(dtype=np.float64)])

    def _update(self) -> float:
        """One step of the optimizer; the gradient's norm before it was cut."""
        weights = self.model.trainable
        for master, weight in zip(self._masters, weights, strict=True):
            grad = weight.grad
            master.grad = torch.zeros_like(master) if grad is None else _own(grad).float()
            weight.grad = None
        squares = [master.grad.square().sum() for master in self._masters if master.grad is not None]
        norm = self.model.workers.norm(squares, weights)
        if norm > LARGEST_NORM:
            for master in self._masters:
                if master.grad is not None:
                    master.grad.mul_(LARGEST_NORM / norm)
        self._optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self._masters, weights, strict=True):
                _own(weight).copy_(master)
        return norm

    # --- state -------------------------------------------------------------------------------------------

    @property
    def _states(self) -> dict[int, Path]:
        """This process's states on the disk, by their steps: with weights in parts each process keeps its own."""
        return {int(path.name.partition(".")[0]): path for path in self.folder.glob(f"*.{self._name}")}

    @property
    def _name(self) -> str:
        workers = self.model.workers
        return f"{workers.rank}-of-{workers.count}.{STATE}" if workers.sharded else STATE

    def _save(self) -> None:
        """An old state goes away when the new one is whole in all processes: they go on from the same step."""
        workers = self.model.workers
        if not workers.sharded and workers.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"master.{i}": master for i, master in enumerate(self._masters)}
        for index, master in enumerate(self._masters):
            for name, value in self._optimizer.state.get(master, {}).items():
                tensors[f"{name}.{index}"] = value
        old = self._states
        path = self.folder / f"{self.step}.{self._name}"
        temporary = path.with_suffix(".tmp")
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
        temporary.replace(path)
        if workers.sharded:
            workers.everyone(None)
        for step, before in old.items():
            if step != self.step:
                before.unlink()

    def _restore(self) -> None:
        found, workers = self._states, self.model.workers
        common = set.intersection(*map(set, workers.everyone(found) if workers.sharded else [found]))
        if not common:
            (self.folder / LOG).unlink(missing_ok=True)
            return
        self.step = max(common)
        tensors = load_file(found[self.step])
        with torch.no_grad():
            for index, (master, weight) in enumerate(zip(self._masters, self.model.trainable, strict=True)):
                master.copy_(tensors[f"master.{index}"])
                _own(weight).copy_(master)
                names = ("step", "exp_avg", "exp_avg_sq")
                self._optimizer.state[master] = {
                    name: tensors[f"{name}.{index}"].to("cpu" if name == "step" else master.device) for name in names
                }
        if not self.model.workers.rank and (log := self.folder / LOG).is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text("".join(lines[: self.step]), encoding="utf-8")

    def _write_log(self, result: StepResult) -> None:
        if self.model.workers.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.to_json()) + "\n")


def _masks(rows: Sequence[Row]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [row.text for row in rows], [row.answers for row in rows]


def load_trainable(
    model: Model, options: TuneOptions, adapter: Path | None = None, *, base: str | None = None, **machine: Any
) -> tuple[LoadedModel, Trainable]:
    """The model in memory with the weights of `options` trainable; `machine` is what `LoadedModel` takes. A team
    recomputes activations from the start."""
    refuse_training(model)
    if options.method == "full" and model.shape.experts is not None:
        raise UnsupportedError(
            f"{model.reference}: full fine-tuning of experts, which transformers joins in memory, is not written back",
            remedy="Train an adapter with the method lora: of attention and norms",
        )
    trainable = Trainable(options, adapter, base)
    if adapter is not None and options.method == "full":
        model = merged(model, open_adapter(adapter))
    loaded = LoadedModel(model, adapt=trainable.adapt, purpose="fine-tuning", **machine)
    # Memory is what a team is for, and its processes can't find out one by one that a step did not fit.
    loaded.recompute = loaded.workers.team > 1
    return loaded, trainable
