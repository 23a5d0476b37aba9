# SPDX-License-Identifier: Apache-2.0
"""Planning a GGUF: every byte of its header, the place and type of every tensor.

A checkpoint is converted: its tensors get the types of a scheme, its tokenizer and card become metadata. A GGUF
without a scheme is re-baked: rope metadata and factors are replaced, and every other byte is copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGUFValueType

from lrconvert.artifact.card import source_card
from lrconvert.artifact.manifest import MANIFEST, manifest_path
from lrconvert.artifact.plan import Edit, Plan, Stream, StreamTensor
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.sliding import settle_windows
from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.adapter import Adapter, merged
from lrconvert.checkpoint.fold import folded
from lrconvert.checkpoint.gguf import PERMUTED
from lrconvert.checkpoint.padding import settle_vocabulary
from lrconvert.checkpoint.source import snapshot
from lrconvert.engines.capability import LLAMA_CPP, divide_attention, static
from lrconvert.engines.ways_out import remedy, ways_out
from lrconvert.errors import EnvironmentFailure, UnsupportedError, UsageError
from lrconvert.families.base import (
    GGUF_INTERLEAVED,
    GGUF_SLIDING,
    GGUF_SQUARE,
    GGUF_STEP35,
    GGUF_UNBIASED,
    GGUF_UNNORMALISED,
    GGUF_UNTIED,
    LAYER,
    is_norm,
)
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec
from lrconvert.runtimes import llama_library
from lrconvert.targets.gguf import encode, modelfile
from lrconvert.targets.gguf.imatrix import Imatrix, check_matrix
from lrconvert.targets.gguf.layers import check_layers
from lrconvert.targets.gguf.layout import Planned, Scalar, Value, header_of, padding, split_parts
from lrconvert.targets.gguf.metadata import (
    QUANTISATION_VERSION,
    arranged,
    carried_keys,
    general_keys,
    lift_windows,
    provenance_keys,
    rope_keys,
    rope_tensors,
    shape_keys,
)
from lrconvert.targets.gguf.query_scale import check_query_scale
from lrconvert.targets.gguf.schemes import MixFacts, Scheme, get_scheme, tensor_type
from lrconvert.targets.gguf.step35 import NOTE, architecture_keys, more_tensors
from lrconvert.targets.gguf.vocabulary import vocabulary
from lrconvert.targets.gguf.weights import Source, is_plain, jobs
from lrconvert.targets.gguf.yarn import architecture_for, by_formula, check_attention, formula_keys

SUFFIX = ".gguf"
_OWN_TYPE = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}


LIGHTER = ("q8_0", "q6_k", "q4_k_m", "q3_k_m", "q2_k")  # types to name where the disk is too small, the best first


@dataclass(frozen=True)
class Options:
    """What a user may ask of a GGUF. `type`: a scheme's name, None keeps what is stored; `static`: the long set
    alone, for every length; `fold`: the attention factor goes into q and k; `lossy`: drop what llama.cpp can't do;
    `split` in bytes of tensor data a file; `library`: where libllama lies, to quantise with."""

    window: int | None = None
    type: str | None = None
    static: bool = False
    fold: bool = False
    lossy: bool = False
    tokenizer_pre: str | None = None
    split: int | None = None
    imatrix: Path | None = None
    modelfile: bool = False
    library: str | None = None
    lift: bool = False  # a sliding window
    architecture: str | None = None  # another one of llama.cpp than the family's usual one
    pad: bool = False  # the embedding, to the size of the tokenizer


def plan(
    model: Model, recipe: Recipe, output: Path, options: Options | None = None, *, adapter: Adapter | None = None
) -> Plan:
    """Resolve, choose types, lay out. Touches no weights yet.

    Raises `UnsupportedError` for factors that the family's C++ ignores and for what the recipe asks beyond llama.cpp
    (unless `lossy`), and what `Model.resolve`, `merged`, `get_scheme` and `vocabulary` raise.
    """
    options, source = options or Options(), model
    _check_name(output)
    spec = model.resolve(recipe, options.window)
    architecture = architecture_for(model.family, spec, static=options.static, asked=options.architecture)
    _check_shape(model, architecture)
    keeps = architecture in GGUF_SLIDING
    windows = settle_windows(model, spec.window, lift=options.lift, keeps=keeps, target="llama.cpp")
    model = windows.model
    kept, dropped = _fitted(recipe, spec, options)
    check_query_scale(model, kept)
    dropped = [*windows.dropped, *dropped]
    scale = kept.tiers[-1].attention_factor if options.fold else 1.0
    written = divide_attention(kept, scale)
    scheme = _scheme(model, options, rewritten=adapter is not None or scale != 1.0)
    _check_options(options, scheme, is_gguf=model.checkpoint.gguf is not None)
    if adapter is not None:
        model = merged(model, adapter, rounded=False)
    rows = 0
    if options.pad:  # else the vocabulary says what has no row
        model, rows = settle_vocabulary(model, pad=True)
    baked = model if scale == 1.0 else folded(model, scale, rounded=False)
    imatrix = None if options.imatrix is None else Imatrix.load(options.imatrix)
    tensors = _tensors(baked, architecture, scheme, imatrix)
    if architecture == GGUF_STEP35:
        tensors += more_tensors(baked, {item.planned.name: item.planned.kind for item in tensors})
    library = _library(options.library)
    if scheme is not None:
        kinds = {item.planned.name: (item.planned.kind, item.planned.shape) for item in tensors}
        check_matrix(scheme, kinds, imatrix)
        encode.check({kind for kind, _ in kinds.values()}, library, weighted=imatrix is not None)
    rope, values_of = _rotation(model, architecture, written, static=options.static)
    factors = [
        Source(Planned(name, GGMLQuantizationType.F32, values.shape), name, values=values)
        for name, values in values_of.items()
    ]
    keys, notes = _metadata(model, architecture, options)
    if architecture == GGUF_STEP35:
        keys |= architecture_keys(model.shape)
        notes = [*notes, NOTE]
    if windows.lifted:
        lift_windows(keys, architecture, spec.window)
    if scheme is not None:
        keys["general.quantization_version"] = QUANTISATION_VERSION
        keys["general.file_type"] = int(scheme.file_type)
    keys |= rope | provenance_keys(recipe, spec.family, dropped)
    encoder = encode.Encoder(library, imatrix)
    streams = _streams(output, arranged(keys), [*factors, *tensors], options.split, baked.checkpoint, encoder)
    texts = {}
    if options.modelfile:
        texts[modelfile.name_of(output)] = modelfile.render([stream.name for stream in streams], written).encode()
    used = [path for path in (options.imatrix, adapter and adapter.file.path) if path is not None]
    stored = None if scheme is None else scheme.name
    notes = [*model.notes, *model.dequantised(stored), *windows.notes, *recipe.warnings(), *notes]
    return Plan(
        target="gguf",
        model=model,
        recipe=recipe,
        spec=written,
        output=output,
        record=BakeRecord(spec.window, stored, scale, LLAMA_CPP.name, options.static, windows.lifted, rows),
        texts=texts,
        copies={},
        streams=streams,
        headline=_headline(scheme, [*factors, *tensors]),
        edits=[Edit(output.name, key, None, value) for key, value in rope.items()],
        dropped=dropped,
        notes=[*notes, *_window_notes(written, options.static)],
        options=_recorded(options, architecture, imatrix),
        place="files",
        lighter={
            f"--type {name}": partial(plan, source, recipe, output, replace(options, type=name), adapter=adapter)
            for name in LIGHTER
        },
        stamps=snapshot([*model.checkpoint.weight_files(), *used]),
    )


def _rotation(
    model: Model, architecture: str, spec: RopeSpec, *, static: bool
) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """The keys and the tensors of a spec: factors, or the formula that they follow where the C++ ignores factors."""
    if by_formula(model.family, architecture):
        check_attention(model.family, architecture, spec)
        return formula_keys(architecture, spec), {}
    return rope_keys(architecture, spec, model.shape, static=static), rope_tensors(architecture, spec, static=static)


def _metadata(model: Model, architecture: str, options: Options) -> tuple[dict[str, Value], list[str]]:
    """Everything but the rotation, and notes on it: what a GGUF has already, else made from config, card and
    tokenizer."""
    keys: dict[str, Value] = {"general.architecture": architecture}
    notes = []
    source, problems = model.checkpoint.gguf, model.checkpoint.rope_problems
    if source is None:
        words = vocabulary(model.checkpoint.side_files(), model.checkpoint.config, pre=options.tokenizer_pre)
        card = source_card(model)
        keys |= general_keys(model, card, strips=words.strips) | shape_keys(architecture, model.shape) | words.metadata
        return keys, [*words.notes, *card.notes]
    keys |= carried_keys(source, architecture)
    if source.architecture != architecture:
        notes.append(
            f"written as the {architecture} architecture, rows of q and k permuted: {source.architecture} of "
            "llama.cpp ignores rope factors"
        )
    if problems:
        notes.append(f"repaired: {'; '.join(problems)}")
    return keys, notes


def _library(named: str | None) -> llama_library.LlamaLibrary | None:
    """llama.cpp's library: the one named, an installed one, or None (an encoder that needs it raises)."""
    try:
        return llama_library.find_library(named)
    except EnvironmentFailure:
        if named is not None:
            raise
        return None


