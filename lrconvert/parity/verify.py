# SPDX-License-Identifier: Apache-2.0
"""Verifying an artifact: are its files whole, and does every piece of code in it compute the recipe?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.checkpoint import Model, describe_source, open_model, read_json
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.errors import InputError, LrconvertError, UsageError
from lrconvert.expressible import LLAMA_CPP_STATIC, by_context, project
from lrconvert.output import EDITABLE, Manifest, manifest_path, replace_file, sha256_of
from lrconvert.parity import stored as gguf_rows
from lrconvert.parity.cases import DECODED, Case, build_cases, kept, stream
from lrconvert.parity.codes import Code, Options, codes_of, kind_of
from lrconvert.parity.config_checks import check_config
from lrconvert.parity.judge import Judge, kept_of_batch
from lrconvert.parity.measures import Measures, compare, merge
from lrconvert.parity.nearest import nearest
from lrconvert.parity.promise import Promise, exact_fold_rows, fold_rows, lost, promise
from lrconvert.parity.report import Report, Row, judged
from lrconvert.parity.tolerances import tolerance_for
from lrconvert.recipe import Recipe, load_recipe, parse_recipe, resolve
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.base import Session
from lrconvert.runtimes.llama_cpp import LlamaSession

Progress = Callable[[str], None]


def verify(
    artifact: Path,
    *,
    against: str | None = None,
    recipe: str | Path | Recipe | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare an artifact with the reference on the model and recipe it claims (or on those given).

    Returns the report, good or bad; raises only where nothing could be compared.
    """
    options, say = options or Options(), progress or (lambda what: None)
    kind = kind_of(artifact)
    if not (artifact.is_dir() if kind == "hf" else artifact.is_file()):
        raise InputError(f"{artifact}: no such artifact")
    codes = codes_of(artifact, options)
    manifest = Manifest.read(artifact) if manifest_path(artifact).is_file() or against is None else None
    if manifest is None and recipe is None:
        raise UsageError("--against needs --recipe where the artifact has no manifest")
    model, notes = _source(artifact, manifest, against)
    chosen = _recipe(artifact, manifest, recipe)
    window = manifest.options.get("window") if manifest and recipe is None else None
    spec = resolve(
        chosen,
        family=model.family.name,
        rotary_dim=model.shape.rotary_dim,
        theta=model.shape.theta,
        window=window,
    )
    made = promise(model, spec, manifest.options if manifest else {}, artifact, gguf=kind == "gguf")
    report = Report(
        artifact=artifact.name or str(artifact),
        against=f"{model.reference} + {chosen.name}",
        reference="",
        notes=notes,
        losses=list(made.given_up),
    )
    if manifest is not None:
        say("checksums")
        report.rows += _integrity(artifact if kind == "hf" else artifact.parent, manifest)
    verify_kind = _verify_hf if kind == "hf" else _verify_gguf
    verify_kind(artifact, manifest, made, codes, options, report, say)
    if manifest is not None and recipe is None:
        own = options.runtime is None or options.runtime == "transformers"
        manifest.parity = _recorded(manifest.parity, report.to_json(), None if own else options.runtime)
        replace_file(manifest_path(artifact), manifest.to_json())
    return report


def _verify_hf(
    artifact: Path,
    manifest: Manifest | None,
    made: Promise,
    codes: list[Code],
    options: Options,
    report: Report,
    say: Progress,
) -> None:
    stored = manifest.options.get("dtype") if manifest else None
    judge = Judge(made.model, device=options.device, stored_dtype=stored)
    report.reference = f"reference in {judge.dtype} on {options.device}"
    report.rows += check_config(read_json(artifact / "config.json"), artifact, made.model.family.hf_class)
    if made.spec != made.recipe:
        say("what the weights carry: reference")
        report.rows += fold_rows(made, judge, stored_dtype=stored, device=options.device, budget=options.budget)
    for code in codes:
        _verify_code(artifact, code, made.spec, judge, options, report, say)


