# SPDX-License-Identifier: Apache-2.0
"""Verifying an artifact: are its files whole, and does every piece of code in it compute the recipe?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrconvert.artifact.manifest import EDITABLE, Manifest, manifest_path, replace_file
from lrconvert.checkpoint import Model, describe_source, open_model, read_json
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint
from lrconvert.checkpoint.source import sha256_of
from lrconvert.engines.capability import LLAMA_CPP_STATIC
from lrconvert.errors import InputError, LrconvertError, UnsupportedError, UsageError
from lrconvert.parity import stored as stored_rows
from lrconvert.parity.asking import Progress, Run, ask_code
from lrconvert.parity.codes import Code, Options, codes_of, kind_of, own_runtime
from lrconvert.parity.config_checks import check_config
from lrconvert.parity.judge import Judge
from lrconvert.parity.promise import Promise, exact_fold_rows, fold_rows, lost, promise
from lrconvert.parity.report import Report, Row
from lrconvert.recipe import Recipe, load_recipe, parse_recipe


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
    if not (artifact.is_file() if kind == "gguf" else artifact.is_dir()):
        raise InputError(f"{artifact}: no such artifact")
    codes = codes_of(artifact, options)
    manifest = Manifest.read(artifact) if manifest_path(artifact).is_file() or against is None else None
    if manifest is None and recipe is None:
        raise UsageError("--against needs --recipe where the artifact has no manifest")
    model, notes = _source(artifact, manifest, against)
    chosen = _recipe(artifact, manifest, recipe)
    window = manifest.options.get("window") if manifest and recipe is None else None
    spec = model.resolve(chosen, window)
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
        report.rows += _integrity(artifact.parent if kind == "gguf" else artifact, manifest)
    run = Run(artifact, options, report, say)
    {"hf": _verify_hf, "gguf": _verify_gguf, "onnx": _verify_onnx}[kind](run, manifest, made, codes)
    if manifest is not None and recipe is None:
        engine = None if options.runtime in (None, own_runtime(kind)) else options.runtime
        manifest.parity = _recorded(manifest.parity, report.to_json(), engine)
        replace_file(manifest_path(artifact), manifest.to_json())
    return report


def _verify_hf(run: Run, manifest: Manifest | None, made: Promise, codes: list[Code]) -> None:
    artifact, options, report = run.artifact, run.options, run.report
    stored = manifest.options.get("dtype") if manifest else None
    judge = Judge(made.model, device=options.device, stored_dtype=stored)
    report.reference = f"reference in {judge.dtype} on {options.device}"
    report.rows += check_config(read_json(artifact / "config.json"), artifact, made.model.family.hf_class)
    if made.spec != made.recipe:
        run.say("what the weights carry: reference")
        report.rows += fold_rows(made, judge, stored_dtype=stored, device=options.device, budget=options.budget)
    for code in codes:
        ask_code(run, code, made.spec, judge, options.dtype)


def _verify_gguf(run: Run, manifest: Manifest | None, made: Promise, codes: list[Code]) -> None:
    """llama.cpp is judged on the weights in the file; that they are the model's is checked beside it."""
    artifact, options, report, say = run.artifact, run.options, run.report, run.say
    original = Judge(made.source or made.model, device=options.device)
    report.reference = f"reference in {original.dtype} on {options.device}"
    try:
        stored = GgufCheckpoint(artifact, tolerant=True)
        model = stored_rows.on_stored_weights(made.model, stored)
    except LrconvertError as error:
        report.rows.append(Row("metadata", "a GGUF of the model", "fail", reason=error.message))
        return
    static = bool(manifest and manifest.options.get("static_long"))
    report.rows += stored_rows.check_metadata(stored, made.model, made.spec, static=static)
    say("weights")
    rows, exact = stored_rows.check_weights(stored, made.model)
    report.rows += rows
    judge = original if exact and made.source is None else Judge(model, device=options.device)
    if made.given_up:
        say("what was given up: reference")
        report.rows += lost("llama.cpp", made.recipe, made.kept, original, options.budget)
    if made.source is not None:
        say("the folded attention factor: reference")
        report.rows += exact_fold_rows(made, device=options.device, budget=options.budget)
    if not exact and stored_rows.computing(stored) != "F32":
        say("quantisation: reference")
        report.rows += stored_rows.quantisation("llama.cpp", original, made.kept, judge, made.spec, options.budget)
    dtype = stored_rows.computing(stored)
    for code in codes:
        if static:
            code = replace(code, capability=lambda family: LLAMA_CPP_STATIC)
        ask_code(run, code, made.spec, judge, dtype)


def _verify_onnx(run: Run, manifest: Manifest | None, made: Promise, codes: list[Code]) -> None:
    """ONNX Runtime is judged on the weights in the folder, as llama.cpp on those of a file."""
    artifact, options, report, say = run.artifact, run.options, run.report, run.say
    stored = OnnxCheckpoint(artifact)
    kind = stored.computing
    refuse_device(kind, stored.attention, options.device)
    original = Judge(made.model, device=options.device)
    report.reference = f"reference in {original.dtype} on {options.device}"
    try:
        model = stored_rows.on_stored_weights(made.model, stored)
    except LrconvertError as error:
        report.rows.append(Row("metadata", "a graph of the model", "fail", reason=error.message))
        return
    say("weights")
    rows, exact = stored_rows.check_weights(stored, made.model)
    report.rows += rows
    judge = original if exact else Judge(model, device=options.device)
    if not exact:
        say("rounding: reference")
        report.rows += stored_rows.quantisation("onnxruntime", original, made.kept, judge, made.spec, options.budget)
    for code in codes:
        asking = replace(code.asking, padded=stored.attention == "standard")
        ask_code(run, replace(code, asking=asking), made.spec, judge, kind)


def refuse_device(kind: str, attention: str, device: str) -> None:
    """What a device has no kernels for. Raises `UnsupportedError`."""
    if device == "cpu" and kind == "BF16":
        raise UnsupportedError("ONNX Runtime has no bfloat16 products on a CPU", remedy="Verify it with --device cuda")
    if device != "cpu" and attention == "gqa" and kind not in ("F16", "BF16"):
        raise UnsupportedError(
            "GroupQueryAttention has no float32 kernel on CUDA: it would run on the CPU",
            remedy="Convert with --attention standard, or with --dtype f16",
        )


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
