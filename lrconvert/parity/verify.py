# SPDX-License-Identifier: Apache-2.0
"""Verifying an artifact: are its files whole, and does every piece of code in it compute the recipe?

One path for every target. What differs between formats is in the target's row: what can be read off its files, and
whether the reference computes with the weights in the artifact (they round) or with the model's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lrconvert.artifact.checks import Row
from lrconvert.artifact.manifest import Manifest, manifest_path
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.recording import Evidence
from lrconvert.artifact.target import Target
from lrconvert.checkpoint import Checkpoint, Model, build_model, describe_source, open_model
from lrconvert.checkpoint.adapter import Adapter, merged, open_adapter
from lrconvert.checkpoint.fold import folded
from lrconvert.engines.capability import static
from lrconvert.errors import InputError, LrconvertError, UsageError
from lrconvert.machine import within_memory
from lrconvert.parity import stored as stored_rows
from lrconvert.parity.asking import Run, ask_backend
from lrconvert.parity.expected import Expected, exact_fold_rows, expected, lifted_rows, lost, rounding_rows
from lrconvert.parity.integrity import Integrity
from lrconvert.parity.options import Options, chosen_backends, code_rows, trusted_backends
from lrconvert.parity.padding import padding_rows
from lrconvert.parity.questions import Questions, at_ends
from lrconvert.parity.reference_runner import ReferenceRunner, check_reference
from lrconvert.parity.report import Report, Rows
from lrconvert.progress import Progress, Steps, silent
from lrconvert.recipe import Recipe, load_recipe, parse_recipe
from lrconvert.runtimes.backend import Backend
from lrconvert.runtimes.base import LESS

QUICK_NOTE = (
    "quick profile: one case on each side of every boundary and the far end; no batches, no decoding, no search for "
    "likely mistakes. The manifest keeps the report of the last full verification"
)
FILES_NOTE = (
    "files only: no code ran, so nothing says what it computes from them. The manifest keeps the report of the last "
    "full verification"
)


def verify(
    artifact: Path,
    target: Target[Any],
    *,
    against: str | None = None,
    recipe: str | Path | Recipe | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    watch: Callable[[Row], None] | None = None,
) -> Report:
    """Compare an artifact with the reference on the model and recipe it claims (or on those given).

    `progress` gets every step, `watch` every row when it is known. Returns the report, good or bad; raises only
    where nothing could be compared, and `EnvironmentFailure` where memory ran out: no verdict on the artifact.
    """
    options, progress = options or Options(), progress or silent
    if not artifact.exists():
        raise InputError(f"{artifact}: no such artifact")
    chosen_codes = chosen_backends(artifact, target.name, options)
    if options.files_only:  # nothing runs, and whose code it would be is said all the same
        backends, unasked = [], code_rows(artifact, chosen_codes, options)
    else:
        backends, unasked = trusted_backends(artifact, chosen_codes, options)
    for backend in backends:
        backend.check(artifact, options)
        backend.check_memory(artifact, options)
    manifest = Manifest.read(artifact) if manifest_path(artifact).is_file() or against is None else None
    if manifest is None and recipe is None:
        raise UsageError("--against needs --recipe where the artifact has no manifest")
    model, notes = _source(artifact, target, manifest, against)
    options = options.fitted(model.shape)
    notes = [*notes, *model.read_dequantised("its dequantised weights are what the artifact is compared with")]
    chosen = _recipe(artifact, manifest, recipe)
    if manifest is not None:
        chosen = manifest.bake.recipe_for(model.family.name, chosen)
    spec = model.resolve(chosen, manifest.bake.window if manifest and recipe is None else None)
    record = manifest.bake if manifest else target.record(spec.window)
    wanted = expected(model, spec, record, artifact)
    if not options.files_only:
        check_reference(wanted.model, options.device)
    report = Report(
        artifact=artifact.name or str(artifact),
        against=f"{model.reference} + {chosen.name}",
        reference="",
        rows=Rows(watch),
        notes=notes,
        losses=list(wanted.dropped),
        files_only=options.files_only,
        spec=wanted.spec,
    )
    report.rows += unasked
    run = Run(artifact, options, report, progress, Steps("checks", progress))
    evidence = None if manifest is None else Evidence.of(artifact, manifest)
    with contextlib.ExitStack() as stack:
        if manifest is not None:
            checked = Integrity(manifest_path(artifact).parent, manifest, progress)
            stack.enter_context(report.rows.beside(checked))
            if recipe is None and len(manifest.losses) < len(wanted.dropped):
                reason = f"it says {len(manifest.losses)} losses, and there are more: {'; '.join(wanted.dropped)}"
                report.rows.append(Row("files", manifest_path(artifact).name, "fail", reason=reason))
        with within_memory("the reference", remedy=LESS):
            _compare(run, target, wanted, record, backends)
    if options.files_only or options.quick:
        report.notes.append(FILES_NOTE if options.files_only else QUICK_NOTE)
    if manifest is not None and evidence is not None:
        engine = None if options.runtime in (None, target.runtime) else options.runtime
        partly = options.quick or options.files_only  # what is published rests on a full verification
        told = None if partly else report.to_json()
        given = recipe is not None or not options.records  # then the report is not for the manifest
        why = evidence.changed() if given else evidence.record(told, manifest.files, engine)
        if why is not None:
            reason = f"{why} while it was verified, so nothing was recorded: verify again"
            report.rows.append(Row("files", "the artifact at the end", "fail", reason=reason))
    return report


# --- comparing -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _References:
    """The reference over the weights that the code computes with, and over those of the model, unscaled."""

    stored: ReferenceRunner
    plain: ReferenceRunner
    exact: bool = True  # the artifact's weights are the model's, bit by bit
    computing: str | None = None  # what products are computed in, where the file decides that


def _compare(run: Run, target: Target[Any], wanted: Expected, record: BakeRecord, backends: list[Backend]) -> None:
    """Every row that needs the reference, into the report."""
    report, options = run.report, run.options
    stored = _opened(run, target, wanted)
    if target.stored and stored is None:
        return
    report.rows += target.checks(run.artifact, stored, wanted.model, wanted.spec, record)
    if record.padded:
        report.rows += padding_rows(stored or target.open(run.artifact), wanted.model, record.padded)
    if stored is None:
        report.rows += _copied(run, target, wanted, record)
    if options.files_only:
        report.reference = "no reference: files only"
        report.rows += [] if stored is None else _own_weights(run, wanted, stored)[0]
        run.steps.finish()
        return
    coarse = stored is not None and not any(backend.is_exact(stored.computing or "") for backend in backends)
    references = _on_model(run, wanted, record) if stored is None else _on_stored(run, wanted, stored, coarse)
    report.reference = f"reference in {references.stored.dtype} on {options.device}"
    backend_questions: list[Questions] = []
    for backend in backends:
        if record.static:
            own = backend.capability
            backend = replace(backend, capability=lambda model, own=own: static(own(model)))
        if stored is not None and not stored.takes_padding:
            backend = replace(backend, accepts=replace(backend.accepts, padded=False))
        if stored is not None and not stored.takes_shift:
            backend = replace(backend, accepts=replace(backend.accepts, shifts=False))
        dtype = references.computing or options.dtype
        questions = Questions.of(backend, wanted.spec, wanted.model, dtype, options.budget)
        questions.expect(run.steps)
        backend_questions.append(questions)
    baked = _bake_checks(run, target, wanted, record, references)
    for check in baked:
        run.steps.expect(check.cost)
    for questions in backend_questions:
        ask_backend(run, questions, references.stored)
    for check in baked:  # last: they find passes of the reference that the cases left
        run.steps.start(check.what, check.cost)
        report.rows += check.rows()
    run.steps.finish()


def _opened(run: Run, target: Target[Any], wanted: Expected) -> Checkpoint | None:
    """The artifact's own weights, where the reference needs them; a failed row where they aren't the model's.

    Raises `InputError` for files that can't be read.
    """
    if not target.stored:
        return None
    stored = target.open(run.artifact)
    try:
        stored_rows.on_stored_weights(wanted.model, stored)
    except LrconvertError as error:
        run.report.rows.append(Row("metadata", f"{target.title} of the model", "fail", reason=error.message))
        return None
    return stored


def _copied(run: Run, target: Target[Any], wanted: Expected, record: BakeRecord) -> list[Row]:
    """That the weights of an artifact which the reference does not compute with are the model's all the same."""
    if wanted.model.checkpoint.path.resolve() == run.artifact.resolve():
        return []  # there is nothing to compare with, and a row of the target's says so
    try:
        own = build_model(str(run.artifact), target.open(run.artifact), tied=wanted.model.shape.tied)
    except LrconvertError as error:
        return [Row(stored_rows.WEIGHTS, "weights of the model", "fail", reason=error.message)]
    return stored_rows.check_folder_weights(own, wanted.model, record.stored, run.progress)


