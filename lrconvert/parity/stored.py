# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file holds, read off the file: its rope metadata, and its weights against the model's.

llama.cpp is asked whether it computes the recipe on *the weights in the file*, so that a rope error can't hide
behind the noise of quantisation. That these are the model's weights is a check of its own, tensor by tensor; what
quantisation costs is measured by the reference alone, with the recipe's factors and without any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.base import CheckpointView
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.checkpoint.gguf_config import LONG, SHORT, STATIC
from lrconvert.checkpoint.onnx_folder import TIED_HEAD
from lrconvert.errors import InputError
from lrconvert.parity.cases import Budget
from lrconvert.parity.judge import Judge
from lrconvert.parity.measures import compare
from lrconvert.parity.promise import end_case
from lrconvert.parity.report import Row
from lrconvert.parity.tolerances import weight_error
from lrconvert.rope import RopeSpec, Tier

METADATA, WEIGHTS = "metadata", "weights"
FLOAT32 = 1e-6  # metadata and factors are float32: one rounding


class StoredWeights(CheckpointView):
    """The weights of a file, for a model whose config and tokenizer are believed more than the file's."""

    def __init__(self, model: Model, stored: Checkpoint) -> None:
        super().__init__(stored)
        self._source, self.config = model.checkpoint, model.checkpoint.config

    def side_files(self) -> dict[str, Path | bytes]:
        return self._source.side_files()


def on_stored_weights(model: Model, stored: Checkpoint) -> Model:
    """The model with the file's weights. `InputError` where one is missing or has another shape."""
    problems = []
    for tensor in model.roles.values():
        found = stored.tensors.get(tensor.name)
        if found is None and not (tensor.role == "lm_head" and model.shape.tied):
            problems.append(f"{tensor.name} is missing")
        elif found is not None and found.shape != tensor.shape:
            problems.append(f"{tensor.name} has shape {list(found.shape)}; the model has {list(tensor.shape)}")
    head = stored.tensors.get(TIED_HEAD)
    if model.shape.tied and head is not None and head.shape != model.roles["embedding", None].shape:
        problems.append(f"{TIED_HEAD} has shape {list(head.shape)}; the embedding has another")
    if problems:
        raise InputError.collect(stored.path, problems)
    found = replace(model, checkpoint=StoredWeights(model, stored))
    return _untied(found) if model.shape.tied and TIED_HEAD in stored.tensors else found


def _untied(model: Model) -> Model:
    """A tied model that was quantised: the product of its last layer has weights of its own."""
    embedding = model.roles["embedding", None]
    head = replace(embedding, role="lm_head", name=TIED_HEAD)
    return replace(model, shape=replace(model.shape, tied=False), roles={**model.roles, ("lm_head", None): head})


def computing(stored: GgufCheckpoint) -> str:
    """What the products of such a file are computed in, as `tolerances` calls it: the coarsest type that counts."""
    kinds = {tensor.type.name for tensor in stored.stored.values()}
    known = [kind for kind in ("F32", "F16", "BF16", "Q8_0") if kind in kinds]
    return known[-1] if len(known) == len(kinds) else "quantised"


# --- metadata --------------------------------------------------------------------------------------------


def check_metadata(stored: GgufCheckpoint, model: Model, spec: RopeSpec, *, static: bool) -> list[Row]:
    """A row for everything in the file that says something else than `spec`; one `pass` when there is nothing."""
    problems = [*stored.rope_problems, *_numbers(stored, model), *_rope(stored, spec, static)]
    if not problems:
        return [Row(METADATA, "rope and shape are the recipe's and the model's", "pass")]
    return [Row(METADATA, problem.partition(":")[0][:60], "fail", reason=problem) for problem in problems]


def _numbers(stored: GgufCheckpoint, model: Model) -> Iterator[str]:
    prefix, shape = f"{stored.architecture}.", model.shape
    wanted = {
        "rope.freq_base": shape.theta,
        "rope.dimension_count": shape.rotary_dim,
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "block_count": shape.layers,
    }
    # What llama.cpp takes where a file says nothing.
    defaults = {
        "rope.freq_base": 10000.0,
        "rope.dimension_count": shape.head_dim,
        "attention.head_count_kv": shape.heads,
    }
    for key, value in wanted.items():
        found = stored.metadata.get(prefix + key, defaults.get(key))
        if not isinstance(found, int | float) or not math.isclose(found, value, rel_tol=FLOAT32):
            yield f"{prefix}{key} is {found!r:.60}; the model needs {value:g}"


