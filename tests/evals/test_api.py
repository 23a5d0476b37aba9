# SPDX-License-Identifier: Apache-2.0
"""`lrconvert.evaluate` as functions: rows, and the result as it stands in STEM.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrconvert.checkpoint import locate
from lrconvert.errors import InputError, UsageError
from lrconvert.evals import api as evaluate

HELDOUT = locate("demo") / "heldout.txt"


def test_perplexity_has_rows_and_a_result(tmp_path: Path) -> None:
    """The rows are those of the JSON; what goes on is said; the files are written."""
    said: list[str] = []
    found = evaluate.perplexity(
        "demo", lengths=[128, 64], texts=[HELDOUT], judged=32, excerpts=1, output=tmp_path / "p", say=said.append
    )
    assert [row.length for row in found.rows] == [64, 128] and found.kind == "perplexity"
    assert found.title == "demo: perplexity, seed 0" and found.warnings == () and "last 32 tokens" in found.protocol
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads(json.dumps(found.result))
    assert [row["windows"] for row in found.result["rows"]] == [1, 1]  # the name that results have always had
    assert (tmp_path / "p.png").is_file() and "64 tokens, pass 1 of 1" in said


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
