# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 - libraries read the environment when they are imported
"""Fixtures that every test may use: pico models built once, the command line run in process."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing here needs the network; a test that tried would hang on a machine without one.
os.environ["HF_HUB_OFFLINE"] = "1"
# As many processes as cores run tests already: threads of theirs would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Every process that is started would compile the same files again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest
from hypothesis import settings
from support.forks import FOLDER, MAIN_FORKING, ForkedCommands, ForkedSessions, wait_for_servers
from support.pico import write_pico

from lrconvert.checkpoint import Model, open_model
from lrconvert.recipe import Provenance, Recipe, write_recipe
from lrconvert.rope import Tier, longrope_attention_factor, yarn_factors
from lrconvert.runtimes import base

# The same examples on every run and every machine: a failure is everybody's. No deadline: a busy machine is no failure.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

# Processes of one test run share what can be forked. The first one makes the folder, the others inherit its name.
if FOLDER not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="lrconvert-forks-")
    os.environ[FOLDER] = _folder.name

SHARED = Path(__file__).resolve().parents[2] / "shared"


def recipe_for(model: Model, *, tiers: int = 2, start_tokens: int = 0, even: bool = False) -> Recipe:
    """A recipe with a set of its own in every tier: ×2 windows from the model's own.

    `even`: one attention factor for all tiers, LongRoPE's formula, so that native code can express two.
    """
    shape = model.shape
    last = longrope_attention_factor(2 ** (tiers - 1), shape.window)
    made = []
    for index in range(tiers):
        ratio = 2.0**index
        factors = yarn_factors(shape.rotary_dim, shape.theta, ratio + 0.25, shape.window) * (1 + 0.05 * index)
        own = longrope_attention_factor(ratio, shape.window) if not even else last
        made.append(Tier(int(shape.window * ratio), tuple(factors.tolist()), start_tokens, own))
    return Recipe(
        schema_version=1,
        name="pico",
        family=model.family.name,
        original_window=shape.window,
        rope_theta=shape.theta,
        rotary_dim=shape.rotary_dim,
        tiers=tuple(made),
        provenance=Provenance("published", source="a test"),
    )


_NAMES = itertools.count()


def own_name(output: Path) -> Path:
    """`output` under a name that no other folder has: transformers keeps modules by folder name, and in 4.57.0 a
    second artifact of that name in one process gets the first one's code."""
    return output.with_name(f"{output.name}{next(_NAMES)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test comes first: whoever had it last would work alone."""
    items.sort(key=lambda item: "test_oldest_transformers" not in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Tests write thousands of files, and none of them has to outlive the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_sessions() -> Iterator[ForkedSessions]:
    """Sessions of transformers run in processes that need not import it again."""
    sessions = ForkedSessions()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "subprocess", sessions)
        yield sessions
    sessions.close()
    wait_for_servers()  # the first fixture of all ends last: nothing here is connected any more


@pytest.fixture(scope="session")
def main_forking(forked_sessions: ForkedSessions) -> str:
    """The command line's code, for a process whose sessions of transformers are forked too."""
    forked_sessions.prepare()
    return MAIN_FORKING


@pytest.fixture(scope="session")
def commands() -> Iterator[ForkedCommands]:
    """Code in processes of their own that need not import lrconvert again."""
    started = ForkedCommands()
    yield started
    started.close()


@pytest.fixture(scope="session")
def training() -> Iterator[ForkedCommands]:
    """The same for what imports transformers."""
    started = ForkedCommands(training=True)
    yield started
    started.close()


@pytest.fixture(scope="module")
def remembered() -> Iterator[None]:
    """What the reference answered to one test of a module, it need not compute for the next."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    from support.remembered import remember

    with pytest.MonkeyPatch.context() as patch:
        remember(patch)
        yield


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a pico model of a family; built once for each set of arguments."""
    made: dict[object, Path] = {}

    def get(family: str = "llama", **changes: Any) -> Path:
        key = (family, tuple(sorted((name, repr(value)) for name, value in changes.items())))
        if key not in made:
            made[key] = write_pico(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def pico(pico_folder: Callable[..., Path]) -> Callable[..., Model]:
    """A pico model, opened."""
    return lambda family="llama", **changes: open_model(pico_folder(family, **changes))


@pytest.fixture
def plain(pico_folder: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A pico Llama whose boundary every runtime can see, and a recipe for it: for the command line."""
    folder = pico_folder("llama", max_position_embeddings=256)
    return folder, write_recipe(recipe_for(open_model(folder), even=True), tmp_path / "recipe")


@dataclass(frozen=True)
class Result:
    """What a command left: exit code and streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in process."""
    from lrconvert.cli import run

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        streams = capfd.readouterr()
        return Result(code, streams.out, streams.err)

    return call


@pytest.fixture(scope="session")
def published_factors() -> Path:
    """The published factor sets beside the project, where they are."""
    folder = SHARED / "factors"
    if not folder.is_dir():
        pytest.skip("the published factor sets (../shared/factors) are not on this machine")
    return folder
