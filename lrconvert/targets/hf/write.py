# SPDX-License-Identifier: Apache-2.0
"""Baking a Hugging Face artifact: plan everything, then write it, then publish it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrconvert.artifact.card import CARD, render, source_card
from lrconvert.artifact.manifest import Manifest
from lrconvert.artifact.redaction import described
from lrconvert.artifact.staging import Staging
from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.adapter import Adapter, merged
from lrconvert.checkpoint.base import FLOAT_DTYPES, refuse_quantised
from lrconvert.checkpoint.fold import folded
from lrconvert.checkpoint.source import check_unchanged, snapshot
from lrconvert.engines.capability import native_hf, project
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec
from lrconvert.targets.hf.config import Edit, edited_config, json_bytes, json_in, side_files
from lrconvert.targets.hf.portable import make_portable
from lrconvert.targets.hf.shards import PlannedTensor, header_of, plan_shards
from lrconvert.targets.hf.spelling import MODELING_FILE
from lrconvert.targets.hf.weights import lay_out, write_weights

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
NATIVE_IMPORT = re.compile(r"^from transformers import (\w+) as NativeForCausalLM\b", re.MULTILINE)

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


@dataclass(frozen=True)
class Plan:
    """What would be written, before anything is."""

    model: Model
    weights: Checkpoint  # the model's, with an attention factor folded in where that was asked for
    recipe: Recipe
    spec: RopeSpec
    output: Path
    texts: dict[str, bytes]  # files that are made here
    kept: dict[str, Path]  # files that come along unchanged: weights hard linked where that works
    shards: list[tuple[str, list[PlannedTensor]]]  # weight files that are written anew
    edits: list[Edit]
    given_up: list[str]  # what the recipe asks and no code of this artifact does (`--allow-lossy`)
    losses: list[str]  # what native code, without the artifact's own, can't express
    notes: list[str]
    options: dict[str, Any]
    stamps: dict[Path, tuple[int, int]]  # of the source's files: none may change before they are published

    @property
    def sizes(self) -> dict[str, int]:
        """Every file of the artifact but the manifest, with its size in bytes."""
        sizes = {name: len(data) for name, data in self.texts.items()}
        sizes |= {name: path.stat().st_size for name, path in self.kept.items()}
        for name, tensors in self.shards:
            sizes[name] = len(header_of(tensors)) + sum(tensor.nbytes for tensor in tensors)
        return dict(sorted(sizes.items()))


def plan(
    model: Model,
    recipe: Recipe,
    output: Path,
    *,
    window: int | None = None,
    dtype: str | None = None,
    adapter: Adapter | None = None,
    portable: bool = False,
    lossy: bool = False,
) -> Plan:
    """Resolve, edit and lay out; touches no weights yet. Raises what `Model.resolve`, `merged` and `make_portable` do.

    `portable`: bake what other engines get right too; `lossy`: give up what they can't do.
    """
    family = model.family
    spec = model.resolve(recipe, window)
    scale, given_up = 1.0, []
    if portable:
        spec, scale, given_up = make_portable(spec, lossy=lossy)
    native, losses = project(spec, native_hf(family))
    stored = _stored_dtype(model, dtype)
    if adapter is not None:  # with a dtype of its own, the artifact's one rounding is the writer's
        model = merged(model, adapter, rounded=stored is None and scale == 1.0)
    baked = model if scale == 1.0 else folded(model, scale, rounded=False)
    notes = [*model.notes, *recipe.warnings()]
    if scale != 1.0:
        notes.append(
            f"attention factor folded: the rotated channels of q and k are {scale:.9g} times as large, so that the "
            f"formula's {spec.tiers[-1].attention_factor:.9g} does what the recipe asks"
        )
    config, edits = edited_config(model, spec, native, DTYPES[dtype] if dtype else stored)
    texts, kept, more = side_files(model, spec)
    edits = [*edits, *more]
    texts |= {"config.json": json_bytes(config, "config.json"), MODELING_FILE: modeling_code(family.hf_class)}
    weights, shards, index = lay_out(baked, stored, plan_shards)
    kept |= weights
    texts |= index
    if (limit := _generation_limit(texts, kept)) is not None and limit < spec.window:
        notes.append(f"generation_config.json: max_length {limit} caps what generate() makes by default")
    found = source_card(model)
    notes += found.notes
    card = render(model, recipe, spec, given_up=given_up, losses=losses, notes=notes, adapter=adapter, source=found)
    texts[CARD] = card.encode()
    options = {"window": spec.window, "dtype": stored}
    if portable:
        options |= {"portable": True, "folded_attention": scale}
    added = [] if adapter is None else [adapter.file.path]
    stamps = snapshot([*model.checkpoint.weight_files(), *kept.values(), *added])
    return Plan(
        model=model,
        weights=baked.checkpoint,
        recipe=recipe,
        spec=spec,
        output=output,
        texts=texts,
        kept=kept,
        shards=shards,
        edits=edits,
        given_up=given_up,
        losses=losses,
        notes=notes,
        options=options,
        stamps=stamps,
    )


def _stored_dtype(model: Model, dtype: str | None) -> str | None:
    """The dtype that weights have to be written in, None when they stay byte for byte."""
    if not model.checkpoint.native:
        own = model.dtype if model.dtype in FLOAT_DTYPES else "BF16"
        return DTYPES[dtype] if dtype else own
    if dtype is None:
        return None
    refuse_quantised(model, f"--dtype {dtype}")
    wanted = DTYPES[dtype]
    used = [model.checkpoint.tensors[tensor.name] for tensor in model.roles.values()]
    return None if all(info.dtype == wanted for info in used) else wanted


def _generation_limit(texts: dict[str, bytes], kept: dict[str, Path]) -> int | None:
    limit = json_in(texts, kept, "generation_config.json").get("max_length")
    return limit if isinstance(limit, int) else None


def modeling_code(hf_class: str) -> bytes:
    """The artifact's own code for one native class: the shipped file with its one import changed."""
    text = Path(__file__).with_name(MODELING_FILE).read_text(encoding="utf-8")
    text, changed = NATIVE_IMPORT.subn(f"from transformers import {hf_class} as NativeForCausalLM", text)
    if changed != 1:
        raise AssertionError(f"{MODELING_FILE} must import its native class in exactly one line")
    return text.encode()


def write(plan: Plan, *, force: bool = False, link: bool | None = None, progress: Progress | None = None) -> Manifest:
    """Carry the plan out. `link`: True demands hard links, False copies, None links where that works."""
    report = progress or (lambda what, done, total: None)
    total = sum(plan.sizes.values())
    done = 0
    with Staging(plan.output, force=force, link=link) as staging:
        for name, data in sorted(plan.texts.items()):
            staging.write_bytes(name, data)
            done += len(data)
        for name, path in sorted(plan.kept.items()):
            report(name, done, total)
            # People edit a tokenizer's or generation's config in place: only weights share bytes with the source.
            place = staging.link_or_copy if name.endswith(".safetensors") else staging.copy
            place(path, name)
            done += path.stat().st_size
        for tensor in write_weights(staging, plan.weights, plan.shards):
            done += tensor.nbytes
            report(tensor.name, done, total)
        check_unchanged(plan.stamps)
        manifest = Manifest(
            target="hf",
            source=described(plan.model),
            recipe=asdict(plan.recipe),
            options=plan.options,
            losses=[*plan.given_up, *plan.losses],
            notes=plan.notes,
        )
        staging.publish(manifest)
    return manifest
