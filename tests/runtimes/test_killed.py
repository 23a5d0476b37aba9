# SPDX-License-Identifier: Apache-2.0
"""A command that is killed takes its runtime's process along, and leaves no folder. Real processes, and SIGKILL."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import recipe_for
from support.forks import ForkedCommands
from support.processes import holds_within, processes_in
from support.staging import linux_only

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model
from lrconvert.targets import hf

WORKERS = Path(__file__).resolve().parents[2] / "lrconvert" / "runtimes"
# A worker that computes for a minute, whatever its parent does.
BUSY = f"""
import importlib.util, time
spec = importlib.util.spec_from_file_location("worker_loop", {str(WORKERS / "worker_loop.py")!r})
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)
class Worker:
    info = {{}}
    def __init__(self, request): ...
    def logits(self, request):
        open("started", "w").close()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            sum(range(1000))
loop.serve(Worker, "")
"""
PARENT = """
import sys
from pathlib import Path
from lrconvert.runtimes.base import WorkerSession
from lrconvert.temporary import temporary_folder
with temporary_folder() as folder:
    (folder / "baked").write_text("x")
    WorkerSession(Path(sys.argv[1]), {}).logits([[1]], keep=[0])
"""


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Where the processes of a test make temporary folders."""
    folder = tmp_path / "places"
    folder.mkdir()
    return folder


@linux_only
def test_a_worker_that_computes_ends_with_its_parent_and_removes_its_folders(
    tmp_path: Path, places: Path, commands: ForkedCommands
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(BUSY)
    process = commands.start(PARENT, script, environment={**os.environ, "TMPDIR": str(places)})
    assert holds_within(60, lambda: bool(list(places.glob("*/home/started"))))
    assert len(processes_in(places)) == 1 and len(list(places.iterdir())) == 2
    process.kill()
    assert holds_within(30, lambda: not processes_in(places))  # of the minute that it would compute
    assert list(places.iterdir()) == []


@linux_only
@pytest.mark.parametrize("code", ["native", "custom"])
def test_a_killed_verify_leaves_nothing(
    code: str, tmp_path: Path, places: Path, pico: Callable[..., Model], training: ForkedCommands, main_forking: str
) -> None:
    model, artifact = pico("llama"), tmp_path / "a"
    bake(hf.plan(model, recipe_for(model, even=True), artifact))
    environment = {**os.environ, "TMPDIR": str(places)}
    process = training.start(main_forking, "verify", artifact, "--code", code, environment=environment)
    assert holds_within(60, lambda: bool(processes_in(places)))
    process.kill()
    assert holds_within(30, lambda: not processes_in(places))
    assert list(places.iterdir()) == []