def _verify_gguf(
    artifact: Path,
    manifest: Manifest | None,
    made: Promise,
    codes: list[Code],
    options: Options,
    report: Report,
    say: Progress,
) -> None:
    """llama.cpp is judged on the weights in the file; that they are the model's is checked beside it."""
    original = Judge(made.source or made.model, device=options.device)
    report.reference = f"reference in {original.dtype} on {options.device}"
    try:
        stored = GgufCheckpoint(artifact, tolerant=True)
        model = gguf_rows.on_stored_weights(made.model, stored)
    except LrconvertError as error:
        report.rows.append(Row("metadata", "a GGUF of the model", "fail", reason=error.message))
        return
    static = bool(manifest and manifest.options.get("static_long"))
    report.rows += gguf_rows.check_metadata(stored, made.model, made.spec, static=static)
    say("weights")
    rows, exact = gguf_rows.check_weights(stored, made.model)
    report.rows += rows
    judge = original if exact and made.source is None else Judge(model, device=options.device)
    if made.given_up:
        say("what was given up: reference")
        report.rows += lost("llama.cpp", made.recipe, made.kept, original, options.budget)
    if made.source is not None:
        say("the folded attention factor: reference")
        report.rows += exact_fold_rows(made, device=options.device, budget=options.budget)
    if not exact and gguf_rows.computing(stored) != "F32":
        say("quantisation: reference")
        report.rows += gguf_rows.quantisation("llama.cpp", original, made.kept, judge, made.spec, options.budget)
    options = replace(options, dtype=gguf_rows.computing(stored))
    for code in codes:
        if static:
            code = replace(code, capability=lambda family: LLAMA_CPP_STATIC)
        _verify_code(artifact, code, made.spec, judge, options, report, say)


def _recorded(earlier: dict[str, Any] | None, report: dict[str, Any], engine: str | None) -> dict[str, Any]:
    """What the manifest keeps: the report on the artifact's own codes, and the other engines' beside it."""
    engines = (earlier or {}).get("engines", {})
    if engine is None:
        return {**report, "engines": engines} if engines else report
    return {**(earlier or report), "engines": {**engines, engine: report}}


def _source(artifact: Path, manifest: Manifest | None, against: str | None) -> tuple[Model, list[str]]:
    """The model to judge by: the one given, the one the manifest names, else the artifact's own weights."""
    if against is not None:
        notes = ["the manifest's adapter is not merged into the model given: it is compared as it is"]
        return open_model(against, tolerant=True), notes if manifest and manifest.source.get("adapter") else []
    assert manifest is not None
    named = str(manifest.source["model"])
    try:
        # A GGUF that was repaired is a model whose own rope scaling means nothing.
        model = open_model(named, revision=manifest.source.get("revision"), tolerant=manifest.target == "gguf")
        recorded = manifest.source.get("adapter")
        adapter = (
            open_adapter(str(recorded["reference"]), manifest.source.get("adapter_revision")) if recorded else None
        )
    except LrconvertError as error:
        note = f"the source, {named}, can't be opened ({error.message}): judged on the artifact's own weights"
        return open_model(artifact), [note]
    changed = {
        f"{named} is no longer the model": describe_source(model)["weights"] != manifest.source["weights"],
        "its adapter is no longer the one": adapter is not None and adapter.description != recorded,
    }
    if any(changed.values()):
        raise InputError(
            f"{', '.join(what for what, is_so in changed.items() if is_so)} that {artifact} was made from, as "
            f"{manifest_path(artifact).name} describes it",
            remedy="Name the right one with --against, or convert again",
        )
    if adapter is not None:
        # A dtype of its own, a fold and a GGUF's types are rounded once and later.
        options = manifest.options
        plain = options.get("dtype") is None and options.get("folded_attention", 1.0) == 1.0
        model = merged(model, adapter, rounded=plain and manifest.target == "hf")
    return model, []


def _recipe(artifact: Path, manifest: Manifest | None, recipe: str | Path | Recipe | None) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None:
        return load_recipe(recipe)
    assert manifest is not None
    return parse_recipe(json.dumps(manifest.recipe), manifest_path(artifact).name)


