# SPDX-License-Identifier: Apache-2.0
"""Verifying an artifact: are its files whole, and does every piece of code in it compute the recipe?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrconvert.checkpoint import Model, describe_source, open_model, read_json
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.errors import InputError, LrconvertError, UsageError
from lrconvert.expressible import CUSTOM_HF, NATIVE_HF, NATIVE_HF_FORMULA, Capability, project
from lrconvert.output import MANIFEST, Manifest, replace_file, sha256_of
from lrconvert.parity.cases import CPU, DECODED, GPU, Budget, Case, build_cases, kept, stream
from lrconvert.parity.config_checks import check_config
from lrconvert.parity.judge import Judge, kept_of_batch
from lrconvert.parity.measures import Measures, compare, merge
from lrconvert.parity.report import Report, Row, Verdict
from lrconvert.parity.tolerances import Tolerance, tolerance_for
from lrconvert.recipe import Recipe, load_recipe, parse_recipe, resolve
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.base import Interpreter, Session, WorkerSession

Progress = Callable[[str], None]
UNLIMITED = Budget(dense=2**31, decode=2**31)


@dataclass(frozen=True)
class Options:
    """How to verify. `codes` of the artifact to ask (None: all); `full`: nothing is spread or skipped;
    `python`: the runtime's interpreter; `interpreter`: one that runs already, shared by all codes."""

    device: str = "cpu"
    dtype: str = "float32"
    codes: tuple[str, ...] | None = None
    full: bool = False
    python: str | None = None
    threads: int | None = None
    interpreter: Interpreter | None = None

    @property
    def budget(self) -> Budget:
        return UNLIMITED if self.full else CPU if self.device == "cpu" else GPU


@dataclass(frozen=True)
class Code:
    """A piece of rotating code in an artifact, what it can express and how to ask it."""

    name: str
    capability: Capability
    open: Callable[[Path, Options], WorkerSession]


def _transformers(custom: bool) -> Callable[[Path, Options], WorkerSession]:
    def opened(artifact: Path, options: Options) -> WorkerSession:
        from lrconvert.runtimes.transformers import open_session

        return open_session(
            artifact,
            custom=custom,
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
            python=options.python,
            interpreter=options.interpreter,
        )

    return opened


def codes_of(artifact: Path, model: Model) -> list[Code]:
    """The codes that can run an artifact: a table by format."""
    native = NATIVE_HF_FORMULA if model.family.hf_three_key_scaling else NATIVE_HF
    codes = [Code("native", native, _transformers(custom=False))]
    if "auto_map" in read_json(artifact / "config.json"):
        codes.append(Code("custom", CUSTOM_HF, _transformers(custom=True)))
    return codes


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
    if not artifact.is_dir():
        raise InputError(f"{artifact}: no such artifact")
    manifest = Manifest.read(artifact) if (artifact / MANIFEST).is_file() or against is None else None
    if manifest is None and recipe is None:
        raise UsageError("--against needs --recipe where the folder has no manifest")
    model, notes = _source(artifact, manifest, against)
    chosen = _recipe(manifest, recipe)
    window = manifest.options.get("window") if manifest and recipe is None else None
    spec = resolve(
        chosen,
        family=model.family.name,
        rotary_dim=model.shape.rotary_dim,
        theta=model.shape.theta,
        window=window,
    )
    stored = manifest.options.get("dtype") if manifest else None
    judge = Judge(model, device=options.device, stored_dtype=stored)
    report = Report(
        artifact=artifact.name or str(artifact),
        against=f"{model.reference} + {chosen.name}",
        reference=f"reference in {judge.dtype} on {options.device}",
        notes=notes,
    )
    if manifest is not None:
        say("checksums")
        report.rows += _integrity(artifact, manifest)
    report.rows += check_config(read_json(artifact / "config.json"), artifact, model.family.hf_class)
    for code in codes_of(artifact, model):
        if options.codes is None or code.name in options.codes:
            _verify_code(artifact, code, spec, judge, options, report, say)
    if manifest is not None and recipe is None:
        manifest.parity = report.to_json()
        replace_file(artifact / MANIFEST, manifest.to_json())
    return report


def _source(artifact: Path, manifest: Manifest | None, against: str | None) -> tuple[Model, list[str]]:
    """The model to judge by: the one given, the one the manifest names, else the artifact's own weights."""
    if against is not None:
        notes = ["the manifest's adapter is not merged into the model given: it is compared as it is"]
        return open_model(against), notes if manifest and manifest.source.get("adapter") else []
    assert manifest is not None
    named = str(manifest.source["model"])
    try:
        model = open_model(named, revision=manifest.source.get("revision"))
        recorded = manifest.source.get("adapter")
        adapter = open_adapter(str(recorded["reference"])) if recorded else None
    except LrconvertError as error:
        note = f"the source, {named}, can't be opened ({error.message}): judged on the artifact's own weights"
        return open_model(artifact), [note]
    differs = ["weights"] if describe_source(model)["weights"] != manifest.source["weights"] else []
    if adapter is not None and adapter.description != recorded:
        differs.append("adapter")
    if differs:
        raise InputError(
            f"{named} is no longer the model that {artifact} was made from: its {' and '.join(differs)} differ from "
            f"what {MANIFEST} describes",
            remedy="Name the right one with --against, or convert again",
        )
    if adapter is not None:
        model = merged(model, adapter, rounded=manifest.options.get("dtype") is None)
    return model, []


