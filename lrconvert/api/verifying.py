# SPDX-License-Identifier: Apache-2.0
"""`verify`: compare an artifact with the reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lrconvert.artifact.checks import Row
from lrconvert.checkpoint import locate, names_hub_id
from lrconvert.errors import UsageError, require
from lrconvert.parity import Options, Report
from lrconvert.parity import verify as compare
from lrconvert.parity.lock import check_lock, lock_rows
from lrconvert.parity.options import PROFILES, Profile
from lrconvert.precision import long_name, short_name
from lrconvert.progress import Progress
from lrconvert.recipe import Recipe
from lrconvert.recipe.importing import open_recipe
from lrconvert.runtimes import runtime_for
from lrconvert.targets import target_of
from lrconvert.training.devices import torch_device


def verify(
    artifact: str | Path,
    *,
    against: str | None = None,
    recipe: str | Path | Recipe | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    codes: Sequence[str] = (),
    runtime: str | None = None,
    profile: Profile = "full",
    full: bool = False,
    files_only: bool = False,
    python: str | None = None,
    library: str | None = None,
    kv: str = "f32",
    threads: int | None = None,
    trust_code: bool = False,
    lock: str | Path | None = None,
    progress: Progress | None = None,
    watch: Callable[[Row], None] | None = None,
) -> Report:
    """Does an artifact compute what its recipe says? `report.passed` is the answer, `report.rows` the evidence.

    `artifact`: a path, or a Hub id, whose manifest stays as it is.

    `against` and `recipe`: the model and recipe to compare with; by default those that the manifest names. Its
    adapter is merged into the model that is given. A recipe is named as for baking: a file, a folder, a shipped name,
    or a model whose rotation it is. `dtype`: what a folder computes in, f32 (default), bf16 or f16, or by the long
    names; the reference stays in float64 (float32 on a GPU). `codes`: "native", "custom" or both, of what transformers
    runs. `runtime`: what runs the artifact; `python`: its interpreter. `full`: consecutive positions at every length.
    `profile`: "quick" asks for one case on each side of every boundary and the far end, and leaves the manifest's
    report.
    `files_only`: nothing is run, no runtime is needed; config, metadata, tokenizer, digests and weights are compared.
    `lock`: a file of measured values. Written by the first verification that passes; later ones fail where one drifts.
    `trust_code`: code that the folder brings is run even where it is not lrconvert's.
    `progress` gets every step, `watch` every row when it is known. Raises only where nothing can be compared.
    """
    if profile not in PROFILES:
        raise UsageError(f"profile {profile!r}: one of {', '.join(PROFILES)} is needed")
    if full and profile == "quick":
        raise UsageError("--full asks for every position, --profile quick for few", remedy="Choose one of them")
    if files_only and (codes or runtime or full or python or library):
        raise UsageError("--files-only runs nothing, so there is no code, runtime or length to choose")
    if files_only and lock is not None:
        raise UsageError("--files-only measures nothing that a lock could keep")
    dtype, kv = dtype and long_name(dtype), short_name(kv)
    published = names_hub_id(artifact)
    path = locate(artifact) if published else Path(artifact)
    target = target_of(path)
    ignored = []
    if files_only:
        for module, extra in target.reads_with:
            require(module, extra, "verify --files-only")
    else:
        chosen = runtime_for(target.name, runtime)
        chosen.check(codes)
        chosen.require("verify")
        for module, extra in (*target.needs, ("torch", "hf")):
            require(module, extra, "verify")
        torch_device(device, "hf", "verify")
        ignored = chosen.ignored(dtype)
    named = recipe if recipe is None or isinstance(recipe, Recipe) else open_recipe(recipe)[0]
    options = Options(
        device=device,
        dtype="float32" if dtype is None or ignored else dtype,
        threads=threads,
        trust_code=trust_code,
        python=python,
        library=library,
        kv=kv,
        runtime=runtime,
        backends=tuple(codes) or None,
        profile=profile,
        full=full,
        files_only=files_only,
        records=not published,
    )
    settings = {
        "profile": "everything" if full else profile,
        "runtime": runtime or "the target's own",
        "codes": ", ".join(codes) or "all",
        "device": device,
        "dtype": options.dtype,
        "kv": kv,
    }
    locked = None if lock is None else check_lock(Path(lock), settings)
    report = compare(path, target, against=against, recipe=named, options=options, progress=progress, watch=watch)
    report.notes += ignored
    if lock is not None:
        report.rows += lock_rows(report, Path(lock), locked, settings)
    return report
