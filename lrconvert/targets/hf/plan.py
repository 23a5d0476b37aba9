# SPDX-License-Identifier: Apache-2.0
"""Planning a Hugging Face folder: native config keys, the artifact's own code beside them, weights as they were."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lrconvert.artifact.card import CARD, render, source_card
from lrconvert.artifact.plan import Plan
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.sliding import settle_windows
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.adapter import Adapter, merged
from lrconvert.checkpoint.base import FLOAT_DTYPES
from lrconvert.checkpoint.fold import rewritten
from lrconvert.checkpoint.folder_code import MODELING_FILE
from lrconvert.checkpoint.padding import settle_vocabulary
from lrconvert.checkpoint.source import snapshot
from lrconvert.engines.capability import native_config, native_hf
from lrconvert.families import get_family
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec
from lrconvert.targets.hf.card import CARD_TEXT
from lrconvert.targets.hf.config import edited_config, json_bytes, json_in, side_files
from lrconvert.targets.hf.portable import make_portable
from lrconvert.targets.hf.shards import plan_shards
from lrconvert.targets.hf.weights import lay_out, stream

LIGHTER = ("bf16",)  # to name where the disk is too small
DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
NATIVE_IMPORT = re.compile(r"^from transformers import (\w+) as NativeForCausalLM\b", re.MULTILINE)


@dataclass(frozen=True)
class Options:
    """What a user may ask of a folder. `dtype`: a key of `DTYPES`, None keeps what is stored; `portable`: only what
    other engines get right too, with the attention factor folded into q and k; `lossy`: drop what they can't do."""

    window: int | None = None
    dtype: str | None = None
    portable: bool = False
    lossy: bool = False
    lift: bool = False  # a sliding window
    pad: bool = False  # the embedding, to the size of the tokenizer


def plan(
    model: Model, recipe: Recipe, output: Path, options: Options | None = None, *, adapter: Adapter | None = None
) -> Plan:
    """Resolve, edit and lay out; touch no weights yet.

    Raises what `Model.resolve`, `merged` and `make_portable` raise.
    """
    options, source = options or Options(), model
    family, written = model.family, model.family.hf_written
    spec = model.resolve(recipe, options.window)
    windows = settle_windows(model, spec.window, lift=options.lift, keeps=True, target="hf")
    model, scale, dropped = windows.model, 1.0, list(windows.dropped)
    loaded = family if written is None else get_family(written)
    if options.portable:
        spec, scale, more_dropped = make_portable(recipe, spec, loaded, model.shape, lossy=options.lossy)
        dropped += more_dropped
    native, losses = native_config(loaded, model.shape).fit(spec)[0], native_hf(loaded, model.shape).fit(spec)[1]
    stored = _stored_dtype(model, options.dtype)
    if adapter is not None:  # with a dtype of its own, the artifact's one rounding is the writer's
        model = merged(model, adapter, rounded=stored is None and scale == 1.0 and written is None)
    model, rows = settle_vocabulary(model, pad=options.pad)
    plain = scale == 1.0 and written is None
    baked = model if plain else rewritten(model, scale, multipliers=written is not None, rounded=False)
    config, edits = edited_config(
        baked, spec, native, DTYPES[options.dtype] if options.dtype else stored, lifted=windows.lifted
    )
    texts, copies, more = side_files(model, spec)
    texts |= {"config.json": json_bytes(config, "config.json"), MODELING_FILE: modeling_code(baked.family.hf_class)}
    weights, shards, index = lay_out(baked, stored, plan_shards)
    copies |= weights
    texts |= index
    found = source_card(model)
    notes = [
        *model.notes,
        *([] if stored is None else model.dequantised(stored.lower())),
        *([] if written is None else [_written_note(model, baked)]),
        *([] if family.hf_oldest is None else [f"needs transformers {family.hf_oldest}: 4.57 refuses the config"]),
        *windows.notes,
        *recipe.warnings(),
        *_notes(spec, scale, texts, copies),
        *found.notes,
    ]
    card = render(
        model, recipe, spec, CARD_TEXT, source=found, dropped=dropped, losses=losses, notes=notes, adapter=adapter
    )
    texts[CARD] = card.encode()
    added = [] if adapter is None else [adapter.file.path]
    return Plan(
        target="hf",
        model=model,
        recipe=recipe,
        spec=spec,
        output=output,
        record=BakeRecord(
            spec.window,
            stored,
            scale,
            "portable" if options.portable else None,
            lifted=windows.lifted,
            padded=rows,
            written_as=written,
        ),
        texts=texts,
        copies=copies,
        streams=[stream(baked.checkpoint, name, tensors) for name, tensors in shards],
        headline=f"tiers up to {', '.join(str(tier.max_length) for tier in spec.tiers)}",
        edits=[*edits, *more],
        dropped=dropped,
        losses=losses,
        notes=notes,
        lighter={
            f"--dtype {name}": partial(plan, source, recipe, output, replace(options, dtype=name), adapter=adapter)
            for name in LIGHTER
        },
        stamps=snapshot([*model.checkpoint.weight_files(), *copies.values(), *added]),
    )


def _written_note(model: Model, baked: Model) -> str:
    """What was done to a model that transformers has no class for."""
    found = model.shape.multipliers
    untied = "; the head is untied" if model.shape.tied and not baked.shape.tied else ""
    return (
        f"written as a {baked.family.name}, since transformers has no {model.family.name}: its multipliers are in the "
        f"weights (embedding {found.embedding:.9g}, o and down {found.residual:.9g}, head {found.logits:.9g}){untied}"
    )


def _notes(spec: RopeSpec, scale: float, texts: dict[str, bytes], copies: dict[str, Path]) -> list[str]:
    """What a user of the folder has to know."""
    notes = []
    if scale != 1.0:
        notes.append(
            f"attention factor folded: the rotated channels of q and k are {scale:.9g} times as large, so that the "
            f"formula's {spec.tiers[-1].attention_factor:.9g} does what the recipe asks"
        )
    limit = json_in(texts, copies, "generation_config.json").get("max_length")
    if isinstance(limit, int) and limit < spec.window:
        notes.append(f"generation_config.json: max_length {limit} caps what generate() makes by default")
    return notes


def _stored_dtype(model: Model, dtype: str | None) -> str | None:
    """The dtype that weights have to be written in, None when they stay byte for byte."""
    if not model.checkpoint.native:
        own = model.checkpoint.dense_dtype or (model.dtype if model.dtype in FLOAT_DTYPES else "BF16")
        return DTYPES[dtype] if dtype else own
    if dtype is None:
        return None
    wanted = DTYPES[dtype]
    used = [model.checkpoint.tensors[tensor.name] for tensor in model.roles.values()]
    return None if all(info.dtype == wanted for info in used) else wanted


def modeling_code(hf_class: str) -> bytes:
    """The artifact's own code for one native class: the shipped file with its one import changed."""
    text = Path(__file__).with_name(MODELING_FILE).read_text(encoding="utf-8")
    text, changed = NATIVE_IMPORT.subn(f"from transformers import {hf_class} as NativeForCausalLM", text)
    if changed != 1:
        raise AssertionError(f"{MODELING_FILE} must import its native class in exactly one line")
    return text.encode()
