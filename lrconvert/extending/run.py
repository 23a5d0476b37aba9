# SPDX-License-Identifier: Apache-2.0
"""An extension carried out: stage after stage, each in a folder with the digest of what it was made from.

A stage's folder is named by number, kind and digest. The same command finds what is finished and goes on with what was
interrupted; a changed plan, text or model has other digests, so other folders, and nothing that exists is lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lrconvert import __version__
from lrconvert.checkpoint import describe_source
from lrconvert.checkpoint.adapter import WEIGHTS
from lrconvert.checkpoint.links import is_inside
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import InputError, LrconvertError, UsageError, first_problem
from lrconvert.extending.fitting import SMALLER
from lrconvert.extending.plan import Evaluate, Plan
from lrconvert.extending.stages import STAGES, Facts
from lrconvert.extending.task import ADAPTER, Ground, Task
from lrconvert.machine import within_memory
from lrconvert.progress import Step
from lrconvert.recipe import RECIPE_FILE, SCHEMA_VERSION, Provenance, Recipe, load_recipe, read_bounded
from lrconvert.rope import STRICT, Tier, longrope_attention_factor

RESULT, START = "result.json", "0-start"
SPENT = "spent.json"  # what an unfinished stage took so far
KEPT_EVERY = 2.0  # seconds between two times that they are written
WAIT = 0.2  # seconds between two looks for what the leading process writes
FORMAT = 2  # of the digests: another one repeats all stages


@dataclass(frozen=True)
class Finished:
    """A stage's result: its digest, what it found, seconds (of all its runs), peak memory in bytes, and the sha256 of
    the files that later stages read."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    digest: str
    facts: Facts
    seconds: float
    memory: int | None
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path, digest: str) -> Finished | None:
        """The result in a folder; None where the stage is not finished.

        Raises `InputError` for files that are no longer what the stage wrote.
        """
        from pydantic import TypeAdapter, ValidationError

        if not (folder / RESULT).exists():
            return None
        try:
            found = TypeAdapter(cls).validate_json(read_bounded(folder / RESULT))
            json.dumps(found.facts, allow_nan=False)  # goes into a recipe
        except ValueError as error:
            what = first_problem(error, "the file") if isinstance(error, ValidationError) else error
            raise InputError(
                f"{folder / RESULT}: damaged ({what})", remedy="Delete the folder: the stage runs again"
            ) from error
        changed = [name for name, digest in found.files.items() if not _same(folder, name, digest)]
        if changed or found.digest != digest:
            raise InputError(
                f"{folder}: {', '.join(changed) or RESULT} changed since the stage was finished",
                remedy="Delete the folder: the stage runs again",
            )
        return found


def _same(folder: Path, name: str, digest: str) -> bool:
    return is_inside(name) and (folder / name).is_file() and sha256_of(folder / name) == digest


