# SPDX-License-Identifier: Apache-2.0
"""The plan of an extension: what its file may say, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from support.extending import any_text

from lrconvert.errors import InputError, UsageError
from lrconvert.extending.plan import (
    Calibrate,
    Derive,
    Evaluate,
    Recover,
    Search,
    Tune,
    built_in_plans,
    load_plan,
    parse_plan,
)
from lrconvert.extending.problems import problems

Run = Callable[..., Result]

DERIVE = '[[stage]]\nkind = "derive"\nwindow = 256\n'
SEARCH = '[[stage]]\nkind = "search"\nwindow = 256\n'
TUNE = '[[stage]]\nkind = "tune"\nwindow = 256\nlength = 128\nsteps = 2\n'
RECOVER = '[[stage]]\nkind = "recover"\n'
CALIBRATE = '[[stage]]\nkind = "calibrate"\nlengths = [256]\n'
EVALUATE = '[[stage]]\nkind = "evaluate"\nperplexity = [256]\n'

WRONG: dict[str, tuple[str, str]] = {
    "an unknown key of a stage": (f"{DERIVE}speed = 3\n", "unknown key 1-derive.speed"),
    "an unknown key of the plan": (f"speed = 3\n{DERIVE}", "unknown key speed"),
    "an unknown kind": (DERIVE.replace("derive", "dream"), "stage 1: kind is 'dream'"),
    "no kind": ("[[stage]]\nwindow = 256\n", "stage 1: kind is missing"),
    "no window": ('[[stage]]\nkind = "derive"\n', "1-derive.window is missing"),
    "no stage": ('name = "empty"\n', "stage is missing"),
    "an empty list of stages": ("stage = []\n", "stage is []"),
    "a stage that is none": ("stage = [3]\n", "stage 1 is 3"),
    "not TOML": ("[[stage\n", "not TOML"),
    "nested without end": (f"name = {'[' * 9999}\n", "not TOML (nested too deeply)"),
    "a number of thousands of digits": (DERIVE.replace("256", "9" * 5000), "not TOML"),
    "a text for a number": (DERIVE.replace("256", '"long"'), "1-derive.window is 'long'"),
    "a unit that nobody has": (DERIVE.replace("256", '"2g"'), "1-derive.window is '2g'"),
    "a fraction of a token": (DERIVE.replace("256", "256.5"), "1-derive.window is 256.5"),
    "no number": (f"{TUNE}rate = nan\n", "1-tune.rate"),
    "a window that does not grow": (DERIVE + SEARCH, "2-search.window is 256; windows grow, so more than 256"),
    "a window within the model's": (DERIVE.replace("256", "64"), "1-derive.window is 64; windows grow"),
    "steps 0": (DERIVE + TUNE.replace("steps = 2", "steps = 0"), "2-tune.steps is 0"),
    "steps -1": (DERIVE + TUNE.replace("steps = 2", "steps = -1"), "2-tune.steps is -1"),
    "a rate of 0": (f"{DERIVE}{TUNE}rate = 0.0\n", "2-tune.rate is 0.0"),
    "a budget of 0": (f"{SEARCH}budget = 0\n", "1-search.budget is 0"),
    "rows longer than the window": (DERIVE + TUNE.replace("128", "512"), "2-tune.length is 512, longer than"),
    "training beyond the sets": (TUNE, "1-tune.window is 256; the sets before it reach 64"),
    "jumps the wrong way round": (f"{DERIVE}{TUNE}jumps = [4, 1]\n", "2-tune.jumps is [4, 1]; the least"),
    "more jumps than tokens": (f"{DERIVE}{TUNE}jumps = [1, 128]\n", "2-tune.jumps is [1, 128]; a row of 128"),
    "more jumps than a searched row": (
        f"{SEARCH}row_length = 4\n", "1-search.jumps is [1, 4]; a row of 4 tokens has room for fewer"
    ),
    "a teacher that reads no less than a row": (
        f"{DERIVE}{TUNE}distil = 128\n", "2-tune.distil is 128; it has to be less than a row, 128 tokens"
    ),
    "a teacher that reads less than nothing": (f"{DERIVE}{TUNE}distil = -1\n", "2-tune.distil is -1"),
    "another rank": (f"{DERIVE}{TUNE}{TUNE}rank = 4\n", "3-tune.rank is 4; the adapter that it trains on has 32"),
    "other projections": (
        f"{DERIVE}{TUNE}{TUNE}projections = 'turned'\n",
        "3-tune.projections is 'turned'; the adapter that it trains on has 'all'",
    ),
    "an adapter on whole weights": (
        f'{DERIVE}{TUNE}method = "full"\n{TUNE}', "3-tune.method is 'lora'; after stages that trained all weights"
    ),
    "nothing to recover from": (RECOVER, "1-recover has nothing to recover from"),
    "calibrated beyond the sets": (CALIBRATE, "1-calibrate.lengths has 256; the sets before it reach 64"),
    "calibrated on what was trained on": (
        DERIVE + TUNE + CALIBRATE, "3-calibrate needs other text than stages that search or train"
    ),
    "calibrated on what the short set was searched on": (
        DERIVE + RECOVER + CALIBRATE, "3-calibrate needs other text than stages that search or train"
    ),
    "calibrated at no length": (f"{DERIVE}{CALIBRATE}".replace("[256]", "[]"), "2-calibrate.lengths is []"),
    "too little text to calibrate": (
        f"{DERIVE}{CALIBRATE}".replace("256", "1000"), "2-calibrate needs 1000 tokens of text; there are 900"
    ),
    "nothing measured": (f'{DERIVE}[[stage]]\nkind = "evaluate"\n', "2-evaluate measures nothing"),
    "measured beyond the sets": (EVALUATE, "1-evaluate measures at 256; the sets before it reach 64"),
    "too little text for a search": (SEARCH.replace("256", '"1m"'), "1-search needs 1048576 tokens of text"),
    "too little text for rows": (
        f"{DERIVE}{TUNE}".replace("256", '"64k"').replace("128", '"32k"'),
        "2-tune.length is 32768; the longest text has 900 tokens",
    ),
    "too little text for searched rows": (
        f"{SEARCH}row_length = 1000\n".replace("256", '"2k"'), "1-search.row_length is 1000; the longest text has 900"
    ),
    "too little text to decide": (
        f"{SEARCH}row_length = 64\ndecide = 1000\n".replace("256", '"2k"'), "1-search needs 1000 tokens of text"
    ),
    "searched rows longer than the window": (
        f"{SEARCH}row_length = 257\n", "1-search.row_length is 257, longer than its window, 256"
    ),
    "decided beyond the window": (
        f"{SEARCH}row_length = 64\ndecide = 257\n", "1-search.decide is 257, longer than its window, 256"
    ),
    "an objective of keys without any": (
        f'{SEARCH}row_length = 64\nobjective = "mixed"\nkeys = 0\n', "1-search.objective is 'mixed', and keys is 0"
    ),
    "more keys than labels": (
        f"{DERIVE}{TUNE}keys = 5000\n".replace("256", '"1m"').replace("128", '"512k"'),
        "2-tune.keys is 5000; the keys that the model is trained on have 122 labels",
    ),
    "rows without room for a key": (
        f"{DERIVE}{TUNE}".replace("128", "64"), "2-tune.length is 64, with keys = 24: not one key has room"
    ),
    "calibrated on rows without room for a key": (
        f'{DERIVE}{CALIBRATE}objective = "mixed"\n'.replace("lengths = [256]", "lengths = [64, 256]"),
        "2-calibrate.lengths is 64, with keys = 24: not one key has room",
    ),
    "training that nothing begins": (TUNE, "begin with --on RECIPE, or with a stage that makes its set"),
    "too little held-out text": (DERIVE + EVALUATE, "2-evaluate needs 256 tokens of held-out text; there are 100"),
}  # fmt: skip


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded fails the test."""
    from lrconvert.training import loaded

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loaded, "load_network", refuse)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A thousand token ids: 900 to train on, 100 held out."""
    path = tmp_path / "text.npy"
    np.save(path, any_text(1000, vocab=101))
    return path


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("nothing_loads")
def test_a_plan_that_is_off_is_3_and_names_its_key(
    name: str, text: Path, pico_folder: Callable[..., Path], tmp_path: Path, cli: Run
) -> None:
    """With a remedy or with what is needed, in one line, before a model is loaded; and nothing is left behind."""
    given, said = WRONG[name]
    (tmp_path / "plan.toml").write_text(given)
    found = cli("extend", pico_folder("llama"), "--text", text, "--plan", tmp_path / "plan.toml", "-o", tmp_path / "r")
    assert (found.code, len(found.err.splitlines())) == (3, 1), found.err
    assert said in found.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.toml", "text.npy"]


@pytest.mark.usefixtures("nothing_loads")
def test_texts_for_rows_of_the_original_window(text: Path, pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Short rows under the short set may be longer than the long ones."""
    from lrconvert.extending.api import extend

    model = pico_folder("llama", max_position_embeddings=4096)
    plan = parse_plan((DERIVE + TUNE + RECOVER).replace("256", "8192"), "p")
    with pytest.raises(InputError, match=r"2-tune\.mixed_every asks for rows of 4096 tokens.*3-recover needs 4096"):
        extend(model, texts=[text], output=tmp_path / "r", plan=plan)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(InputError) as found:
        parse_plan(f"speed = 1\n{DERIVE}x = 1\n{TUNE.replace('steps = 2', 'steps = 0')}", "p.toml")
    for said in ("p.toml: ", "unknown key speed", "unknown key 1-derive.x", "2-tune.steps is 0"):
        assert said in str(found.value)