def _headline(scheme: Scheme | None, sources: Sequence[Source]) -> str:
    """The types of the tensors: "q8_0: 9 F32, 29 Q8_0"."""
    counts = Counter(source.planned.kind.name for source in sources)
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"{'weights as they are' if scheme is None else scheme.name}: {kinds}"


def _check_name(output: Path) -> None:
    if output.suffix != SUFFIX:
        raise UsageError(f"{output}: a GGUF needs a name that ends in {SUFFIX}", remedy=f"-o {output.name}{SUFFIX}")
    whole = manifest_path(output).name.removesuffix(f".{MANIFEST}")
    if whole != output.stem:
        raise UsageError(
            f"{output}: this is the name of a part of {whole}{SUFFIX}",
            remedy=f"-o {whole}{SUFFIX}; with --split-max-size its parts get such names",
        )


def _check_options(options: Options, scheme: Scheme | None, *, is_gguf: bool) -> None:
    """What would be ignored is refused."""
    if options.tokenizer_pre is not None and is_gguf:
        raise UsageError("--tokenizer-pre: a GGUF keeps its tokenizer when it is re-baked")
    if options.imatrix is not None and (scheme is None or not scheme.quantised):
        raise UsageError("--imatrix: nothing is quantised", remedy="Choose the type to write with --type")