def _integrity(folder: Path, manifest: Manifest) -> list[Row]:
    """Every file of the manifest: there, as long as it was, the same bytes. Completes missing digests, and takes
    over those of files that people may edit."""
    rows = []
    for name, record in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            rows.append(Row("files", name, "fail", reason=f"{name} is missing"))
        elif name in EDITABLE:
            record.size, record.sha256 = path.stat().st_size, sha256_of(path)
        elif path.stat().st_size != record.size:
            reason = f"{name} has {path.stat().st_size} bytes; the manifest says {record.size}"
            rows.append(Row("files", name, "fail", reason=reason))
        elif (digest := sha256_of(path)) != (record.sha256 or digest):
            rows.append(Row("files", name, "fail", reason=f"{name} has other bytes than when it was written"))
        else:
            record.sha256 = digest
    if not rows:
        rows.append(Row("files", f"{len(manifest.files)} files, sha256", "pass"))
    return rows


def _verify_code(
    artifact: Path, code: Code, spec: RopeSpec, judge: Judge, options: Options, report: Report, say: Progress
) -> None:
    capability = code.capability(judge.model.family)
    projected, losses = project(spec, capability)
    projected = by_context(projected, capability)
    edges = spec.boundaries[:1] if capability.once else None
    cases = list(build_cases(projected, capability, options.budget, asking=code.asking, edges=edges))
    say(f"{code.name} code: reference")
    judge.prepare(projected, [case for case in cases if not case.skipped])
    say(f"{code.name} code: loading")
    try:
        session = code.open(artifact, options)
    except InputError as error:
        report.rows.append(Row(code.name, "loads", "fail", reason=error.message))
        return
    with session:
        report.runtimes[code.name] = session.info
        for case in cases:
            say(f"{code.name} code: {case.name}")
            report.rows.append(_verify_case(code, case, projected, judge, session, options))
        if code.coarse(options.dtype):
            say(f"{code.name} code: is the recipe nearest?")
            report.rows += nearest(code.name, projected, judge, lambda case: _logits(case, judge, session))
    for loss in losses:
        report.losses.append(loss)
    if losses:
        say(f"{code.name} code: what it can't express")
        report.rows += lost(code.name, spec, projected, judge, options.budget)


def _verify_case(code: Code, case: Case, spec: RopeSpec, judge: Judge, session: Session, options: Options) -> Row:
    if case.skipped:
        return Row(code.name, case.name, "skipped", length=case.length, reason=case.skipped)
    try:
        measures = _ask(case, spec, judge, session)
    except InputError as error:
        return Row(code.name, case.name, "fail", length=case.length, reason=error.message)
    tolerance = tolerance_for(code.name, options.dtype, case.length)
    return judged(code.name, case.name, case.length, measures, tolerance, known=case.known)


def _ask(case: Case, spec: RopeSpec, judge: Judge, session: Session) -> Measures:
    vocabulary = judge.model.shape.vocab
    room = _room(case)
    if case.kind == "shift":
        assert isinstance(session, LlamaSession)
        tokens = stream(vocabulary, case.lengths[0] + DECODED).tolist()
        read, more = tokens[: case.lengths[0]], tokens[case.lengths[0] :]
        return compare(judge.shifted(spec, case), session.shifted(read, case.dropped, more, **room))
    if case.kind == "decode":
        prompt = stream(vocabulary, case.lengths[0])
        tokens, answers = session.generate(prompt.tolist(), DECODED, **room)
        return compare(judge.decoded(spec, prompt, tokens, context=case.context), answers)
    if case.kind == "batch":
        rows = [stream(vocabulary, length, row).tolist() for row, length in enumerate(case.lengths)]
        count = len(kept_of_batch(case, 0))
        answered = session.logits(rows, keep=list(range(-count, 0)), **room)
        parts = [compare(judge.forward(spec, case, row), answer) for row, answer in enumerate(answered)]
        return merge(parts, [count] * len(parts))
    return compare(judge.forward(spec, case), _logits(case, judge, session))


def _logits(case: Case, judge: Judge, session: Session) -> np.ndarray:
    """What the artifact answers to a forward case."""
    positions = case.positions() if case.spread else None
    tokens = stream(judge.model.shape.vocab, case.length if positions is None else len(positions))
    (answer,) = session.logits(
        [tokens.tolist()],
        positions=None if positions is None else positions.tolist(),
        keep=kept(len(tokens)).tolist(),
        **_room(case),
    )
    return answer


def _room(case: Case) -> dict[str, Any]:
    """What code with contexts is asked besides; others know none."""
    return {} if case.context is None else {"context": case.context}
