# SPDX-License-Identifier: Apache-2.0
"""A GGUF, read back: as a checkpoint, and its rope in words (what llama.cpp will do with it, what is missing)."""

from __future__ import annotations

from pathlib import Path

from lrconvert.checkpoint import Model, first_bytes
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.checkpoint.gguf_config import LONG, SHORT, STATIC
from lrconvert.checkpoint.gguf_header import GgufArray
from lrconvert.engines.capability import LLAMA_CPP
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import family_names, get_family
from lrconvert.rope import RopeSpec
from lrconvert.targets.gguf.metadata import OURS
from lrconvert.targets.gguf.query_scale import check_query_scale
from lrconvert.targets.gguf.yarn import architecture_for

SUFFIX = ".gguf"


def recognises(path: Path) -> bool:
    """A file by its name, so that one that isn't there yet is known too, or by its first bytes."""
    return not path.is_dir() and (path.suffix == SUFFIX or first_bytes(path) == b"GGUF")


def open_artifact(path: Path) -> GgufCheckpoint:
    """The file, or all parts of a split one; a rope that means nothing is kept as `rope_problems`."""
    return GgufCheckpoint(path, tolerant=True)


def refuses(model: Model) -> str | None:
    """Why llama.cpp can't run the model with its own rotation."""
    found, shape = model.rotation, model.shape
    spec = RopeSpec(model.family.name, shape.rotary_dim, shape.theta, found.original_window, found.window, found.tiers)
    try:
        architecture_for(model.family, spec, static=False)
        check_query_scale(model, spec)
    except UnsupportedError as error:
        return error.message
    return None


def explain(checkpoint: GgufCheckpoint) -> list[str]:
    """Lines for people. A file whose scaling means nothing to llama.cpp gets one that begins with `broken`."""
    lines = []
    if checkpoint.rope_problems:
        lines += [f"broken: {problem}" for problem in checkpoint.rope_problems]
        lines.append(
            "llama.cpp would refuse it or silently compute something else; "
            "`lrconvert gguf FILE --recipe RECIPE` repairs it"
        )
    else:
        lines.append(_scaling(checkpoint))
    honoured = {family.gguf_longrope for family in map(get_family, family_names())}
    if checkpoint.architecture not in honoured and {SHORT, LONG, STATIC} & checkpoint.stored.keys():
        lines.append(f"broken: the {checkpoint.architecture} architecture of llama.cpp ignores rope factors")
    lines += [f"dropped: {loss}" for loss in _losses(checkpoint)]
    return lines


def _scaling(checkpoint: GgufCheckpoint) -> str:
    config = checkpoint.config
    window = config["max_position_embeddings"]
    scaling = config.get("rope_scaling")
    if STATIC in checkpoint.stored and scaling:
        return f"one set of factors for every length up to {window}, baked in as {STATIC}"
    if not scaling:
        return f"plain RoPE up to {window} tokens, unscaled"
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "longrope":
        return f"{kind} scaling by {scaling.get('factor', 1):g} up to {window} tokens"
    original = config["original_max_position_embeddings"]
    step = LLAMA_CPP.context_step
    usable = original // step * step
    short = f"contexts of up to {usable} tokens use the short factors, larger ones" if usable else "all contexts"
    return (
        f"longrope: {short} the long ones, up to {window}; llama.cpp chooses once, when a context is made, regardless "
        f"of the prompt's length (contexts count in steps of {step})"
    )


def _losses(checkpoint: GgufCheckpoint) -> list[str]:
    key = f"{OURS}losses"
    if not isinstance(checkpoint.metadata.get(key), GgufArray):
        return []
    try:
        return [str(loss) for loss in checkpoint.headers[0].array(key) or []]
    except InputError:
        return [f"{key} is damaged"]