def _check_shape(model: Model, architecture: str) -> None:
    """What llama.cpp's loaders of these architectures insist on."""
    shape = model.shape
    check_layers(model, architecture)
    width = shape.heads * shape.head_dim
    if architecture in GGUF_SQUARE and width != shape.hidden:
        raise UnsupportedError(
            f"{model.reference}: {shape.heads} heads of {shape.head_dim} make {width} channels; llama.cpp's "
            f"{architecture} needs as many as the hidden size, {shape.hidden}"
        )
    if shape.logits_cap:
        raise UnsupportedError(
            f"{model.reference}: logits have a soft cap of {shape.logits_cap:g}; llama.cpp's {architecture} has none",
            remedy="Use `lrconvert hf` or `lrconvert onnx`",
        )
    if architecture in GGUF_UNTIED and shape.tied:
        raise UnsupportedError(
            f"{model.reference}: the head is tied to the embedding; llama.cpp's {architecture} needs one of its own",
            remedy="Use `lrconvert hf` or `lrconvert onnx`",
        )
    if architecture in GGUF_UNBIASED and shape.attention_bias:
        raise UnsupportedError(
            f"{model.reference}: attention has biases; llama.cpp's {architecture} has none",
            remedy="Use `lrconvert hf` or `lrconvert onnx`",
        )
    divides = architecture not in GGUF_UNNORMALISED
    if shape.experts is not None and shape.experts.normalised != divides:
        sums, does = ("don't sum", "divides them by their sum") if divides else ("sum", "leaves them as they are")
        raise UnsupportedError(
            f"{model.reference}: the gates of a token's experts {sums} to one (norm_topk_prob); llama.cpp's "
            f"{architecture} {does}"
        )
    if architecture in GGUF_INTERLEAVED and shape.rotary_dim != shape.head_dim:
        raise UnsupportedError(
            f"{model.reference}: {shape.rotary_dim} of {shape.head_dim} channels rotate; llama.cpp's {architecture} "
            "rotates whole heads"
        )


def _fitted(recipe: Recipe, spec: RopeSpec, options: Options) -> tuple[RopeSpec, list[str]]:
    """What llama.cpp can express of the spec, and what is dropped; refused unless the user allows that."""
    kept, losses = LLAMA_CPP.fit(spec)
    if losses and not options.lossy:
        ways = (
            *ways_out(LLAMA_CPP, recipe, spec),
            "bake to hf or onnx, which compute it",
            "drop this with --allow-lossy",
        )
        raise UnsupportedError("; ".join(losses), remedy=remedy(*ways))
    if options.static:
        kept, more = static(LLAMA_CPP).fit(kept)
        losses += more
    return kept, losses


def _scheme(model: Model, options: Options, *, rewritten: bool) -> Scheme | None:
    """The scheme to write, None where every stored byte stays."""
    if options.type is not None:
        return get_scheme(options.type)
    if model.checkpoint.gguf is not None and not rewritten:
        return None
    if (own := _OWN_TYPE.get(model.checkpoint.dense_dtype or model.dtype)) is None:
        raise UsageError(
            f"{model.reference} is quantised ({model.dtype}), and its weights would change",
            remedy="Choose the type to write with --type; a recipe alone leaves the weights unchanged",
        )
    return get_scheme(own)


