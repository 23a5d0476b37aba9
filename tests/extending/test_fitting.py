# SPDX-License-Identifier: Apache-2.0
"""Plans that can't fit the memory are refused before anything is loaded; the bound is one that no run went below."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.extending import VOCAB, prose, write_wordy

from lrconvert.errors import EnvironmentFailure
from lrconvert.extending import fitting
from lrconvert.extending.api import estimate_extension, extend
from lrconvert.extending.fitting import lengths
from lrconvert.extending.plan import Calibrate, Derive, Evaluate, Plan, Recover, Search, Tune, load_plan
from lrconvert.progress import Step

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "extension-routes-h200.json"
SMOLLM2 = SimpleNamespace(layers=30, hidden=576, ffn=1536, kv_heads=3, head_dim=64)
WEIGHTS = 134_515_008 * 2  # bytes in bf16
PLAN = Plan(
    (
        Derive("derive", 4096),
        Tune("tune", 4096, 1024, 3),
        Search("search", 8192, row_length=512, decide=4096),
        Recover("recover"),
        Evaluate("evaluate", perplexity=(64, 8192), retrieval=(8192,)),
    )
)


def test_the_bound_is_below_what_every_stage_took() -> None:
    """Of recorded runs on a GPU, and not by much: at least a third of what many keys behind one text took."""
    runs = json.loads(RECORD.read_text())["runs"]
    seen = 0
    for run in runs.values():
        plan = load_plan(RECORD.parents[2] / run["plan"])
        for stage, told in zip(plan.stage, run["stages"], strict=True):
            for key, (tokens, each) in lengths(stage, SMOLLM2, 2).items():  # type: ignore[arg-type]
                least = WEIGHTS + tokens * each
                assert least < told["peak_memory"], (plan.name, told["name"], key)
                if key == "retrieval" and tokens > 100_000:
                    seen += 1
                    assert least > told["peak_memory"] / 3
    assert seen >= 5


def test_stages_after_the_last_one_asked_for_need_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds the first stages carries them out; the others may run elsewhere."""
    write_wordy(tmp_path / "wordy")
    (tmp_path / "text.txt").write_text(prose(30000), encoding="utf-8")
    np.save(tmp_path / "held-out.npy", np.arange(9000) % VOCAB)
    given = {"texts": [tmp_path / "text.txt"], "held_out": [tmp_path / "held-out.npy"], "output": tmp_path / "out"}
    monkeypatch.setattr(fitting, "device_memory", lambda device: 3 * 2**20)
    done = extend(tmp_path / "wordy", plan=PLAN, until="1-derive", device="cpu", **given)
    assert [stage.name for stage in done.stages] == ["1-derive"]


def test_a_text_for_both_is_named(tmp_path: Path) -> None:
    """Figures on it aren't those of text that was held out. A tenth that is held out of a text is."""
    write_wordy(tmp_path / "wordy")
    for name in ("text", "other"):
        (tmp_path / f"{name}.txt").write_text(f"{name} {prose(30000)}", encoding="utf-8")
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"

    def notes(*held_out: Path) -> str:
        given = {"output": tmp_path / "out", "plan": Plan((Derive("derive", 4096),)), "device": "cpu", "force": True}
        return "; ".join(extend(tmp_path / "wordy", texts=[text], held_out=held_out, **given).notes)

    assert "text.txt: trained on as well" in notes(other, text)
    assert "trained on" not in notes(other) and "trained on" not in notes()


def test_an_estimate_on_a_cpu_has_the_bound(tmp_path: Path) -> None:
    """There nothing is measured. A stage with no length of its own has none."""
    write_wordy(tmp_path / "wordy")
    (tmp_path / "text.txt").write_text(prose(30000), encoding="utf-8")
    plan = Plan((Derive("derive", 4096), Tune("tune", 4096, 1024, 3), Evaluate("evaluate", perplexity=(64, 512))))
    given = {"texts": [tmp_path / "text.txt"], "output": tmp_path / "out", "plan": plan, "device": "cpu"}
    derived, tuned, evaluated = estimate_extension(tmp_path / "wordy", **given)
    assert (derived.memory, derived.least) == (None, False)
    weights = sum(path.stat().st_size for path in (tmp_path / "wordy").glob("*.safetensors"))
    assert tuned.least and evaluated.least
    assert tuned.memory is not None and evaluated.memory is not None
    assert tuned.memory > evaluated.memory > weights


@pytest.mark.parametrize("run", [extend, estimate_extension])
def test_every_key_is_named_with_what_would_fit(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded or written. With the memory that the message asks for, the plan is accepted."""
    write_wordy(tmp_path / "wordy")
    (tmp_path / "text.txt").write_text(prose(30000), encoding="utf-8")
    np.save(tmp_path / "held-out.npy", np.arange(9000) % VOCAB)
    given = {"texts": [tmp_path / "text.txt"], "held_out": [tmp_path / "held-out.npy"], "output": tmp_path / "out"}
    monkeypatch.setattr(fitting, "device_memory", lambda device: 3 * 2**20)
    started: list[Step] = []
    with pytest.raises(EnvironmentFailure) as caught:
        run(tmp_path / "wordy", plan=PLAN, device="cpu", progress=started.append, **given)
    message = str(caught.value)
    for key in ("3-search.decide is 4096", "5-evaluate.perplexity is 8192", "5-evaluate.retrieval is 8192"):
        assert key in message
    assert "2-tune" not in message and "row_length" not in message
    assert "cpu has 0.0; up to " in message and "--shard-weights" in message
    assert not started and not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_what_fits_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of tokens that a message names fits, and one more does not. Shared rows and weights need less; full
    fine-tuning has its optimizer."""
    from lrconvert.checkpoint import open_model

    model = open_model(write_wordy(tmp_path / "wordy"))
    task: Any = SimpleNamespace(model=model, machine={"device": "cpu"})

    def check(memory: int, stage: Any, **machine: Any) -> str:
        monkeypatch.setattr(fitting, "device_memory", lambda device: memory)
        asked = {**task.machine, **machine}
        try:
            fitting.check_memory(Plan((stage,)), SimpleNamespace(model=model, machine=asked))  # type: ignore[arg-type]
        except EnvironmentFailure as error:
            return str(error)
        return ""

    stage = Evaluate("evaluate", perplexity=(100_000,))
    told = check(10 * 2**20, stage)
    fits = int(told.split("up to ")[1].split(" ")[0])
    assert check(10 * 2**20, replace(stage, perplexity=(fits,))) == ""
    assert check(10 * 2**20, replace(stage, perplexity=(fits + 1,)))
    assert check(10 * 2**20, replace(stage, perplexity=(2 * fits,)), context_parallel=3) == ""
    asked = replace(stage, perplexity=(), retrieval=(2 * fits,))
    assert check(10 * 2**20, asked, context_parallel=2) == ""  # without the cache that one process has
    assert check(10 * 2**20, replace(asked, retrieval=(fits,)))
    assert check(2**20, Calibrate("calibrate", (64, 100_000))).startswith("plan plan: 1-calibrate.lengths is 100000")
    tune = Tune("tune", 4096, 64, 1)
    assert check(2**20, tune) == "" and "don't fit" in check(2**20, replace(tune, method="full"))
    weights = fitting.weight_count(model) * 4  # in float32
    assert check(int(2.1 * weights) + 2**16, tune) == ""
    with_teacher = check(int(1.9 * weights), replace(tune, distil=64))
    assert "don't fit" in with_teacher and check(int(1.9 * weights), tune) == ""
