# SPDX-License-Identifier: Apache-2.0
"""Two processes that share each document compute what one computes of it: losses, gradients, a whole training.

On CPUs, with the ring attention that PyTorch has for GPUs (`support.cpu_ring`). tests/gpu/test_teams.py asks the same
of two GPUs.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.extending import write_wordy
from support.forks import ForkedCommands, Process
from support.processes import ranks
from support.staging import linux_only
from support.teams import AGAIN, ANSWERS, ASK, KEPT, LENGTH, ON_CPUS, save_answers, tune
from support.trained import assert_same_training, log_of

from lrconvert.checkpoint import open_model

pytestmark = linux_only
ALONE: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
# float32, added up in another order: gradients differ by 1e-6 of their length, and with any mistake that was tried by
# more than 1e-2.
ROUNDING = 1e-5


def share(training: ForkedCommands, count: int, folder: Path, model: Path, answers: bool, *trainings: Any) -> Any:
    """Have `count` processes, in teams of two, do what `support.teams` says; what the leading one prints."""
    asked = {"model": str(model), "machine": {**ALONE, "team": 2}, "answers": answers, "trainings": trainings}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        training.start(ON_CPUS + ASK, str(folder), json.dumps(asked), environment={**environment, **rank})
        for rank in ranks(count)
    ]
    with ThreadPoolExecutor(count) as readers:
        said = list(readers.map(Process.communicate, started))
    assert [process.wait() for process in started] == [0] * count, "\n".join(error[-2000:] for _, error in said)
    return json.loads(said[0][0].strip().splitlines()[-1])


@dataclass(frozen=True)
class Case:
    """What two processes left, and one alone."""

    two: Path
    one: Path
    model: Path
    steps: list[list[int]]  # of each training


@pytest.fixture(scope="module")
def case(training: ForkedCommands, tmp_path_factory: pytest.TempPathFactory) -> Case:
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    path = write_wordy(two / "wordy")
    shard = {"sharded": True}
    asked = [("whole", {}), ("broken", {"stop": 1}), ("broken", {}), ("sharded", shard), ("torn", {**shard, "stop": 2})]
    steps = share(training, 2, two, path, True, *asked, ("torn", shard))
    model = open_model(path)
    save_answers(model, one, **ALONE)
    tune(model, one, **ALONE)
    return Case(two, one, path, steps)


def test_gradients_are_those_of_one_process(case: Case) -> None:
    """Of rows with jumps, whose length is not a multiple of what a team shares: every loss, what a search and an
    evaluation ask for, and the gradient of every weight; with activations kept, and with those computed again."""
    with np.load(case.two / ANSWERS) as found, np.load(case.one / ANSWERS) as wanted:
        assert found.keys() == wanted.keys() and f"{AGAIN}, weight 32" in wanted
        for name, values in wanted.items():
            size = np.linalg.norm(values.astype(float))
            assert size > 0 and np.linalg.norm(found[name].astype(float) - values) <= ROUNDING * size, name
        assert found[KEPT].shape == (2, LENGTH - 1)


def test_a_training_is_that_of_one_process(case: Case) -> None:
    """Several rows a step, of text and of keys, in several passes; then other lengths under another set."""
    assert_same_training(case.two / "whole", case.one)
    told = log_of(case.two / "whole")
    assert [line["tokens"] for line in told] == [510, 128, 97, 510]
    assert ["answers" in line for line in told] == [True, False, True, True]


def test_with_weights_in_parts_too(case: Case) -> None:
    """FSDP over all processes of the team: each has a part of the weights and a part of every row."""
    assert_same_training(case.two / "sharded", case.one)


def test_it_goes_on_as_if_not_interrupted(case: Case) -> None:
    """From the last whole state, to the last digit."""
    whole, *broken = case.steps[:3]
    assert (whole, broken) == ([0, 1, 2, 3], [[0, 1], [1, 2, 3]])
    assert_same_training(case.two / "broken", case.two / "whole", 0)
    assert case.steps[4:] == [[0, 1, 2], [2, 3]]
    assert_same_training(case.two / "torn", case.two / "sharded", 0)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_teams_share_the_rows(sharded: bool, case: Case, training: ForkedCommands, tmp_path: Path) -> None:
    """Four processes: each team has every second row of a step, or one that counts nothing."""
    share(training, 4, tmp_path, case.model, False, ("four", {"sharded": sharded}))
    assert_same_training(tmp_path / "four", case.one)
