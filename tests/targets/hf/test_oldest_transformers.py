# SPDX-License-Identifier: Apache-2.0
"""The artifact on the oldest transformers it promises to run in, in that version's own environment.

`.ci/run` makes the environment and names its interpreter in LRCONVERT_OLDEST_PYTHON.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import own_name, recipe_for
from support.forks import ForkedSessions
from support.pico import FAMILIES
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model
from lrconvert.families import get_family
from lrconvert.parity import Options
from lrconvert.runtimes import transformers
from lrconvert.runtimes.base import Interpreter
from lrconvert.targets import hf

OLDEST = os.environ.get("LRCONVERT_OLDEST_PYTHON")
pytestmark = pytest.mark.skipif(not OLDEST, reason="LRCONVERT_OLDEST_PYTHON names no interpreter")
HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """One process of that version for all sessions: importing it takes longer than what they are asked."""
    started = Interpreter(transformers.WORKER, python=OLDEST)
    yield started
    started.close()


@pytest.mark.parametrize(
    ("family", "changes"),
    # As Mistral 7B 0.1 leaves it; what that version makes of phimoe is below.
    [
        *((family, {}) for family in FAMILIES if family != "phimoe" and get_family(family).hf_oldest is None),
        ("mistral", {"head_dim": None}),
    ],
)
def test_artifacts_verify_there(
    pico: Callable[..., Model],
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    interpreter: Interpreter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The config spelling and the modeling code that the newest version runs are right in the oldest too."""
    started = transformers.open_session

    def shared(artifact: Path, **options: Any) -> transformers.TransformersSession:
        return started(artifact, **{**options, "interpreter": interpreter})

    monkeypatch.setattr(transformers, "open_session", shared)
    model, output = pico(family, **changes), own_name(tmp_path / family)
    bake_plan(hf.plan(model, recipe_for(model, even=True), output))
    report = verify(output, options=Options(threads=1, python=OLDEST))
    assert report.passed, report.summary
    assert report.runtimes["native"]["transformers"].startswith("4.57")


@pytest.mark.parametrize("family", [family for family in FAMILIES if get_family(family).hf_oldest is not None])
def test_some_are_refused_there_and_say_so(pico: Callable[..., Model], tmp_path: Path, family: str) -> None:
    """An error, no wrong answer; and the bake has told it."""
    model, output = pico(family), own_name(tmp_path / family)
    planned = hf.plan(model, recipe_for(model, even=True), output)
    assert "needs transformers 5: 4.57 refuses the config" in planned.notes
    bake_plan(planned)
    report = verify(output, options=Options(threads=1, python=OLDEST))
    rows = [row for row in report.rows if row.code in ("native", "custom")]
    why = "model type `ministral3`" if family == "ministral3" else "rope_scaling"
    assert rows and all(row.verdict == "fail" and why in row.reason for row in rows)


def test_phi_3_5_moe_needs_a_newer_one(pico: Callable[..., Model], tmp_path: Path) -> None:
    """All rows share a table there, so that rows can't have tiers: our code says so, and native code runs."""
    model, output = pico("phimoe"), own_name(tmp_path / "phimoe")
    bake_plan(hf.plan(model, recipe_for(model, even=True), output))
    report = verify(output, options=Options(threads=1, python=OLDEST))
    (row,) = (row for row in report.rows if row.code == "custom")
    assert row.verdict == "fail" and "needs transformers 5 for PhimoeForCausalLM" in row.reason
    native = {row.case: row for row in report.rows if row.code == "native"}
    assert native["at 64"].verdict == "pass" and "4.57" in report.runtimes["native"]["transformers"]
    assert native["one past 64"].verdict == "fail"  # it uses the long set, which version 5 does not


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_modeling_code_passes_its_own_tests_there(
    chosen: str, forked_sessions: ForkedSessions, tmp_path: Path
) -> None:
    """All that the newest version is asked, without the rest of the suite, which that environment lacks."""
    assert OLDEST is not None
    options = ["-q", "-x", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull, "-m", chosen]
    files = sorted(HERE.glob("test_modeling*.py"))
    code = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = forked_sessions.run(OLDEST, code, *options, *files, path=(ROOT, ROOT / "tests"), environment=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
