# SPDX-License-Identifier: Apache-2.0
"""An extension in the processes that torchrun starts: one of them writes, and all go on together. A team, which shares
each document, writes what one process does."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.extending import PLAN, any_text, prose, write_wordy
from support.forks import MAIN, ForkedCommands, Process
from support.processes import ranks, torchrun
from support.staging import linux_only
from support.teams import ON_CPUS
from support.trained import REORDERED, assert_same_training

from lrconvert.errors import UsageError
from lrconvert.extending.api import extend
from lrconvert.extending.plan import load_plan, parse_plan
from lrconvert.recipe import load_recipe

EXTEND = """
import sys
from lrconvert.extending.api import extend
from lrconvert.extending.plan import parse_plan

model, text, output, plan, on, team = sys.argv[1:]
found = extend(
    model, texts=[text], output=output, plan=parse_plan(plan, "plan"), device="cpu", on=on or None, held_out=[text],
    context_parallel=int(team),
)
print([found.leading, found.path is not None, [stage.name for stage in found.stages]])
"""


TAKEN = ("seconds", "seconds_per_step", "peak_memory", "recomputed")
CALIBRATE = 'stage = [{kind = "calibrate", lengths = [64, 256]}]'


def in_two(training: ForkedCommands, *asked: Path | str, team: int = 1) -> list[str]:
    """What two processes print last, the leading one first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code, arguments = (EXTEND if team == 1 else ON_CPUS + EXTEND), [*map(str, asked), str(team)]
    started = [training.start(code, *arguments, environment={**environment, **each}) for each in ranks(2)]
    with ThreadPoolExecutor(2) as readers:
        printed = list(readers.map(Process.communicate, started))
    assert [process.wait() for process in started] == [0, 0], [error[-2000:] for _, error in printed]
    return [out.strip().splitlines()[-1] for out, _ in printed]


@linux_only
def test_one_process_writes(training: ForkedCommands, tmp_path: Path) -> None:
    """Both reach the end, the leading one with the recipe; a single process then finds every stage finished."""
    model, text, output = write_wordy(tmp_path / "wordy"), tmp_path / "text.txt", tmp_path / "tiny"
    text.write_text(prose(8000), encoding="utf-8")
    names = list(parse_plan(PLAN, "plan").names)
    lines = in_two(training, model, text, output, PLAN, "")
    assert lines == [str([True, True, names]), str([False, False, names])]
    recipe = load_recipe(output)
    results = {path: path.read_text() for path in (tmp_path / "tiny.work").glob("*/result.json")}
    assert len(results) == len(names)
    given = {"texts": [text], "held_out": [text], "device": "cpu"}
    again = extend(model, output=output, plan=parse_plan(PLAN, "plan"), force=True, **given)
    assert again.recipe.tiers == recipe.tiers
    assert {path: path.read_text() for path in results} == results
    assert recipe.adapter == "adapter"
    unseen = tmp_path / "unseen.npy"
    np.save(unseen, any_text(600, seed=5))  # of which every tenth of the training costs 2e-4 nats
    in_two(training, model, unseen, tmp_path / "two", CALIBRATE, output)
    calibrated = parse_plan(CALIBRATE, "plan")
    alone = extend(model, output=tmp_path / "one", plan=calibrated, on=output, **{**given, "texts": [unseen]})
    assert alone.stages[0].facts["share"] < 1
    assert load_recipe(tmp_path / "two").tiers == load_recipe(tmp_path / "one").tiers
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


@linux_only
def test_a_team_extends_as_one_process(training: ForkedCommands, tmp_path: Path) -> None:
    """Two processes that share every document, from the search of rows to retrieval and passkeys, as the command that
    torchrun starts; then a calibration. Rounding chooses no other set here."""
    model, text, plan = write_wordy(tmp_path / "wordy"), tmp_path / "text.txt", tmp_path / "plan.toml"
    text.write_text(prose(8000), encoding="utf-8")
    plan.write_text(PLAN, encoding="utf-8")
    two, one = tmp_path / "two", tmp_path / "one"
    command = [*torchrun(training.program(tmp_path / "lrconvert", ON_CPUS + MAIN)), "extend", model, "-o", two]
    given = ["--text", text, "--held-out", text, "--plan", plan, "--device", "cpu", "--context-parallel", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, [*command, *given])], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("3 tiers") == 1
    alone: dict[str, Any] = {"texts": [text], "held_out": [text], "device": "cpu"}
    extend(model, output=one, plan=load_plan(plan), **alone)
    assert_same_recipe(two, one)
    assert [load_recipe(each).provenance.stages[1]["facts"]["recomputed"] for each in (two, one)] == [True, False]
    trained, wanted = (next(folder.with_name(f"{folder.name}.work").glob("2-tune-*")) for folder in (two, one))
    assert_same_training(trained, wanted)
    unseen, calibrated = tmp_path / "unseen.npy", [tmp_path / "two-calibrated", tmp_path / "one-calibrated"]
    np.save(unseen, any_text(600, seed=5))
    in_two(training, model, unseen, calibrated[0], CALIBRATE, one, team=2)
    extend(model, output=calibrated[1], plan=parse_plan(CALIBRATE, "plan"), on=one, **{**alone, "texts": [unseen]})
    assert_same_recipe(*calibrated)


def assert_same_recipe(found: Path, wanted: Path) -> None:
    """The same sets, and what their search, their decision and their evaluation found, within rounding."""
    one, other = load_recipe(found), load_recipe(wanted)
    assert one.tiers == other.tiers
    assert _told(one.provenance.stages) == pytest.approx(_told(other.provenance.stages), rel=REORDERED)
    assert _told(one.evaluation) == pytest.approx(_told(other.evaluation), rel=REORDERED)


def _told(values: Any, where: str = "") -> dict[str, float]:
    """Every number of a record by its place, but for what a run took."""
    if isinstance(values, int | float):
        return {where: float(values)}
    if isinstance(values, list | tuple):
        values = dict(enumerate(values))
    parts = values.items() if isinstance(values, dict) else ()
    kept = [(key, part) for key, part in parts if key not in TAKEN]
    return {name: number for key, part in kept for name, number in _told(part, f"{where}/{key}").items()}


def test_stages_are_repeated_by_one_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others could take a result for finished that the leading process is about to delete."""
    model, text = write_wordy(tmp_path / "wordy"), tmp_path / "text.txt"
    text.write_text(prose(8000), encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--from needs a single process"):
        extend(model, texts=[text], output=tmp_path / "o", plan=parse_plan(PLAN, "p"), again="2-tune", device="cpu")
