# SPDX-License-Identifier: Apache-2.0
"""Who answers which question, in processes that are only thought of, and two real ones that train one model. Teams of
real ones are in test_context_parallel.py."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.extending import scaled, write_wordy
from support.forks import ForkedCommands, Process
from support.processes import ranks
from support.staging import linux_only
from support.trained import assert_same_training

from lrconvert.checkpoint import Model, open_model
from lrconvert.data import DATA
from lrconvert.errors import UsageError
from lrconvert.training import processes
from lrconvert.training.attention import check_kernel
from lrconvert.training.distilling import Teacher
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.processes import Workers
from lrconvert.training.rows import RowOptions, make_row
from lrconvert.training.tuning import StepRows, TuneOptions, Tuning, load_trainable


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(DATA.parents[1]), "OMP_NUM_THREADS": "1", **more}


def workers(count: int, rank: int, *, team: int = 1, together: bool = False) -> Workers:
    """One of `count` processes, without a process group."""
    made = Workers.__new__(Workers)
    made.count, made.rank, made.team, made.sharded = count, rank, team, together
    made._mesh = cast("Any", object()) if together else None
    return made


@pytest.mark.parametrize(
    ("team", "together", "questions", "answered"),
    [
        (1, False, 4, [0, 1, 2, 3]),
        (1, False, 2, [0, 1, None, None]),
        (1, True, 2, [0, 1, 1, 1]),  # who waits for others has to do what they do
        (2, True, 2, [0, 0, 1, 1]),
        (2, True, 1, [0, 0, 0, 0]),
        (4, True, 1, [0, 0, 0, 0]),
    ],
)
def test_every_team_answers_a_question(team: int, together: bool, questions: int, answered: list[int | None]) -> None:
    """And the answers that are gathered are the questions', in their order."""
    every = [workers(4, rank, team=team, together=together) for rank in range(4)]
    assert [each.own(questions) for each in every] == answered

    def everybody(box: list[Any], own: Any) -> None:
        box[:] = [None if index is None else f"answer {index}" for index in answered]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", everybody)
        assert every[0].gather("own", questions) == [f"answer {index}" for index in range(questions)]


def test_a_team_needs_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's ring has no kernel of a CPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--context-parallel needs GPUs"):
        Workers(torch.device("cpu"), team=2)


def test_models_that_follow_each_other_share_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process keeps those of every mesh to its end: an extension loads dozens of models."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name, answer in (("is_initialized", True), ("get_rank", 0)):
        monkeypatch.setattr(dist, name, lambda answer=answer: answer)
    monkeypatch.setattr(processes, "init_device_mesh", lambda *given, **more: object())
    processes._mesh.cache_clear()
    first, second, other = (Workers(torch.device("cuda"), team=team) for team in (2, 2, 4))
    processes._mesh.cache_clear()
    assert first._mesh is second._mesh is not other._mesh


def test_a_team_needs_a_kernel_of_the_ring() -> None:
    """Refused before anything is loaded, where it is named; the others are left to the measurement."""
    nothing: Model = None  # type: ignore[assignment]
    with pytest.raises(UsageError, match="every kernel but math"):
        LoadedModel(nothing, device="cpu", attention="math", team=2)
    for name in (None, "cudnn", "flash", "efficient"):
        check_kernel(name, team=2)
    check_kernel("math")


# --- fine-tuning in two processes ----------------------------------------------------------------------------