def _recipe(manifest: Manifest | None, recipe: str | Path | Recipe | None) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None:
        return load_recipe(recipe)
    assert manifest is not None
    return parse_recipe(json.dumps(manifest.recipe), MANIFEST)


def _integrity(artifact: Path, manifest: Manifest) -> list[Row]:
    """Every file of the manifest: there, as long as it was, the same bytes. Completes missing digests."""
    rows = []
    for name, record in sorted(manifest.files.items()):
        path = artifact / name
        if not path.is_file():
            rows.append(Row("files", name, "fail", reason=f"{name} is missing"))
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
    projected, losses = project(spec, code.capability)
    cases = list(build_cases(projected, code.capability, options.budget))
    say(f"{code.name} code: reference")
    judge.prepare(projected, cases)
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
    for loss in losses:
        report.losses.append(loss)
    if losses:
        say(f"{code.name} code: what it can't express")
        report.rows += _measure_losses(code, spec, projected, judge, options)


def _verify_case(code: Code, case: Case, spec: RopeSpec, judge: Judge, session: Session, options: Options) -> Row:
    if case.skipped:
        return Row(code.name, case.name, "skipped", length=case.length, reason=case.skipped)
    try:
        measures = _ask(case, spec, judge, session)
    except InputError as error:
        return Row(code.name, case.name, "fail", length=case.length, reason=error.message)
    tolerance = tolerance_for(code.name, options.dtype, case.length)
    return _judged(code, case, measures, tolerance)


def _judged(code: Code, case: Case, measures: Measures, tolerance: Tolerance) -> Row:
    verdict: Verdict = "pass"
    reason, bound = "", tolerance.kl_mean
    if not measures.kl_mean <= tolerance.kl_mean:
        verdict, reason = "fail", f"mean KL {measures.kl_mean:.2e}, {tolerance.kl_mean:.0e} allowed"
    elif not measures.kl_max <= tolerance.kl_max:
        verdict, reason = "fail", f"largest KL {measures.kl_max:.2e}, {tolerance.kl_max:.0e} allowed"
    if case.known:
        verdict, reason, bound = "known", case.known, None
    return Row(code.name, case.name, verdict, length=case.length, bound=bound, reason=reason, **vars(measures))


def _ask(case: Case, spec: RopeSpec, judge: Judge, session: Session) -> Measures:
    vocabulary = judge.model.shape.vocab
    if case.kind == "decode":
        prompt = stream(vocabulary, case.lengths[0])
        tokens, answers = session.generate(prompt.tolist(), DECODED)
        return compare(judge.decoded(spec, prompt, tokens), answers)
    if case.kind == "batch":
        rows = [stream(vocabulary, length, row).tolist() for row, length in enumerate(case.lengths)]
        count = len(kept_of_batch(case, 0))
        answered = session.logits(rows, keep=list(range(-count, 0)))
        parts = [compare(judge.forward(spec, case, row), answer) for row, answer in enumerate(answered)]
        return merge(parts, [count] * len(parts))
    positions = case.positions() if case.spread else None
    tokens = stream(vocabulary, case.length if positions is None else len(positions))
    answer = session.logits(
        [tokens.tolist()],
        positions=None if positions is None else positions.tolist(),
        keep=kept(len(tokens)).tolist(),
    )
    return compare(judge.forward(spec, case), answer[0])


def _measure_losses(code: Code, exact: RopeSpec, projected: RopeSpec, judge: Judge, options: Options) -> Sequence[Row]:
    """What the projection costs against the recipe itself, by the reference alone, at every tier's end."""
    cases = []
    for tier in exact.tiers:
        if tier != projected.tier_for(tier.max_length):
            spread = tier.max_length > options.budget.dense
            cases.append(Case(f"lost at {tier.max_length}", "forward", (tier.max_length,), spread=spread))
    judge.prepare(exact, cases)
    judge.prepare(projected, cases)
    rows = []
    for case in cases:
        measures = compare(judge.forward(exact, case), judge.forward(projected, case))
        reason = "what the recipe asks and this code can't express"
        rows.append(Row(code.name, case.name, "known", length=case.length, reason=reason, **vars(measures)))
    return rows
