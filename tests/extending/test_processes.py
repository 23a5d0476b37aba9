# SPDX-License-Identifier: Apache-2.0
"""An extension in the processes that torchrun starts: one of them writes, and all go on together."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.extending import PLAN, prose, write_wordy
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

found = extend(sys.argv[1], texts=[sys.argv[2]], output=sys.argv[3], plan=parse_plan(sys.argv[4], "plan"), device="cpu")
print([found.leading, found.path is not None, [stage.name for stage in found.stages]])
"""


@linux_only
def test_one_process_writes(training: ForkedCommands, tmp_path: Path) -> None:
    """Both reach the end, the leading one with the recipe; a single process then finds every stage finished."""
    model, text, output = write_wordy(tmp_path / "wordy"), tmp_path / "text.txt", tmp_path / "tiny"
    text.write_text(prose(8000), encoding="utf-8")
    asked = (str(model), str(text), str(output), PLAN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [training.start(EXTEND, *asked, environment={**environment, **each}) for each in ranks(2)]
    with ThreadPoolExecutor(2) as readers:
        printed = list(readers.map(Process.communicate, started))
    assert [process.wait() for process in started] == [0, 0], [error[-2000:] for _, error in printed]
    names = list(parse_plan(PLAN, "plan").names)
    lines = [out.strip().splitlines()[-1] for out, _ in printed]
    assert lines == [str([True, True, names]), str([False, False, names])]
    recipe = load_recipe(output)
    results = {path: path.read_text() for path in (tmp_path / "tiny.work").glob("*/result.json")}
    assert len(results) == len(names)
    again = extend(model, texts=[text], output=output, plan=parse_plan(PLAN, "plan"), device="cpu", force=True)
    assert again.recipe.tiers == recipe.tiers
    assert {path: path.read_text() for path in results} == results
    assert recipe.adapter == "adapter"


def test_stages_are_repeated_by_one_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others could take a result for finished that the leading process is about to delete."""
    model, text = write_wordy(tmp_path / "wordy"), tmp_path / "text.txt"
    text.write_text(prose(8000), encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--from needs a single process"):
        extend(model, texts=[text], output=tmp_path / "o", plan=parse_plan(PLAN, "p"), again="2-tune", device="cpu")