def _on_model(run: Run, wanted: Expected, record: BakeRecord) -> _References:
    """Weights that stay what they were, or are rounded once to the stored dtype."""
    dtype = record.stored
    runner = partial(ReferenceRunner, device=run.options.device, stored_dtype=dtype, watch=run.steps.within)
    stored = runner(wanted.model)
    if wanted.source is None:
        return _References(stored, stored)
    unscaled = folded(wanted.source, 1.0, rounded=dtype is None)
    return _References(stored, runner(unscaled))


def _own_weights(run: Run, wanted: Expected, stored: Checkpoint) -> tuple[list[Row], bool]:
    """Whether the weights in the artifact are the model's; and whether they are equal. Where the source is gone they
    would be compared with themselves, which says nothing and needs no row."""
    if wanted.model.checkpoint.path.resolve() == run.artifact.resolve():
        return [], True
    return stored_rows.check_weights(stored, wanted.model, run.progress)


def _on_stored(run: Run, wanted: Expected, stored: Checkpoint, coarse: bool) -> _References:
    """The weights in the artifact. That they are the model's is checked tensor by tensor. `coarse`: all codes round
    their products so much that a bound can't be small; the reference computes in float32 then, in half the time."""
    rows, exact = _own_weights(run, wanted, stored)
    run.report.rows += rows
    runner = partial(ReferenceRunner, device=run.options.device, watch=run.steps.within, coarse=coarse)
    plain = runner(wanted.source or wanted.model)
    if exact and wanted.source is None:
        return _References(plain, plain, exact, stored.computing)
    model = stored_rows.on_stored_weights(wanted.model, stored)
    return _References(runner(model), plain, exact, stored.computing)


