# SPDX-License-Identifier: Apache-2.0
"""An extension for a runtime: no set that it can't express, from the first stage on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.extending import PLAN, prose, write_wordy

import lrconvert
from lrconvert.checkpoint import open_model
from lrconvert.engines.capability import SEARCHABLE
from lrconvert.errors import UnsupportedError
from lrconvert.extending.api import extend
from lrconvert.extending.plan import Evaluate, parse_plan
from lrconvert.recipe import load_recipe
from lrconvert.rope import longrope_attention_factor

TEXT = "text.txt"


@pytest.mark.parametrize("kind", ["search", "derive"])
def test_a_recipe_for_any_runtime_goes_into_every_format(kind: str, tmp_path: Path) -> None:
    """Two sets with the attention factor of the whole extension, also in the stages before the last: the model is
    trained with it. Nothing is dropped for any runtime, and `gguf` bakes what it refuses without `--for`."""
    write_wordy(tmp_path / "wordy")
    (tmp_path / TEXT).write_text(prose(8000), encoding="utf-8")
    plan = parse_plan(PLAN, "plan.toml")
    plan = replace(plan, stage=tuple(stage for stage in plan.stage if not isinstance(stage, Evaluate)))
    if kind == "derive":
        derived = parse_plan('stage = [{kind = "derive", window = 256}, {kind = "derive", window = 1024}]', "")
        plan = replace(plan, stage=(derived.stage[0], plan.stage[1], derived.stage[1], plan.stage[3]))

    def extended(output: Path, runtime: str | None) -> Path:
        found = extend(
            tmp_path / "wordy", texts=[tmp_path / TEXT], output=output, plan=plan, device="cpu", runtime=runtime
        )
        assert found.path is not None
        return found.work

    work = extended(tmp_path / "for-any", "any")
    wanted = longrope_attention_factor(1024 / 64, 64)
    for stage, window in (("0-start", 64), (f"1-{kind}-*", 256), ("2-tune-*", 256), (f"3-{kind}-*", 1024)):
        (folder,) = work.glob(stage)
        tiers = load_recipe(folder).tiers
        assert [tier.max_length for tier in tiers] == [64, window][: len(tiers)], stage
        assert all(tier.attention_factor == pytest.approx(wanted, rel=1e-9) for tier in tiers), stage
    recipe = load_recipe(tmp_path / "for-any")
    assert [tier.max_length for tier in recipe.tiers] == [64, 1024]
    spec = open_model(tmp_path / "wordy").resolve(recipe)
    for name, able in SEARCHABLE.items():
        dropped = [words for words in able.fit(spec)[1] if "chooses one factor set" not in words]
        assert dropped == [], name
    lrconvert.gguf(tmp_path / "wordy", recipe=tmp_path / "for-any", output=tmp_path / "any.gguf")
    if kind == "derive":
        extended(tmp_path / "free", None)
        with pytest.raises(UnsupportedError, match=r"llama\.cpp knows"):
            lrconvert.gguf(tmp_path / "wordy", recipe=tmp_path / "free", output=tmp_path / "free.gguf")
