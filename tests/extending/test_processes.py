# SPDX-License-Identifier: Apache-2.0
"""An extension in the processes that torchrun starts: one of them writes, and all go on together."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.extending import PLAN, any_text, prose, write_wordy
from support.forks import ForkedCommands, Process
from support.processes import ranks
from support.staging import linux_only

from lrconvert.errors import UsageError
from lrconvert.extending.api import extend
from lrconvert.extending.plan import parse_plan
from lrconvert.recipe import load_recipe

EXTEND = """
import sys
from lrconvert.extending.api import extend
from lrconvert.extending.plan import parse_plan

model, text, output, plan, on = sys.argv[1:]
found = extend(
    model, texts=[text], output=output, plan=parse_plan(plan, "plan"), device="cpu", on=on or None, held_out=[text]
)
print([found.leading, found.path is not None, [stage.name for stage in found.stages]])
"""


CALIBRATE = 'stage = [{kind = "calibrate", lengths = [64, 256]}]'


def in_two(training: ForkedCommands, *asked: Path | str) -> list[str]:
    """What two processes print last, the leading one first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [str(each) for each in asked]
    started = [training.start(EXTEND, *arguments, environment={**environment, **each}) for each in ranks(2)]
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


def test_stages_are_repeated_by_one_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others could take a result for finished that the leading process is about to delete."""
    model, text = write_wordy(tmp_path / "wordy"), tmp_path / "text.txt"
    text.write_text(prose(8000), encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--from needs a single process"):
        extend(model, texts=[text], output=tmp_path / "o", plan=parse_plan(PLAN, "p"), again="2-tune", device="cpu")
