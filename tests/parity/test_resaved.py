# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained` of what was loaded from an artifact: it works again, or `verify` says what the version broke."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from conftest import recipe_for
from support.forks import ForkedCommands
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model
from lrconvert.parity import Options
from lrconvert.targets import hf
from lrconvert.targets.hf.checks import CHECKS, check_config

SAVE = """
import sys
from transformers import AutoModelForCausalLM
artifact, output, code = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=code == "custom").save_pretrained(output)
"""


@pytest.mark.parametrize("saved_by", ["custom", "native"])
def test_what_save_pretrained_writes_works_or_is_named(
    pico: Callable[..., Model], tmp_path: Path, training: ForkedCommands, saved_by: str
) -> None:
    """Logits stay right in this version; what 4.57 and other engines would misread is named, nothing else fails."""
    model, recipe = pico("llama"), recipe_for(pico("llama"), even=True)
    bake_plan(hf.plan(model, recipe, tmp_path / "a"))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = training.run(SAVE, tmp_path / "a", tmp_path / "again", saved_by, environment=environment)
    assert done.returncode == 0, done.stderr
    report = verify(tmp_path / "again", against=model.reference, recipe=recipe, options=Options(threads=1))
    failed = {(row.code, row.case) for row in report.failed}
    # Version 4.57 keeps its own spelling.
    of_version_5 = {("config", "rope_scaling"), ("config", "rope_theta")}
    expected = of_version_5 if transformers.__version__.startswith("5") else set()
    if saved_by == "native":
        assert failed == expected | {("config", "auto_map"), ("custom", "loads")}
    else:
        assert failed == expected | {("config", "architectures")}
    assert any(row.code == "native" and row.verdict == "pass" and row.bound for row in report.rows)


@pytest.mark.parametrize("case", [check.case for check in CHECKS])
def test_each_check_can_fail_and_a_fresh_artifact_passes_all(
    pico: Callable[..., Model], tmp_path: Path, case: str
) -> None:
    model = pico("mistral", head_dim=None)  # the family with the most that a config has to say
    bake_plan(hf.plan(model, recipe_for(model), tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert [row.verdict for row in check_config(config, tmp_path / "a", model.family)] == ["pass"]
    breaks = {
        "rope_scaling": lambda: config.update(rope_parameters=config.pop("rope_scaling")),
        "rope_theta": lambda: config.pop("rope_theta"),
        "original window": lambda: config.pop("original_max_position_embeddings"),
        "head_dim": lambda: config.pop("head_dim"),
        "architectures": lambda: config.update(architectures=["LongRopeForCausalLM"]),
        "auto_map": lambda: (tmp_path / "a" / "modeling_longrope.py").unlink(),
    }
    breaks[case]()
    rows = check_config(config, tmp_path / "a", model.family)
    assert [(row.case, row.verdict) for row in rows] == [(case, "fail")]
    assert replace(rows[0], reason="") != rows[0]
