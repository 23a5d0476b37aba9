# SPDX-License-Identifier: Apache-2.0
"""`lrconvert.extend`: from a model and long texts to a recipe for a much longer window, with trained weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.artifact.sliding import lifted_note
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.adapter import WEIGHTS
from lrconvert.checkpoint.base import Model
from lrconvert.checkpoint.fold import refuse_training
from lrconvert.checkpoint.folder_code import refuses_native
from lrconvert.checkpoint.links import is_inside
from lrconvert.checkpoint.source import sha256_of
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.engines.capability import CUSTOM_HF, SEARCHABLE
from lrconvert.errors import InputError, UsageError, require
from lrconvert.evals.texts import Text, read_texts, sources_of
from lrconvert.extending.checking import check_keys, check_texts, check_unseen
from lrconvert.extending.fitting import check_memory
from lrconvert.extending.plan import Calibrate, Plan, Tune, load_plan
from lrconvert.extending.problems import check_plan
from lrconvert.extending.run import Extension, Finished, check_names, extended_recipe
from lrconvert.extending.task import ADAPTER, Ground, Task
from lrconvert.precision import long_name
from lrconvert.progress import Progress, silent
from lrconvert.recipe import RECIPE_FILE, Recipe, check_output, load_recipe, write_recipe
from lrconvert.recipe.models import portable_name

if TYPE_CHECKING:
    from lrconvert.extending.estimate import Estimate

HELD_OUT_SHARE = 10  # of every text the last tenth, where no held-out texts are given


@dataclass(frozen=True)
class ExtendResult:
    """The recipe and the folder that it was written to; None where the plan was not carried out to its end. `notes`:
    what its user has to know. `leading` is whether this is the process that writes: under torchrun one of them."""

    recipe: Recipe
    path: Path | None
    stages: tuple[Finished, ...]
    work: Path
    notes: tuple[str, ...] = ()
    leading: bool = True


def extend(
    model: str | Path,
    *,
    texts: Sequence[str | Path],
    output: str | Path,
    plan: str | Path | Plan = "small",
    target: int | None = None,
    on: str | Path | None = None,
    held_out: Sequence[str | Path] = (),
    until: str | None = None,
    again: str | None = None,
    work: str | Path | None = None,
    seed: int = 0,
    runtime: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    context_parallel: int = 1,
    shard_weights: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ExtendResult:
    """Extend the window of `model` by the stages of `plan`; the recipe in the folder `output` has its adapter with it.

    Args:
        model: A folder, a GGUF file or a Hub id (`revision`: its branch, tag or commit).
        texts: Long texts to search and train on. `held_out`: texts to evaluate on; none: the last tenth of each text,
            which is then not trained on.
        output: A folder for the recipe and the adapter. An existing one is replaced with `force` alone.
        plan: A plan's file, its name, or a `Plan`.
        target: The window to reach, in tokens, where it is less than the plan's: later stages are left out.
        on: A recipe for `model` that is finished: the first stage begins with its sets, as `runtime` can express them,
            and its adapter.
        until: The last stage to carry out. `again`: the first of those that are carried out although they are finished.
        work: The folder for what the stages leave; None: OUTPUT.work. The same call goes on from it.
        seed, runtime, device, dtype, attention, context_parallel, shard_weights: As for `search`. A recipe for a
            runtime with one attention factor has the last set's in every set, from the first stage on.
        name: The recipe's name; None: the output's.
        progress: Gets every `Step` of every stage.

    Raises:
        UsageError: Options that don't go together, a plan or stage that doesn't exist, an output that exists.
        InputError: A model, text or plan that is damaged or doesn't fit, a model whose rotation is scaled, a stage's
            files that were changed.
        UnsupportedError: A model quantised in a way that can't be read.
        EnvironmentFailure: PyTorch, PEFT or a GPU is missing, or a stage does not fit the memory.
    """
    chosen = _plan(plan, target, on)
    asked = check_names(chosen, until, again)
    task, folder = _prepared(model, texts, output, chosen, held_out, work, seed, revision, progress, runtime, on,
                                     device=device, dtype=dtype, attention=attention,
                                     context_parallel=context_parallel, shard_weights=shard_weights)  # fmt: skip
    extension = Extension(chosen, task, task.folder)
    # The same command after its end writes what it wrote.
    force = force or (again is None and extension.is_recorded(folder, name or folder.name))
    check_output(folder, force=force)
    for module in ("torch", "transformers", "peft"):
        require(module, "train", "an extension")
    check_memory(replace(chosen, stage=asked), task)
    done = extension.run(until=until, again=again)
    recipe = replace(
        extended_recipe(extension, done, name or folder.name),
        base_model=portable_name(model, task.model.checkpoint.path),
    )
    whole = len(done) == len(chosen.stage)
    path = _write(recipe, extension.recipe_file(done), folder, force) if whole and task.leading else None
    written = recipe if path is None else load_recipe(path)
    notes = (
        *(() if task.on is None else task.on.dropped),
        *task.model.read_dequantised("the stages run on its dequantised weights"),
        *lifted_note(task.model, "an extension"),
        *_seen_notes(task),
    )
    return ExtendResult(written, path, tuple(done), task.folder, notes, task.leading)


def estimate_extension(
    model: str | Path,
    *,
    texts: Sequence[str | Path],
    output: str | Path,
    plan: str | Path | Plan = "small",
    target: int | None = None,
    on: str | Path | None = None,
    held_out: Sequence[str | Path] = (),
    until: str | None = None,
    again: str | None = None,
    work: str | Path | None = None,
    runtime: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    **machine: Any,
) -> list[Estimate]:
    """Time and memory of every stage of `extend` up to `until`, on this device. Nothing is written. Raises as `extend`,
    but for an output that exists."""
    from lrconvert.extending.estimate import estimate

    whole = _plan(plan, target, on)
    chosen = replace(whole, stage=check_names(whole, until, again))
    task, _ = _prepared(model, texts, output, chosen, held_out, work, 0, revision, progress, runtime, on, **machine)
    for module in ("torch", "transformers", "peft"):
        require(module, "train", "an extension")
    check_memory(chosen, task)
    return estimate(chosen, replace(task, name="estimate"))


def _prepared(
    model: str | Path,
    texts: Sequence[str | Path],
    output: str | Path,
    plan: Plan,
    held_out: Sequence[str | Path],
    work: str | Path | None,
    seed: int,
    revision: str | None,
    progress: Progress | None,
    runtime: str | None,
    on: str | Path | None,
    **machine: Any,
) -> tuple[Task, Path]:
    """The task of the whole extension, and its output: everything is checked, and nothing is loaded."""
    folder = Path(output)
    if folder.suffix == ".json":
        raise UsageError(f"{folder}: an extension has an adapter beside its recipe", remedy="Name a folder")
    opened = open_model(str(model), revision=revision)
    able = SEARCHABLE[runtime] if runtime else CUSTOM_HF
    ground = None if on is None else Ground.of(str(on), opened, able)
    _check(opened, plan, ground)
    check_keys(plan, opened.checkpoint.path, partial(tokenizer_of, opened.checkpoint.path))
    read, kept = _texts(opened, texts, held_out)
    check_texts(
        plan,
        opened.rotation.original_window,
        [len(text.tokens) for text in read],
        [len(text.tokens) for text in kept],
    )
    if (machine.get("context_parallel") or 1) > 1 and any(isinstance(s, Tune) and s.distil for s in plan.stage):
        raise UsageError("--context-parallel: a stage with `distil` reads whole rows", remedy="Use one of the two")
    if machine.get("dtype"):
        machine["dtype"] = long_name(machine["dtype"])
    if any(isinstance(stage, Calibrate) for stage in plan.stage):
        check_unseen(read, ground)
    place = Path(work) if work is not None else folder.with_name(folder.name + ".work")
    task = Task("", opened, str(model), read, kept, place, place, seed, able, machine, progress or silent, ground)
    return task, folder


def _plan(plan: str | Path | Plan, target: int | None, on: str | Path | None) -> Plan:
    chosen = plan if isinstance(plan, Plan) else load_plan(plan)
    if target is not None and on is not None:
        raise UsageError(
            "--target cuts a plan that begins with the model as it is, and --on begins with a recipe's sets"
        )
    return chosen if target is None else chosen.up_to(target)


def _check(model: Model, plan: Plan, on: Ground | None) -> None:
    found = model.rotation
    if found.scaled:
        raise InputError(
            f"{model.reference} already carries {found.kind} scaling", remedy="Extend the model it was made from"
        )
    folder = model.checkpoint.path
    if folder.is_dir() and (reason := refuses_native(folder)) is not None:
        raise InputError(
            f"{model.reference}: {reason}",
            remedy="Take it out, or merge the adapter first, with PEFT's merge_and_unload",
        )
    if any(isinstance(stage, Tune) for stage in plan.stage):
        refuse_training(model)
    begun = {} if on is None else {"reach": on.window, "rank": on.rank, "projections": on.projections}
    check_plan(plan, f"plan {plan.name}", found.original_window, **begun)


def _seen_notes(task: Task) -> list[str]:
    """Of texts that were trained on and evaluated on. (A tenth that was held out of one is named for it.)"""
    read = {(text.sha256, text.name) for text in task.texts}
    seen = [text.name for text in task.held_out if (text.sha256, text.name) in read]
    return [f"{', '.join(seen)}: trained on as well, so its figures are not of held-out text"] if seen else []


def _texts(
    model: Model, texts: Sequence[str | Path], held_out: Sequence[str | Path]
) -> tuple[tuple[Text, ...], tuple[Text, ...]]:
    """For training, and for evaluation."""

    def read(named: Sequence[str | Path]) -> list[Text]:
        return read_texts(sources_of(named), lambda: tokenizer_of(model.checkpoint.path), vocab=model.shape.vocab)

    found = read(texts)
    if held_out:
        return tuple(found), tuple(read(held_out))
    cuts = [len(text.tokens) - len(text.tokens) // HELD_OUT_SHARE for text in found]
    training = tuple(replace(text, tokens=text.tokens[:cut]) for text, cut in zip(found, cuts, strict=True))
    return training, tuple(
        replace(text, name=f"{text.name}, its last tenth", tokens=text.tokens[cut:])
        for text, cut in zip(found, cuts, strict=True)
    )


def _write(recipe: Recipe, source: Path, folder: Path, force: bool) -> Path:
    """The recipe and its adapter, in one folder; `source` is the last stage's recipe file.

    The recipe file changes last, and what it named before goes away after that: a kill leaves one of the two whole. A
    folder `adapter` that is somebody else's stays.
    """
    before = load_recipe(folder).adapter if (folder / RECIPE_FILE).is_file() else None
    carried, name = load_recipe(source).adapter, None
    if carried is not None:
        name = _copied(source.parent / carried, folder)
    path = write_recipe(replace(recipe, adapter=name), folder, force=force)
    if before not in (None, name) and is_inside(before) and (folder / before / WEIGHTS).is_file():
        shutil.rmtree(folder / before, ignore_errors=True)
    return path


def _copied(adapter: Path, folder: Path) -> str:
    """The name of an adapter's copy in a folder: whole, or not there."""
    digest = sha256_of(adapter / WEIGHTS)
    taken = (folder / ADAPTER).exists()
    if taken and (folder / ADAPTER / WEIGHTS).is_file() and sha256_of(folder / ADAPTER / WEIGHTS) == digest:
        return ADAPTER
    name = f"{ADAPTER}-{digest[:8]}" if taken else ADAPTER
    staged = folder / f".{name}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(adapter, staged)
    if not (folder / name).exists():
        staged.replace(folder / name)
    shutil.rmtree(staged, ignore_errors=True)
    return name
