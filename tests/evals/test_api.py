# SPDX-License-Identifier: Apache-2.0
"""`lrconvert.evaluate` as functions: rows, and the result as it stands in STEM.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrconvert.checkpoint import locate
from lrconvert.errors import InputError, UsageError
from lrconvert.evals import api as evaluate
from lrconvert.progress import Step

HELDOUT = locate("demo") / "heldout.txt"


def test_perplexity_has_rows_and_a_result(tmp_path: Path) -> None:
    """The rows are those of the JSON; progress counts the passes; the files are written."""
    steps: list[Step] = []
    found = evaluate.perplexity(
        "demo", lengths=[128, 64], texts=[HELDOUT], judged=32, excerpts=1, output=tmp_path / "p", progress=steps.append
    )
    assert [row.length for row in found.rows] == [64, 128] and found.kind == "perplexity"
    assert found.title == "demo: perplexity, seed 0" and found.warnings == () and "last 32 tokens" in found.protocol
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads(json.dumps(found.result))
    assert [row["windows"] for row in found.result["rows"]] == [1, 1]  # the name that results have always had
    assert (tmp_path / "p.png").is_file()
    passes = [(step.what, step.done, step.total, step.part) for step in steps if step.task == "passes"]
    assert passes == [("64 tokens", 0, 2, 0.0), ("128 tokens", 1, 2, 1 / 3), ("", 2, 2, 1.0)]


def test_passkey_counts_trials() -> None:
    found = evaluate.passkey("demo", lengths=[256], depths=2, trials=1, seed=3, threads=1)
    assert [(row.length, row.depth, row.trials) for row in found.rows] == [(256, 0.0, 1), (256, 1.0, 1)]
    assert found.result["seed"] == 3 and found.result["lengths"][0]["trials"] == 2


def test_errors_are_ours() -> None:
    """Raised before a model is loaded."""
    with pytest.raises(UsageError, match="--judged can't be combined with"):
        evaluate.perplexity("demo", lengths=[64], texts=[HELDOUT], judged=64, whole=True)
    with pytest.raises(InputError, match="no such recipe"):
        evaluate.passkey("demo", lengths=[64], recipe="nowhere")
