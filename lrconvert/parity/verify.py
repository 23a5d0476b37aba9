# SPDX-License-Identifier: Apache-2.0
"""Verifying an artifact: are its files whole, and does every piece of code in it compute the recipe?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.checkpoint import Model, describe_source, open_model, read_json
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.errors import InputError, LrconvertError, UsageError
from lrconvert.expressible import CUSTOM_HF, MLX, VLLM, Capability, native_hf, project
from lrconvert.families import Family
from lrconvert.output import EDITABLE, MANIFEST, Manifest, replace_file, sha256_of
from lrconvert.parity.cases import (
    ANYTHING,
    CPU,
    DECODED,
    GPU,
    GPU_FLOAT32,
    Asking,
    Budget,
    Case,
    build_cases,
    kept,
    stream,
)
from lrconvert.parity.config_checks import check_config
from lrconvert.parity.judge import Judge, kept_of_batch
from lrconvert.parity.measures import Measures, compare, merge
from lrconvert.parity.promise import fold_rows, lost, promise
from lrconvert.parity.report import Report, Row, judged
from lrconvert.parity.tolerances import tolerance_for
from lrconvert.recipe import Recipe, load_recipe, parse_recipe, resolve
from lrconvert.rope import RopeSpec
from lrconvert.runtimes import mlx, transformers, vllm
from lrconvert.runtimes.base import Interpreter, Session, WorkerSession

Progress = Callable[[str], None]
UNLIMITED = Budget(dense=2**31, decode=2**31)


@dataclass(frozen=True)
class Options:
    """How to verify. `codes` of the artifact to ask (None: all); `full`: nothing is spread or skipped;
    `python`: the runtime's interpreter; `interpreter`: one that runs already, shared by all codes; `runtime`: one
    of `RUNTIMES`."""

    device: str = "cpu"
    dtype: str = "float32"
    codes: tuple[str, ...] | None = None
    full: bool = False
    python: str | None = None
    threads: int | None = None
    interpreter: Interpreter | None = None
    runtime: str = "transformers"

    @property
    def budget(self) -> Budget:
        return (
            UNLIMITED if self.full else CPU if self.device == "cpu" else GPU_FLOAT32 if self.dtype == "float32" else GPU
        )


@dataclass(frozen=True)
class Code:
    """A piece of code that can run an artifact: what it can express, by family, what it can be asked and how."""

    name: str
    runtime: str
    capability: Callable[[Family], Capability]
    open: Callable[[Path, Options], WorkerSession]
    asking: Asking = ANYTHING
    needs: str | None = None  # a key of config.json without which the artifact has no such code


def _transformers(custom: bool) -> Callable[[Path, Options], WorkerSession]:
    return lambda artifact, options: transformers.open_session(
        artifact,
        custom=custom,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        python=options.python,
        interpreter=options.interpreter,
    )


def _mlx(artifact: Path, options: Options) -> WorkerSession:
    return mlx.open_session(artifact, dtype=options.dtype, python=options.python, interpreter=options.interpreter)


def _vllm(artifact: Path, options: Options) -> WorkerSession:
    return vllm.open_session(
        artifact,
        dtype=options.dtype,
        threads=options.threads,
        python=options.python,
        interpreter=options.interpreter,
    )


CODES = (
    Code("native", "transformers", native_hf, _transformers(custom=False)),
    Code("custom", "transformers", lambda family: CUSTOM_HF, _transformers(custom=True), needs="auto_map"),
    Code("mlx", "mlx", lambda family: MLX, _mlx, Asking(positions=False)),
    # vLLM serves no prompt that leaves no room for one more token.
    Code("vllm", "vllm", lambda family: VLLM, _vllm, Asking(positions=False, reserved=1)),
)
RUNTIMES = tuple(dict.fromkeys(code.runtime for code in CODES))


def codes_of(artifact: Path, runtime: str) -> list[Code]:
    """The codes of a runtime that can run an artifact."""
    config = read_json(artifact / "config.json")
    return [code for code in CODES if code.runtime == runtime and (code.needs is None or code.needs in config)]


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
    made = promise(model, spec, manifest.options if manifest else {}, artifact)
    judge = Judge(made.model, device=options.device, stored_dtype=stored)
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
    report.losses += made.given_up
    if made.spec != spec:
        say("what the weights carry: reference")
        report.rows += fold_rows(made, judge, stored_dtype=stored, device=options.device, budget=options.budget)
    for code in codes_of(artifact, options.runtime):
        if options.codes is None or code.name in options.codes:
            _verify_code(artifact, code, made.spec, judge, options, report, say)
    if manifest is not None and recipe is None:
        manifest.parity = _recorded(manifest.parity, report.to_json(), options.runtime)
        replace_file(artifact / MANIFEST, manifest.to_json())
    return report


def _recorded(earlier: dict[str, Any] | None, report: dict[str, Any], runtime: str) -> dict[str, Any]:
    """What the manifest keeps: the report on the artifact's own codes, and the other engines' beside it."""
    engines = (earlier or {}).get("engines", {})
    if runtime == CODES[0].runtime:
        return {**report, "engines": engines} if engines else report
    return {**(earlier or report), "engines": {**engines, runtime: report}}


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
            f"{MANIFEST} describes it",
            remedy="Name the right one with --against, or convert again",
        )
    if adapter is not None:
        # A dtype of its own, and a fold, are rounded once and later.
        once = manifest.options.get("dtype") is None and manifest.options.get("folded_attention", 1.0) == 1.0
        model = merged(model, adapter, rounded=once)
    return model, []


def _recipe(manifest: Manifest | None, recipe: str | Path | Recipe | None) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None:
        return load_recipe(recipe)
    assert manifest is not None
    return parse_recipe(json.dumps(manifest.recipe), MANIFEST)


def _integrity(artifact: Path, manifest: Manifest) -> list[Row]:
    """Every file of the manifest: there, as long as it was, the same bytes. Completes missing digests, and takes
    over those of files that people may edit."""
    rows = []
    for name, record in sorted(manifest.files.items()):
        path = artifact / name
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
