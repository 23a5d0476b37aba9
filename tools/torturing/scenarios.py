# SPDX-License-Identifier: Apache-2.0
"""Every command that writes (`SCENARIOS`), in a small world that is copied for each trial.

A scenario says what may lie at its destination: `OLD`, `NEW` or `NOTHING`. Whatever else lies there is `Mixed`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import recipe_for
from support.extending import write_wordy
from support.hub_server import Hub, Token, serve
from support.pico import write_pico

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.errors import LrconvertError
from lrconvert.recipe import write_recipe
from lrconvert.searching.journal import read_journal
from lrconvert.targets import gguf, hf, onnx

OLD, NEW, NOTHING = "old", "new", "nothing"
Contents = dict[str, bytes]
WINDOW = 256


class Mixed(Exception):
    """What lies at the destination is neither the old, nor the new, nor nothing."""


@dataclass(frozen=True)
class Scenario:
    """`make` writes the world; `command` is what is tried, `again` what comes after a kill (by default the same).
    `state` says what is there, given the world before and the world after an undisturbed run. `trains`: it needs torch.
    `rival`: another command that meets it in a race (by default itself); `loses`: exit codes of who loses one."""

    name: str
    make: Callable[[], None]
    command: Sequence[str]
    state: Callable[[Contents, Contents, Contents], str]
    again: Sequence[str] | None = None
    trains: bool = False
    rival: Sequence[str] | None = None
    loses: Sequence[int] = (0, 2)
    hub: bool = False


def contents(folder: Path) -> Contents:
    """Every file under a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def part(world: Contents, start: str) -> Contents:
    return {name: data for name, data in world.items() if name.startswith(start)}


def whole(*starts: str) -> Callable[[Contents, Contents, Contents], str]:
    """Everything whose name begins so is old, new, or not there, all of it."""

    def state(now: Contents, before: Contents, after: Contents) -> str:
        there, old, new = ({k: v for start in starts for k, v in part(w, start).items()} for w in (now, before, after))
        if there == new:
            return NEW
        if there == old:
            return OLD if old else NOTHING
        if there:
            raise Mixed(f"{sorted(there)}")
        return NOTHING

    return state


# --- artifacts -------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": WINDOW,
         "vocab_size": 4500}  # fmt: skip


def _models() -> None:
    """A model, another of its shape, and a recipe."""
    for name, seed in (("model", 7), ("other", 8)):
        write_pico(Path(name), seed=seed, **SMALL)
    write_recipe(recipe_for(open_model("model"), even=True), Path("recipe"))


def _with_old(target: Any, output: str, **options: Any) -> Callable[[], None]:
    """The models, and an artifact of the other one in the output's place."""

    def make() -> None:
        _models()
        model = open_model("other")
        bake(target.plan(model, recipe_for(model, even=True), Path(output), target.Options(**options)))

    return make


def baking(target: str, output: str, *more: str) -> list[str]:
    return [target, "model", "--recipe", "recipe", "-o", output, "--force", *more]


def gguf_state(now: Contents, before: Contents, after: Contents) -> str:
    """Files can't be exchanged at once: what opens is all old or all new, and what is neither does not open."""
    there = {name: data for name, data in part(now, "out").items() if name.endswith(".gguf")}
    sides = [{data for name, data in part(world, "out").items() if name.endswith(".gguf")} for world in (before, after)]
    opened = set()
    for name in there:
        try:
            checkpoint = GgufCheckpoint(Path(name))
            for tensor in checkpoint.tensors:
                checkpoint.read(tensor)
        except (LrconvertError, OSError):
            continue
        used = {Path(info.file).read_bytes() for info in checkpoint.tensors.values()}
        if not any(used <= side for side in sides):
            raise Mixed(f"{name} opens, and is neither old nor new")
        opened.add(OLD if used <= sides[0] else NEW)
    if len(opened) > 1:
        raise Mixed(f"old and new files open: {sorted(there)}")
    return opened.pop() if opened else NOTHING


def _published() -> None:
    """An artifact to publish, the same every time."""
    _models()
    model = open_model("model")
    bake(hf.plan(model, recipe_for(model, even=True), Path("out")), link=False)