@dataclass(frozen=True)
class _Check:
    """A step of the reference alone."""

    what: str
    cost: float
    rows: Callable[[], Iterable[Row]]


def _bake_checks(
    run: Run, target: Target[Any], wanted: Expected, record: BakeRecord, references: _References
) -> list[_Check]:
    """What the bake itself did: dropped parts of the recipe, a folded attention factor, rounded weights."""
    device, budget = run.options.device, run.options.budget
    plain, stored = references.plain, references.stored
    cost = at_ends((tier.max_length for tier in wanted.kept.tiers), budget, passes=2)
    found = []
    if wanted.source is not None:
        what = f"reference: the folded {'multipliers' if wanted.multiplied else 'attention factor'}"
        found.append(_Check(what, cost, lambda: exact_fold_rows(wanted, device=device, budget=budget)))
        if not target.stored:
            what = "reference: the rounding of folded weights"
            found.append(_Check(what, cost, lambda: rounding_rows(wanted, stored, plain, budget)))
    if wanted.limited is not None:
        what = "reference: the lifted sliding window"
        found.append(_Check(what, cost, lambda: lifted_rows(wanted, plain, device=device, budget=budget)))
    if run.options.quick:  # what is left is measured and never fails
        return found
    if wanted.dropped:
        name = record.capability or target.name
        rows = partial(lost, name, wanted.recipe, wanted.kept, plain, budget)
        found.append(_Check("reference: what was dropped", cost, rows))
    if not references.exact and references.computing != "F32":
        kept, spec = wanted.kept, wanted.spec
        rows = partial(stored_rows.quantisation, target.runtime, plain, kept, stored, spec, budget)
        found.append(_Check("reference: quantisation", 2 * cost, rows))
    return found


# --- what is compared with -------------------------------------------------------------------------------


def _source(
    artifact: Path, target: Target[Any], manifest: Manifest | None, against: str | None
) -> tuple[Model, list[str]]:
    """The model to compare with: the one given, the one the manifest names, else the artifact's own weights.

    The source of a repaired GGUF has a broken rope scaling, so it is opened without complaint.
    """
    if against is not None:
        given = open_model(against, tolerant=True, text_only=None)
        if manifest is None or given.checkpoint.path.resolve() == artifact.resolve():
            return given, []
        return _with_adapter(given, artifact, target, manifest)
    assert manifest is not None
    named = str(manifest.source["model"])
    try:
        model = open_model(named, revision=manifest.source.get("revision"), tolerant=True, text_only=None)
        recorded = manifest.source.get("adapter")
        adapter = (
            open_adapter(str(recorded["reference"]), manifest.source.get("adapter_revision")) if recorded else None
        )
    except LrconvertError as error:
        note = f"the source, {named}, can't be opened ({error.message}): compared with the artifact's own weights"
        return build_model(str(artifact), target.open(artifact)), [note]
    changed = {
        f"{named} is no longer the model": describe_source(model)["weights"] != manifest.source.get("weights"),
        "its adapter is no longer the one": adapter is not None and adapter.description != recorded,
    }
    if any(changed.values()):
        raise _changed(", ".join(what for what, is_so in changed.items() if is_so), artifact)
    return model if adapter is None else _merged(model, adapter, target, manifest), []


def _with_adapter(model: Model, artifact: Path, target: Target[Any], manifest: Manifest) -> tuple[Model, list[str]]:
    """A model that was given, with the adapter that the manifest names."""
    recorded = manifest.source.get("adapter")
    if not recorded:
        return model, []
    named = str(recorded["reference"])
    adapter = open_adapter(named, manifest.source.get("adapter_revision"))
    if adapter.description != recorded:
        raise _changed("its adapter is no longer the one", artifact)
    note = f"the adapter that the manifest names, {named}, is merged into the given model"
    return _merged(model, adapter, target, manifest), [note]


def _merged(model: Model, adapter: Adapter, target: Target[Any], manifest: Manifest) -> Model:
    """Rounded here only where the artifact's own weights were: a dtype of its own, a fold and quantised types are
    rounded once and later."""
    bake = manifest.bake
    plain = bake.stored is None and bake.attention_scale == 1.0 and bake.written_as is None
    return merged(model, adapter, rounded=plain and not target.stored)


def _changed(what: str, artifact: Path) -> InputError:
    return InputError(
        f"{what} that {artifact} was made from, as {manifest_path(artifact).name} describes it",
        remedy="Name the right one with --against, or convert again",
    )


def _recipe(artifact: Path, manifest: Manifest | None, recipe: str | Path | Recipe | None) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None:
        return load_recipe(recipe)
    assert manifest is not None
    return parse_recipe(json.dumps(manifest.recipe), manifest_path(artifact).name)