class Extension:
    """A plan on a task's model, in a folder `work`."""

    def __init__(self, plan: Plan, task: Task, work: Path) -> None:
        self.plan, self.task, self.work = plan, task, work

    def run(self, *, until: str | None = None, again: str | None = None) -> list[Finished]:
        """Carry out the stages up to `until` (its name), those from `again` on anew; every stage's result."""
        if again is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("--from needs a single process", remedy="Run it without torchrun, with --until that stage")
        before, digest = self._start(), self._identity
        done: list[Finished] = []
        anew = False
        for name, stage in zip(self.plan.names, self.plan.stage, strict=True):
            digest = _digest({"before": digest, "stage": asdict(stage)})
            folder = self._folder(name, digest)
            anew = anew or name == again
            if anew and folder.is_dir():
                shutil.rmtree(folder)
            found = Finished.read(folder, digest)
            if found is None:
                found = self._carry_out(name, stage, folder, before, digest)
            done.append(found)
            before = folder / RECIPE_FILE
            if name == until:
                break
        return done

    def is_recorded(self, output: Path, name: str) -> bool:
        """Whether the recipe in a folder is this extension's own, of that name, and every stage is finished."""
        try:
            recipe = load_recipe(output)
        except LrconvertError:
            return False
        if recipe.name != name or not recipe.provenance.stages:
            return False
        digest = self._identity
        for own, stage in zip(self.plan.names, self.plan.stage, strict=True):
            digest = _digest({"before": digest, "stage": asdict(stage)})
            if not (self._folder(own, digest) / RESULT).is_file():
                return False
        return recipe.provenance.stages[-1].get("digest") == digest

    def recipe_file(self, done: list[Finished]) -> Path:
        """The recipe of the last of the stages."""
        return self._folder(done[-1].name, done[-1].digest) / RECIPE_FILE

    def _folder(self, name: str, digest: str) -> Path:
        return self.work / f"{name}-{digest[:8]}"

    # --- one stage ---------------------------------------------------------------------------------------

    def _carry_out(self, name: str, stage: Any, folder: Path, before: Path, digest: str) -> Finished:
        folder.mkdir(parents=True, exist_ok=True)
        task = replace(self.task, name=name, before=before, folder=folder)
        started, spent = time.monotonic(), task.kept(SPENT).get("seconds", 0.0)
        task = replace(task, progress=_Spending(task, started, spent))
        task.say("starting")
        memory = _memory_meter(task)
        try:
            facts = _facts(stage, task)
        finally:
            seconds = spent + time.monotonic() - started
            task.keep(SPENT, {"seconds": round(seconds, 3)})
        if not task.leading:
            return self._awaited(folder, digest)
        files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in _outputs(folder)}
        found = Finished(name, digest, facts, round(seconds, 1), memory(), files)
        task.keep(RESULT, asdict(found))
        return found

    def _awaited(self, folder: Path, digest: str) -> Finished:
        """The result that the leading process writes; torchrun ends this one if that fails."""
        while (found := Finished.read(folder, digest)) is None:
            time.sleep(WAIT)
        return found

    # --- the start ---------------------------------------------------------------------------------------

    def _start(self) -> Path:
        """The recipe before all stages: the model as it is, or the recipe that it begins with."""
        model, shape, on = self.task.model, self.task.model.shape, self.task.on
        window = model.rotation.original_window
        plain = Tier(window, (1.0,) * (shape.rotary_dim // 2), 0, self._attention(window))
        recipe = Recipe(
            schema_version=SCHEMA_VERSION,
            name=self.plan.name,
            family=model.family.name,
            base_model=self.task.reference,
            original_window=window,
            rope_theta=shape.theta,
            rotary_dim=shape.rotary_dim,
            tiers=(plain,) if on is None else on.recipe.tiers,
            provenance=Provenance(kind="extended", method=self.plan.name),
        )
        if self.task.leading:
            folder = self.work / START
            replace(self.task, folder=folder).write(recipe, None if on is None else on.adapter)
            return folder / RECIPE_FILE
        while not (written := self.work / START / RECIPE_FILE).is_file():
            time.sleep(WAIT)
        return written

    def _attention(self, window: int) -> float:
        """The attention factor of the model as it is: of a runtime with one for all sets, already the last set's."""
        per_tier = self.task.able.attention == "per tier"
        return 1.0 if per_tier else longrope_attention_factor(max(self.plan.target / window, 1.0), window)

    @cached_property
    def _identity(self) -> str:
        source = describe_source(self.task.model)
        texts = [[text.sha256 for text in group] for group in (self.task.texts, self.task.held_out)]
        model = {key: source[key] for key in ("family", "config_sha256", "weights")}
        machine = {"dtype": self.task.machine.get("dtype"), "for": self.task.able.name}
        on = {} if self.task.on is None else {"on": _described(self.task.on)}
        return _digest({"format": FORMAT, "model": model, "texts": texts, "seed": self.task.seed, **machine, **on})


class _Spending:
    """Progress that also keeps what a stage took so far: a kill leaves no time to do so."""

    def __init__(self, task: Task, started: float, spent: float) -> None:
        self._task, self._started, self._spent, self._kept = task, started, spent, started

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if now - self._kept >= KEPT_EVERY:
            self._task.keep(SPENT, {"seconds": round(self._spent + now - self._started, 3)})
            self._kept = now
        self._task.progress(step)


def _facts(stage: Any, task: Task) -> Facts:
    """What the stage found. Raises `EnvironmentFailure` where it does not fit the memory."""
    with within_memory(task.name, remedy=SMALLER):
        return STAGES[stage.kind](stage, task)


def extended_recipe(extension: Extension, done: list[Finished], name: str) -> Recipe:
    """The recipe of an extension, with what every stage did and cost, and the last evaluation. Stages of a recipe that
    it began with come first, and the numbers in the names go on."""
    recipe, on = load_recipe(extension.recipe_file(done)), extension.task.on
    earlier = () if on is None else on.recipe.provenance.stages
    stages = [stage for stage in earlier if stage["options"]["kind"] != "evaluate"]
    for finished, stage in zip(done, extension.plan.stage, strict=False):
        evaluates = isinstance(stage, Evaluate)
        stages.append({"name": f"{len(stages) + 1}-{stage.kind}", "digest": finished.digest,
                       "seconds": finished.seconds, "peak_memory": finished.memory, "options": asdict(stage),
                       **({} if evaluates else {"facts": finished.facts})})  # fmt: skip
    evaluations = [finished.facts for finished in done if finished.name.endswith("-evaluate")]
    task = extension.task
    provenance = Provenance(
        kind="extended",
        method=extension.plan.name,
        search={
            "seed": task.seed,
            "texts": [*_earlier_texts(task), *(text.record() for text in task.texts)],
            "code": f"lrconvert {__version__}",
            **({} if on is None else {"on": on.recipe.name}),
        },
        stages=tuple(stages),
    )
    return replace(recipe, name=name, provenance=provenance, evaluation=evaluations[-1] if evaluations else None)


def _earlier_texts(task: Task) -> list[dict[str, Any]]:
    """What the recipe that an extension began with was searched and trained on, as far as it was other texts."""
    told = {} if task.on is None else task.on.recipe.provenance.search or {}
    read = {text.sha256 for text in task.texts}
    return [text for text in told.get("texts", ()) if text["sha256"] not in read]


def _described(on: Ground) -> dict[str, Any]:
    """A recipe that an extension begins with: all that its stages see of it."""
    adapter = None if on.adapter is None else sha256_of(on.adapter / WEIGHTS)
    return {"tiers": [asdict(tier) for tier in on.recipe.tiers], "adapter": adapter}


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _outputs(folder: Path) -> Iterator[Path]:
    """What later stages read: the recipe and the adapter."""
    yield folder / RECIPE_FILE
    yield from sorted(path for path in (folder / ADAPTER).glob("*") if path.is_file())


def _memory_meter(task: Task) -> Any:
    """Reads the peak of the GPU's memory since now; None on a CPU."""
    try:
        import torch
    except ImportError:
        return lambda: None
    device = task.machine.get("device")
    if not torch.cuda.is_available() or (device is not None and not str(device).startswith("cuda")):
        return lambda: None
    torch.cuda.reset_peak_memory_stats()
    return lambda: int(torch.cuda.max_memory_allocated())


def check_names(plan: Plan, until: str | None, again: str | None) -> tuple[Any, ...]:
    """The stages up to `until`. Raises `UsageError` for stages that the plan does not have, and for one to begin with
    (`again`) behind the last one."""
    for option, name in (("--until", until), ("--from", again)):
        if name is not None and name not in plan.names:
            raise UsageError(f"{option} {name}: no such stage", remedy=f"The plan has {', '.join(plan.names)}")
    last = len(plan.stage) if until is None else plan.names.index(until) + 1
    if again is not None and plan.names.index(again) >= last:
        raise UsageError(f"--from {again} is behind --until {until}: nothing would be carried out")
    return plan.stage[:last]