@pytest.mark.usefixtures("nothing_loads")
def test_models_that_can_not_be_extended(
    text: Path, pico_folder: Callable[..., Path], tmp_path: Path, cli: Run
) -> None:
    """One that is scaled already, and one that carries an adapter, with the way out."""
    (tmp_path / "plan.toml").write_text(DERIVE)
    plain = json.loads((pico_folder("llama") / "config.json").read_text())
    scaled = pico_folder("llama", rope_scaling={"rope_type": "linear", "factor": 2.0, "type": "linear"})
    assert "rope_scaling" not in plain
    options = ["--text", text, "--plan", tmp_path / "plan.toml", "-o", tmp_path / "r"]
    found = cli("extend", scaled, *options)
    assert found.code == 3 and "scaling" in found.err and "Extend the model it was made from" in found.err
    shutil.copytree(pico_folder("llama"), tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    found = cli("extend", tmp_path / "adapted", *options)
    assert found.code == 3 and "adapter_config.json is in the folder" in found.err
    assert "merge_and_unload" in found.err
    assert not (tmp_path / "r.work").exists()


@pytest.mark.usefixtures("nothing_loads")
def test_options_that_are_off(text: Path, pico_folder: Callable[..., Path], tmp_path: Path, cli: Run) -> None:
    """Exit code 2: a plan, a stage or an output that can't be."""
    (tmp_path / "plan.toml").write_text(DERIVE + RECOVER)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.json").write_text("{}")
    model, plan = pico_folder("llama"), tmp_path / "plan.toml"
    for more, said in (
        (["--plan", "huge", "-o", tmp_path / "r"], "huge: no such plan. Built in: demo"),
        (["--plan", plan, "-o", tmp_path / "r", "--until", "3-tune"], "--until 3-tune: no such stage. The plan has 1-"),
        (["--plan", plan, "-o", tmp_path / "r", "--from", "derive"], "--from derive: no such stage"),
        (["--plan", plan, "-o", tmp_path / "r.json"], "Name a folder"),
        (["--plan", plan, "-o", tmp_path / "mine"], "--force"),
    ):
        found = cli("extend", model, "--text", text, *more)
        assert found.code == 2 and said in found.err, (found.code, found.err)


def test_lengths_have_units_and_stages_have_names() -> None:
    plan = parse_plan((DERIVE + TUNE + RECOVER + EVALUATE).replace("256", '"256K"').replace("128", '"1m"'), "p")
    assert plan.names == ("1-derive", "2-tune", "3-recover", "4-evaluate") and plan.target == 262144
    derive, tune, recover, evaluate = plan.stage
    assert isinstance(derive, Derive) and isinstance(recover, Recover) and isinstance(evaluate, Evaluate)
    assert isinstance(tune, Tune) and (tune.window, tune.length) == (262144, 1048576)
    assert evaluate.perplexity == (262144,)
    assert parse_plan(json_of(asdict(plan)), "p") == plan


def json_of(values: dict[str, Any]) -> str:
    """A plan as TOML again: what is recorded of one can be run."""
    lines = [f"name = {json.dumps(values['name'])}"]
    for stage in values["stage"]:
        lines += ["[[stage]]", *(f"{key} = {json.dumps(value)}" for key, value in stage.items() if value is not None)]
    return "\n".join(lines)


@pytest.mark.parametrize("name", sorted(built_in_plans()))
def test_built_in_plans_are_plans(name: str) -> None:
    """Each for the window of the model that it is made for, or for one of 8k or 4k."""
    plan = load_plan(name)
    assert plan.name == name
    reach = 2**21 if name.endswith(("-far", "-any", "-calibrate")) else None  # these begin with a recipe's sets
    assert any(problems(plan, window, reach) == [] for window in (4096, 8192)), problems(plan, 4096, reach)
    assert any(isinstance(stage, Tune | Calibrate) for stage in plan.stage)
    assert plan.target >= 2**20 or not any(isinstance(stage, Tune) for stage in plan.stage)
    assert reach is not None or any(isinstance(stage, Search | Derive) for stage in plan.stage)


def test_a_plan_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=re.escape("not UTF-8")):
        load_plan(tmp_path / "plan.toml")
    with pytest.raises(UsageError, match="no such plan"):
        load_plan(tmp_path)