TUNED = """
import json, os, sys
from pathlib import Path
import numpy as np
from lrconvert.checkpoint import open_model
from lrconvert.rope import Tier
from lrconvert.training.distilling import Teacher
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.rows import RowOptions, make_row
from lrconvert.training.tuning import FORWARD_TOKENS, StepRows, TuneOptions, Tuning, load_trainable

FORWARD_TOKENS["cpu"] = 48  # a pass for every row: processes that wait for each other need equally many
model, folder = open_model(sys.argv[1]), Path(sys.argv[2])
text = np.random.default_rng(0).integers(3, 500, 2000)
tier = Tier(256, tuple(np.linspace(1.0, 4.0, model.shape.rotary_dim // 2).tolist()), 4, 1.1)

def rows_of(step):  # three for two processes: one has a row more
    made = RowOptions(48, 256, (1, 2))
    return StepRows(tier, tuple(make_row([text], made, None, np.random.default_rng([step, i])) for i in range(3)))

def tune(name, method="lora", sharded=False, stop=None, shares=None, taught=False):
    options = TuneOptions(method=method, steps=3, rank=4, warmup=1, rate=1e-2)
    loaded, trainable = load_trainable(model, options, device="cpu", dtype="float32", sharded=sharded)
    aim = Teacher(LoadedModel(model, device="cpu", dtype="float32"), 16, lambda length: tier, 48) if taught else None
    done = []
    def watch(result):
        done.append(result.step)
        if result.step == stop:
            raise KeyboardInterrupt
    tuning = Tuning(loaded, options, rows_of, folder / name, teacher=aim, every=0)
    try:
        tuning.run(watch)
    except KeyboardInterrupt:
        return done
    trainable.save(loaded, folder / name / "adapter")
    if shares is not None:
        weight = loaded.decoder.layers[0].mlp.up_proj.weight
        shares.append(weight.to_local().numel() / weight.numel())
    return done

rank, told = os.environ["RANK"], {"shares": []}
tune("data")
tune("lora", sharded=True)
tune("taught", sharded=True, taught=True)
tune("full", "full", sharded=True, shares=told["shares"])
told["broken"] = [tune("broken", sharded=True, stop=1), tune("broken", sharded=True)]
tune("torn", sharded=True, stop=1)
if rank == "1":  # killed before it saved what the other one has
    next((folder / "torn").glob("*.1-of-2.state.safetensors")).unlink()
told["torn"] = tune("torn", sharded=True)
print(json.dumps(told))
"""


@linux_only
@pytest.mark.parametrize("count", [2])
def test_two_processes_train_as_one(count: int, training: ForkedCommands, tmp_path: Path) -> None:
    """With plain data parallelism, with the weights in parts (FSDP), and so beside a teacher that each has whole:
    losses, gradient norms and adapters are those of one process. Weights in parts go on after an interruption as if
    there had been none, and start again where one process lacks its part of the state."""
    folder = write_wordy(tmp_path / "wordy")
    started = [
        training.start(TUNED, str(folder), str(tmp_path), environment=environment(**each)) for each in ranks(count)
    ]
    with ThreadPoolExecutor(count) as readers:
        said = list(readers.map(Process.communicate, started))
    assert [process.wait() for process in started] == [0] * count, said[0][1][-3000:] + said[-1][1][-3000:]
    told = json.loads(said[0][0].strip().splitlines()[-1])
    assert told["shares"] == [0.5]
    for method in ("lora", "full"):
        alone(open_model(folder), method, tmp_path / f"one-{method}")
    alone(open_model(folder), "lora", tmp_path / "one-taught", taught=True)
    for name, one in (("data", "one-lora"), ("lora", "one-lora"), ("full", "one-full"), ("taught", "one-taught")):
        assert_same_training(tmp_path / name, tmp_path / one)
    # A whole state of step 0 and one more step; then the rest.
    assert told["broken"] == [[0, 1], [1, 2]] and told["torn"] == [0, 1, 2]
    for name in ("broken", "torn"):
        assert_same_training(tmp_path / name, tmp_path / "lora", 0)


def alone(model: Model, method: Any, folder: Path, taught: bool = False) -> None:
    """What the script does, in this process."""
    text = np.random.default_rng(0).integers(3, 500, 2000)

    def rows_of(step: int) -> StepRows:
        seeds = [np.random.default_rng([step, index]) for index in range(3)]
        rows = tuple(make_row([text], RowOptions(48, 256, (1, 2)), None, rng) for rng in seeds)
        return StepRows(scaled(model, 256), rows)

    options = TuneOptions(method=method, steps=3, rank=4, warmup=1, rate=1e-2)
    loaded, trainable = load_trainable(model, options, device="cpu", dtype="float32")
    teacher = LoadedModel(model, device="cpu", dtype="float32")
    aim = Teacher(teacher, 16, lambda length: scaled(model, 256), 48) if taught else None
    Tuning(loaded, options, rows_of, folder, teacher=aim).run()
    trainable.save(loaded, folder / "adapter")