def _tensors(model: Model, architecture: str, scheme: Scheme | None, imatrix: Imatrix | None) -> list[Source]:
    """Every tensor of the model with its name, type and row order, as they will follow each other."""
    shape, interleave = model.shape, architecture in GGUF_INTERLEAVED
    rows = {row.role: row for row in model.family.rows}
    count = 0 if shape.experts is None else shape.experts.count
    facts = MixFacts(architecture, shape.layers, shape.heads, shape.kv_heads, shape.tied, imatrix is not None, count)
    heads = {"heads": shape.heads, "kv": shape.kv_heads}
    checkpoint = model.checkpoint
    found = []
    for tensor in model.roles.values():
        role = tensor.role
        if (role == "lm_head" and shape.tied) or tensor.expert:
            continue  # a copy of the embedding that some programs store; what follows a layer's first expert
        name = rows[role].gguf.replace(LAYER, str(tensor.layer))
        permuted = heads[PERMUTED[role]] if interleave and role in PERMUTED else None
        if scheme is None:
            stored = checkpoint.encoded(tensor.name)
            assert stored is not None
            kind = GGMLQuantizationType[stored.type]
            moves = permuted is not None and not stored.interleaved
            if moves and len(tensor.shape) == 1 and not is_plain(kind):
                kind = GGMLQuantizationType.F32  # a bias whose blocks hold values that move apart
        else:
            kind = tensor_type(scheme, name, tensor.shape, facts)
        if tensor.expert is None:
            offset = shape.norm_offset if is_norm(role) else 0.0
            found.append(Source(Planned(name, kind, tensor.shape), tensor.name, permuted, offset=offset))
        else:
            all_of = tuple(model.roles[role, tensor.layer, expert].name for expert in range(count))
            found.append(Source(Planned(name, kind, (count, *tensor.shape)), tensor.name, experts=all_of))
    if checkpoint.gguf is not None:  # in the order of its file
        order = {name: place for place, name in enumerate(checkpoint.tensors)}
        found.sort(key=lambda source: order[source.name])
    return found


def _streams(
    output: Path,
    metadata: Mapping[str, Value],
    sources: Sequence[Source],
    limit: int | None,
    checkpoint: Checkpoint,
    encoder: encode.Encoder,
) -> list[Stream]:
    """One file, or the parts of a split one as llama.cpp's gguf-split writes them: all metadata in the first."""
    tensors = {source.planned.name: _stream_tensor(checkpoint, source, encoder) for source in sources}
    parts = split_parts([source.planned for source in sources], limit)
    streams = []
    for number, part in enumerate(parts):
        name, keys = output.name, dict(metadata)
        if len(parts) > 1:
            name = f"{output.stem}-{number + 1:05}-of-{len(parts):05}{SUFFIX}"
            keys = {
                **(metadata if number == 0 else {}),
                "split.no": Scalar(GGUFValueType.UINT16, number),
                "split.count": Scalar(GGUFValueType.UINT16, len(parts)),
                "split.tensors.count": Scalar(GGUFValueType.INT32, len(sources)),
            }
        streams.append(Stream(name, [tensors[planned.name] for planned in part], header_of(keys, part)))
    return streams


def _stream_tensor(checkpoint: Checkpoint, source: Source, encoder: encode.Encoder) -> StreamTensor:
    planned = source.planned
    make = partial(jobs, checkpoint, source, encoder)
    return StreamTensor(planned.name, planned.nbytes, make, padding(planned.nbytes))


def _window_notes(spec: RopeSpec, static: bool) -> list[str]:
    step, short = LLAMA_CPP.context_step, spec.tiers[0].max_length
    if static or len(spec.tiers) == 1 or short % step == 0:
        return []
    usable = short // step * step
    reach = f"contexts of up to {usable}" if usable else "no context at all"
    return [f"llama.cpp makes contexts in steps of {step} tokens: the short set, up to {short}, serves {reach}"]


def _recorded(options: Options, architecture: str, imatrix: Imatrix | None) -> dict[str, Any]:
    found: dict[str, Any] = {"architecture": architecture}
    if options.tokenizer_pre is not None:
        found["tokenizer_pre"] = options.tokenizer_pre
    if options.split is not None:
        found["split_max_size"] = options.split
    if imatrix is not None:
        found["imatrix"] = imatrix.facts
    return found
