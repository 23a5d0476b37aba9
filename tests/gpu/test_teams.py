# SPDX-License-Identifier: Apache-2.0
"""Two GPUs on one document, and two with half of the weights each: losses, gradients and trainings are those of one.

tests/training/test_context_parallel.py asks the same of two CPUs in float32, so with far less rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
LENGTH = 16381  # not a multiple of what a team shares

# Only the leading process knows which kernel is wanted, as in a search that goes on.
ASK = """
import json, os, sys
import numpy as np
import torch
from lrconvert.checkpoint import locate, open_model
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.searching.evaluator import TransformersEvaluator
from lrconvert.searching.objective import Document, Objective
from lrconvert.searching.protocol import Question
from lrconvert.searching.space import space_for

team, sharded, kernel, dtype, length = int(sys.argv[1]), sys.argv[2] == "sharded", *sys.argv[3:5], int(sys.argv[5])
model = open_model("demo")
text = tokenizer_of(locate("demo"))((locate("demo") / "heldout.txt").read_text(encoding="utf-8"))
tokens = np.resize(np.asarray(text, dtype=np.int64), length)
objective = Objective("perplexity", (Document("text", tokens, ((length, 0, length - 1),)),), {length: 1.0})
space = space_for(model.shape.rotary_dim, model.shape.theta, 4096, 16384)
sets = dict(space.seeds())
kernel = kernel if os.environ["RANK"] == "0" else None
evaluator = TransformersEvaluator(model, device="cuda", attention=kernel, dtype=dtype, team=team, sharded=sharded)
asked = [Question(sets["yarn"]), Question(sets["pi"]), Question(sets["yarn"], gradient=True)]
answers = [evaluator.answer(objective, [question])[0] for question in asked]
if evaluator.leading:
    told = [[answer.loss for answer in answers], answers[-1].gradient, [answer.error for answer in answers]]
    print(json.dumps([evaluator.width, *told, torch.cuda.max_memory_allocated()]))
"""


def ask(folder: Path, processes: int, *arguments: object, code: str = ASK) -> Any:
    script = folder / "ask.py"
    script.write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*launch, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize(("team", "sharded"), [(2, ""), (1, "sharded")])
def test_what_two_share_is_what_one_computes(team: int, sharded: str, kernel: str, tmp_path: Path) -> None:
    """Losses within what kernels differ by, gradients of slow frequencies in the same direction."""
    import numpy as np
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    width, losses, gradient, errors, _ = ask(tmp_path, 2, team, sharded or "-", kernel, "bfloat16", LENGTH)
    assert width == 2 // team and errors == [None] * 3
    _, wanted, exact, _, _ = ask(tmp_path, 1, 1, "-", kernel, "bfloat16", LENGTH)
    assert losses == pytest.approx(wanted, abs=1e-3)
    assert abs(losses[0] - losses[1]) > 0.01  # another set has another loss: it is seen
    ours, theirs = np.array(gradient)[-12:], np.array(exact)[-12:]
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.98


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_two_train_as_one(kernel: str, tmp_path: Path) -> None:
    """Rows that jump, of a length that is no multiple of what a team shares; a training with each GPU's own weights,
    and with weights in parts. On CPUs bf16 moves losses by 2e-3 of themselves, a gradient by 7e-3 of its length, and
    its norm in a training by 1e-2."""
    import numpy as np
    import torch
    from support import teams
    from support.trained import log_of

    pytest.importorskip("peft", reason="needs lrconvert[train]")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    machine = {"device": "cuda", "dtype": "bfloat16", "attention": kernel}
    for count, more in ((2, [("sharded", {"sharded": True})]), (1, [])):
        asked = {"machine": {**machine, "team": count}, "answers": True, "trainings": [("whole", {}), *more]}
        ask(tmp_path, count, tmp_path / str(count), json.dumps({"model": "demo", **asked}), code=teams.ASK)
    found, wanted = (np.load(tmp_path / str(count) / teams.ANSWERS) for count in (2, 1))
    for name in ("losses", "judged", "scored", "searched", teams.KEPT, teams.AGAIN):
        assert np.linalg.norm(found[name] - wanted[name]) <= 1e-2 * np.linalg.norm(wanted[name]), name
    for kept in (teams.KEPT, teams.AGAIN):
        names = [name for name in wanted if name.startswith(f"{kept}, ")]
        ours, theirs = (np.concatenate([answers[name].ravel() for name in names]) for answers in (found, wanted))
        assert np.linalg.norm(ours - theirs) <= 0.05 * np.linalg.norm(theirs), kept
    steps = log_of(tmp_path / "1" / "whole")
    for name in ("whole", "sharded"):
        for one, other in zip(log_of(tmp_path / "2" / name), steps, strict=True):
            assert one.pop("kind") == other["kind"]
            assert one == pytest.approx({key: other[key] for key in one}, rel=0.05), name