def verified_state(now: Contents, before: Contents, after: Contents) -> str:
    """The artifact stays as it is, but for a manifest that has the whole report or none of it."""
    there, old = part(now, "out/"), part(before, "out/")
    manifest = json.loads(there.pop("out/lrconvert.json"))
    if {k: v for k, v in there.items() if not k.endswith(".tmp")} != {k: v for k, v in old.items() if k in there}:
        raise Mixed("a file of the artifact changed")
    if manifest["parity"] is None:
        return OLD
    wanted = json.loads(after["out/lrconvert.json"])
    if len(manifest["parity"]["rows"]) != len(wanted["parity"]["rows"]) or not manifest["parity"]["passed"]:
        raise Mixed("another report")
    return NEW


# --- searches, extensions, evaluations -------------------------------------------------------------------

PLAN = """
name = "tiny"
[[stage]]
kind = "search"
window = 256
budget = 2
[[stage]]
kind = "tune"
window = 256
length = 96
rows = 1
steps = 2
keys = 0
mixed_rows = 1
rank = 2
[[stage]]
kind = "evaluate"
perplexity = [64, 256]
excerpts = 1
judged = 32
"""


def _texts() -> None:
    write_wordy(Path("model"), num_hidden_layers=1)
    rng = np.random.default_rng(3)
    np.save("text.npy", rng.integers(3, 400, 9000))
    Path("plan.toml").write_text(PLAN)


def searched_state(now: Contents, before: Contents, after: Contents) -> str:
    """The recipe of an undisturbed search or none, and a journal that can be read."""
    if now.get("out.journal.jsonl"):
        read_journal(Path("out.journal.jsonl"))
    return _recipe_state(now, after)


def extended_state(now: Contents, before: Contents, after: Contents) -> str:
    return _recipe_state(now, after)


def _recipe_state(now: Contents, after: Contents) -> str:
    if "out/recipe.json" not in now:
        return NOTHING
    if _timeless(now["out/recipe.json"]) != _timeless(after["out/recipe.json"]):
        raise Mixed("another recipe")
    if part(now, "out/adapter/") != part(after, "out/adapter/"):
        raise Mixed("another adapter")
    return NEW


def _timeless(recipe: bytes) -> Any:
    """A recipe without how long anything took."""
    values = json.loads(recipe)
    for stage in values["provenance"].get("stages", []):
        stage.pop("seconds")
        stage.get("facts", {}).pop("seconds_per_step", None)
    return values


def evaluated_state(now: Contents, before: Contents, after: Contents) -> str:
    """A result that is whole."""
    for name in ("out.json", "out.png"):
        if name in now and now[name] != after[name]:
            raise Mixed(name)
    return NEW if "out.json" in now else NOTHING


# --- the Hub ---------------------------------------------------------------------------------------------

ID = "me/out"


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    with serve() as started:
        started.tokens["write"] = Token("me")
        yield started


def published(hub: Hub) -> Contents:
    """What is on the Hub, but for its own files."""
    if ID not in hub.repos:
        return {}
    return {f"hub/{name}": data for name, data in hub.repos[ID].head.items() if name != ".gitattributes"}


CPU = ("--device", "cpu")
SEARCH = ["search", "model", "--text", "text.npy", "--target", "256", "--budget", "3", *CPU, "-o", "out"]
EXTEND = ["extend", "model", "--text", "text.npy", "--plan", "plan.toml", *CPU, "-o", "out"]
EVAL = ["eval", "perplexity", "model", "--text", "text.npy", "--lengths", "128", "--judged", "64", "--windows", "2",
        "--threads", "1", "-o", "out"]  # fmt: skip

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("hf", _with_old(hf, "out"), baking("hf", "out", "--copy"), whole("out/")),
        Scenario(
            "gguf",
            _with_old(gguf, "out.gguf", split=10**6),
            baking("gguf", "out.gguf", "--allow-lossy", "--split-max-size", "1M"),
            gguf_state,
        ),
        Scenario("onnx", _with_old(onnx, "out"), baking("onnx", "out"), whole("out/")),
        Scenario("push", _published, ["push", "out", ID], whole("hub/"), hub=True, loses=(0, 2, 6)),
        Scenario(
            "verify",
            _published,
            ["verify", "out", "--profile", "quick"],
            verified_state,
            trains=True,
            rival=baking("hf", "out", "--copy"),
            loses=(0, 2, 3, 5),
        ),
        Scenario("search", _texts, SEARCH, searched_state, trains=True),
        Scenario("extend", _texts, EXTEND, extended_state, trains=True, loses=(0, 2, 3)),
        Scenario("eval", _texts, EVAL, evaluated_state, trains=True),
    )
}
