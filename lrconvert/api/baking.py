# SPDX-License-Identifier: Apache-2.0
"""`hf`, `gguf`, `onnx`: bake a recipe into a model. Each is a plan and its bake; `plan_bake` is the first half."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrconvert.artifact.again import check_not_merged
from lrconvert.artifact.bake import bake
from lrconvert.artifact.manifest import Manifest
from lrconvert.artifact.plan import Plan
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.adapter import choose_adapter, open_adapter
from lrconvert.precision import short_name
from lrconvert.progress import Progress
from lrconvert.recipe import Recipe
from lrconvert.recipe.importing import open_recipe
from lrconvert.recipe.models import check_window, fit_notes, own_recipe
from lrconvert.targets import get_target


@dataclass(frozen=True)
class Artifact:
    """What a bake wrote. `path` is what a program opens: a folder, or the (first) file."""

    path: Path
    manifest: Manifest


def plan_bake(
    target: str,
    model: str | Path | Model,
    recipe: str | Path | Recipe | None,
    output: str | Path,
    options: Any = None,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    text_only: bool = False,
) -> Plan:
    """What baking `recipe` into `model` would write; nothing is written yet.

    `model`: a folder, a GGUF file, a Hub id (at `revision`), or a model that is open. `recipe`: a file, a folder or a
    shipped name; a config.json, a model or its Hub id, whose rotation it then is (`recipe.importing.open_recipe`); a
    recipe; None for the rotation that the model carries itself. `options`: the target's own, None for its defaults.
    `adapter`: a LoRA adapter's folder or Hub id; None takes the recipe's, if it has one. `text_only`: of a model that
    reads images or sound too, its language model.
    """
    row = get_target(target)
    opened = (
        model
        if isinstance(model, Model)
        else open_model(str(model), revision=revision, tolerant=row.repairs, text_only=text_only)
    )
    loaded, folder, notes = _recipe(opened, recipe, getattr(options, "window", None))
    chosen = choose_adapter(adapter, loaded.adapter, folder)
    merged = None if chosen is None else open_adapter(chosen)
    if merged is not None:
        check_not_merged(opened, merged, of_recipe=adapter is None)
    if recipe is not None:
        notes += fit_notes(opened, loaded, tuned=merged is not None)
    opened = replace(opened, notes=(*opened.notes, *notes))
    plan = row.plan(opened, loaded, Path(output), options, adapter=merged)
    check_window(opened, loaded)  # last: another family or θ says more about what is wrong
    return plan


def _recipe(model: Model, recipe: str | Path | Recipe | None, window: int | None) -> tuple[Recipe, Path, list[str]]:
    """The recipe to bake, the folder that its adapter is relative to, and notes on what was assumed."""
    if recipe is None:
        own, notes = own_recipe(model, window)
        return own, Path(), notes
    return (recipe, Path(), []) if isinstance(recipe, Recipe) else open_recipe(recipe)


def hf(
    model: str | Path | Model,
    recipe: str | Path | Recipe | None,
    output: str | Path,
    *,
    window: int | None = None,
    dtype: str | None = None,
    adapter: str | None = None,
    lift: bool = False,
    pad: bool = False,
    portable: bool = False,
    lossy: bool = False,
    link: bool | None = None,
    force: bool = False,
    revision: str | None = None,
    text_only: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Bake a Hugging Face folder.

    `window`: stop there, in tokens. `dtype`: f32, bf16 or f16, or by the long names; None keeps the stored bytes.
    `portable`: only what other engines compute right too, `lossy`: and drop what they can't. `link`: see
    `lrconvert.artifact.bake.bake`. `force` replaces an artifact. `lift`: without the model's sliding windows. `pad`:
    with a row of the embedding for every token of the tokenizer. Raises what `lrconvert.errors` lists.
    """
    from lrconvert.targets.hf import Options

    options = Options(
        window=window, dtype=dtype and short_name(dtype), portable=portable, lossy=lossy, lift=lift, pad=pad
    )
    plan = plan_bake("hf", model, recipe, output, options, adapter=adapter, revision=revision, text_only=text_only)
    return Artifact(plan.opens, bake(plan, force=force, link=link, progress=progress))


def gguf(
    model: str | Path | Model,
    recipe: str | Path | Recipe | None,
    output: str | Path,
    *,
    window: int | None = None,
    type: str | None = None,
    adapter: str | None = None,
    lift: bool = False,
    pad: bool = False,
    architecture: str | None = None,
    static: bool = False,
    fold: bool = False,
    lossy: bool = False,
    tokenizer_pre: str | None = None,
    split: int | None = None,
    imatrix: str | Path | None = None,
    modelfile: bool = False,
    library: str | None = None,
    force: bool = False,
    revision: str | None = None,
    text_only: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Bake a GGUF for llama.cpp; a GGUF as `model` is re-baked.

    `type`: f32, f16, bf16, q8_0, q4_k_m and llama.cpp's other types; None keeps what is stored. `architecture`: another
    one of llama.cpp than the family's usual one; `static`: the long set for every length; `fold`: the attention factor
    goes into q and k; `lossy`: drop what llama.cpp can't express; `split`: bytes of tensor data a file; `library`:
    libllama to quantise with.
    """
    from lrconvert.targets.gguf import Options

    options = Options(
        window=window,
        type=type,
        architecture=architecture,
        static=static,
        fold=fold,
        lossy=lossy,
        tokenizer_pre=tokenizer_pre,
        split=split,
        imatrix=None if imatrix is None else Path(imatrix),
        modelfile=modelfile,
        library=library,
        lift=lift,
        pad=pad,
    )
    plan = plan_bake("gguf", model, recipe, output, options, adapter=adapter, revision=revision, text_only=text_only)
    return Artifact(plan.opens, bake(plan, force=force, progress=progress))


def onnx(
    model: str | Path | Model,
    recipe: str | Path | Recipe | None,
    output: str | Path,
    *,
    window: int | None = None,
    dtype: str = "f32",
    attention: str = "gqa",
    opset: int = 23,
    double: bool = True,
    genai_rewind: bool = False,
    adapter: str | None = None,
    lift: bool = False,
    pad: bool = False,
    force: bool = False,
    revision: str | None = None,
    text_only: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Bake an ONNX folder.

    `dtype`: f32, f16, bf16, int8 or int4; `attention`: "gqa" (ONNX Runtime's fused operator) or "standard"; `double`:
    angles in float64, else from float32 tables; `genai_rewind`: make onnxruntime-genai recompute a sequence at the
    boundary.
    """
    from lrconvert.targets.onnx import Options

    options = Options(window, short_name(dtype), attention, opset, double, genai_rewind, lift, pad)
    plan = plan_bake("onnx", model, recipe, output, options, adapter=adapter, revision=revision, text_only=text_only)
    return Artifact(plan.opens, bake(plan, force=force, progress=progress))