def _rope(stored: GgufCheckpoint, spec: RopeSpec, static: bool) -> Iterator[str]:
    prefix, first, last = f"{stored.architecture}.", spec.tiers[0], spec.tiers[-1]
    wanted = {"context_length": float(spec.window), "rope.scaling.attn_factor": last.attention_factor}
    if not static and len(spec.tiers) > 1:
        wanted["rope.scaling.original_context_length"] = float(first.max_length)
    for key, value in wanted.items():
        found = stored.metadata.get(prefix + key, 1.0 if key.endswith("attn_factor") else None)
        if not isinstance(found, int | float) or not math.isclose(found, value, rel_tol=FLOAT32):
            yield f"{prefix}{key} is {found!r:.60}; the recipe needs {value:g}"
    alone = static and STATIC in stored.stored  # phi3 has no such tensor: two equal sets do the same
    for name, tier in ({STATIC: last} if alone else {SHORT: first, LONG: last}).items():
        values = stored.factors(name)
        if values is None:
            yield f"{name} is missing"
            continue
        if values.shape != (len(tier.factors),) or not np.allclose(values, tier.factors, rtol=FLOAT32, atol=0):
            yield f"{name} holds other factors than the recipe's"


# --- weights ---------------------------------------------------------------------------------------------


def check_weights(stored: Checkpoint, model: Model) -> tuple[list[Row], bool]:
    """Whether the file's weights are the model's, as closely as their types can say; and whether they are equal.

    The error of a tensor is the norm of the difference over the norm of the tensor; rows that lie in another
    order differ by about √2, whatever the type.
    """
    rows, exact = [], True
    worst: dict[str, tuple[float, str]] = {}
    names = {tensor.name: tensor.name for tensor in model.roles.values()}
    if model.shape.tied:  # a head that was quantised is a copy of its own
        names[TIED_HEAD] = model.roles["embedding", None].name
    for own, name in names.items():
        if own not in stored.tensors:
            continue
        kind = stored.tensors[own].dtype
        ours, theirs = stored.read(own), model.checkpoint.read(name)
        if ours.dtype == theirs.dtype and np.array_equal(ours, theirs):
            error = 0.0
        else:
            wide = theirs.astype(np.float64)
            with np.errstate(invalid="ignore"):
                off = ours.astype(np.float64) - wide
            error = float(np.linalg.norm(off) / max(float(np.linalg.norm(wide)), 1e-300))
            error = error if math.isfinite(error) else math.inf  # NaN would be less than nothing
        exact = exact and error == 0.0
        worst[kind] = max(worst.get(kind, (-1.0, "")), (error, own))
    for kind, (error, name) in sorted(worst.items()):
        bound = weight_error(kind)
        case = f"{kind}, error up to {error:.1e}"
        if error <= bound:
            rows.append(Row(WEIGHTS, case, "pass"))
        else:
            reason = f"{name} differs from the model's by {error:.1e} of its norm; {kind} allows {bound:.0e}"
            rows.append(Row(WEIGHTS, case, "fail", reason=reason))
    return rows, exact


def quantisation(
    name: str, original: Judge, kept: RopeSpec, stored: Judge, promised: RopeSpec, budget: Budget
) -> list[Row]:
    """What the stored types cost by themselves, reference against reference, at the end of every tier: with the
    recipe's factors, and without any."""
    rows = []
    plain = {"": (kept, promised), ", without factors": (_plain(kept, kept), _plain(promised, kept))}
    for suffix, (exact, rounded) in plain.items():
        for tier in kept.tiers:
            case = end_case(f"quantisation alone{suffix},", tier.max_length, budget)
            original.prepare(exact, [case])
            stored.prepare(rounded, [case])
            measures = compare(original.forward(exact, case), stored.forward(rounded, case))
            rows.append(Row(name, case.name, "known", length=case.length, reason="", **vars(measures)))
    return rows


def _plain(spec: RopeSpec, kept: RopeSpec) -> RopeSpec:
    """Unscaled rotation; what the weights carry of an attention factor stays undone."""
    folded = spec.tiers[-1].attention_factor / kept.tiers[-1].attention_factor
    tiers = [Tier(t.max_length, (1.0,) * len(t.factors), attention_factor=folded) for t in spec.tiers]
    return replace(spec, tiers=tuple(tiers))
