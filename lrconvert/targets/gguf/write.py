# SPDX-License-Identifier: Apache-2.0
"""Baking a GGUF: plan every byte, then write it in order, then publish it.

A checkpoint is converted: its tensors get the types of a scheme, its tokenizer and card become metadata. A GGUF
without a scheme is re-baked: rope metadata and factors are replaced, and every other byte is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType
from gguf.constants import GGUFValueType

from lrconvert.artifact.card import source_card
from lrconvert.artifact.file_staging import FileStaging, replaced_files
from lrconvert.artifact.manifest import MANIFEST, Manifest, manifest_path
from lrconvert.artifact.prefetch import made_ahead
from lrconvert.artifact.redaction import described
from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.adapter import Adapter, merged
from lrconvert.checkpoint.base import refuse_quantised
from lrconvert.checkpoint.fold import folded
from lrconvert.checkpoint.gguf import PERMUTED
from lrconvert.checkpoint.source import check_unchanged, snapshot
from lrconvert.engines.capability import LLAMA_CPP, LLAMA_CPP_STATIC, folded_attention, project
from lrconvert.errors import UnsupportedError, UsageError
from lrconvert.families import longrope_architecture
from lrconvert.families.base import GGUF_INTERLEAVED, LAYER
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.llama_library import LlamaLibrary
from lrconvert.targets.gguf import encode, modelfile
from lrconvert.targets.gguf.imatrix import Imatrix, check_matrix
from lrconvert.targets.gguf.layout import Planned, Scalar, Value, header_of, padding, split_parts
from lrconvert.targets.gguf.metadata import (
    QUANTISATION_VERSION,
    arranged,
    carried_keys,
    general_keys,
    provenance_keys,
    rope_keys,
    rope_tensors,
    shape_keys,
)
from lrconvert.targets.gguf.schemes import MixFacts, Scheme, get_scheme, tensor_type
from lrconvert.targets.gguf.vocabulary import vocabulary
from lrconvert.targets.gguf.weights import Source, is_plain, jobs

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all
SUFFIX = ".gguf"
_OWN_TYPE = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class Options:
    """What a user may ask of a GGUF. `type`: a scheme's name, None keeps what is stored; `static`: the long set
    alone, for every length; `fold`: the attention factor goes into q and k; `lossy`: give up what llama.cpp can't
    do; `split` in bytes of tensor data a file."""

    window: int | None = None
    type: str | None = None
    static: bool = False
    fold: bool = False
    lossy: bool = False
    tokenizer_pre: str | None = None
    split: int | None = None
    imatrix: Path | None = None
    modelfile: bool = False


@dataclass(frozen=True)
class Plan:
    """What would be written, before anything is."""

    model: Model
    weights: Checkpoint
    recipe: Recipe
    spec: RopeSpec
    output: Path
    scheme: Scheme | None
    imatrix: Imatrix | None
    files: list[tuple[str, list[Source], bytes]]  # name, tensors in order, everything before them
    texts: dict[str, bytes]  # other files, made here
    rope: dict[str, Value]  # the rope metadata, for people
    given_up: list[str]  # what the recipe asks and this file does not do
    notes: list[str]
    options: dict[str, Any]
    stamps: dict[Path, tuple[int, int]] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """Every file but the manifest, the one to open first."""
        return [*(name for name, _, _ in self.files), *self.texts]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file but the manifest."""
        sizes = {name: len(data) for name, data in self.texts.items()}
        for name, sources, header in self.files:
            data = [source.planned.nbytes for source in sources]
            sizes[name] = len(header) + sum(data) + sum(map(padding, data))
        return sizes

    @property
    def types(self) -> dict[str, int]:
        """How many tensors have which type."""
        counts: dict[str, int] = {}
        for source in self._sources():
            counts[source.planned.kind.name] = counts.get(source.planned.kind.name, 0) + 1
        return counts

    def _sources(self) -> Iterator[Source]:
        return (source for _, sources, _ in self.files for source in sources)


def plan(
    model: Model,
    recipe: Recipe,
    output: Path,
    options: Options,
    *,
    adapter: Adapter | None = None,
    library: LlamaLibrary | None = None,
) -> Plan:
    """Resolve, choose types, lay out. Touches no weights yet.

    Raises `UnsupportedError` for a family whose C++ ignores factors and for what the recipe asks beyond llama.cpp
    (unless `lossy`), and what `Model.resolve`, `merged`, `get_scheme` and `vocabulary` raise.
    """
    _check_name(output)
    architecture = longrope_architecture(model.family)
    refuse_quantised(model, "GGUF")
    shape = model.shape
    _check_shape(model, architecture)
    spec = model.resolve(recipe, options.window)
    kept, given_up = _kept(spec, options)
    scale = kept.tiers[-1].attention_factor if options.fold else 1.0
    written = folded_attention(kept, scale)
    source, problems = model.checkpoint.gguf, model.checkpoint.rope_problems
    scheme = _scheme(model, options, rewritten=adapter is not None or scale != 1.0)
    _check_options(options, scheme, is_gguf=source is not None)
    if adapter is not None:
        model = merged(model, adapter, rounded=False)
    baked = model if scale == 1.0 else folded(model, scale, rounded=False)
    imatrix = None if options.imatrix is None else Imatrix.load(options.imatrix)
    tensors = _tensors(baked, architecture, scheme, imatrix)
    if scheme is not None:
        kinds = {item.planned.name: (item.planned.kind, item.planned.shape) for item in tensors}
        check_matrix(scheme, kinds, imatrix)
        encode.check({kind for kind, _ in kinds.values()}, library, weighted=imatrix is not None)
    factors = [
        Source(Planned(name, GGMLQuantizationType.F32, values.shape), name, values=values)
        for name, values in rope_tensors(architecture, written, static=options.static).items()
    ]
    rope = rope_keys(architecture, written, static=options.static)
    keys: dict[str, Value] = {"general.architecture": architecture}
    notes = [*model.notes, *recipe.warnings(), *_window_notes(written, options.static)]
    if source is not None:
        keys |= carried_keys(source, architecture)
        if source.architecture != architecture:
            notes.append(
                f"written as the {architecture} architecture, rows of q and k permuted: {source.architecture} of "
                "llama.cpp ignores rope factors"
            )
        if problems:
            notes.append(f"repaired: {'; '.join(problems)}")
    else:
        words = vocabulary(model.checkpoint.side_files(), model.checkpoint.config, pre=options.tokenizer_pre)
        card = source_card(model)
        notes += [*words.notes, *card.notes]
        keys |= general_keys(model, card, strips=words.strips) | shape_keys(architecture, shape) | words.metadata
    if scheme is not None:
        keys["general.quantization_version"] = QUANTISATION_VERSION
        keys["general.file_type"] = int(scheme.file_type)
    keys |= rope | provenance_keys(recipe, spec.family, given_up)
    files = _files(output, arranged(keys), [*factors, *tensors], options.split)
    texts = {}
    if options.modelfile:
        texts[modelfile.name_of(output)] = modelfile.render([name for name, _, _ in files], written).encode()
    used = [path for path in (options.imatrix, adapter and adapter.file.path) if path is not None]
    return Plan(
        model=model,
        weights=baked.checkpoint,
        recipe=recipe,
        spec=written,
        output=output,
        scheme=scheme,
        imatrix=imatrix,
        files=files,
        texts=texts,
        rope=rope,
        given_up=given_up,
        notes=notes,
        options=_recorded(options, spec, architecture, scheme, scale, imatrix),
        stamps=snapshot([*model.checkpoint.weight_files(), *used]),
    )


def _check_name(output: Path) -> None:
    if output.suffix != SUFFIX:
        raise UsageError(f"{output}: a GGUF needs a name that ends in {SUFFIX}", remedy=f"-o {output.name}{SUFFIX}")
    whole = manifest_path(output).name.removesuffix(f".{MANIFEST}")
    if whole != output.stem:
        raise UsageError(
            f"{output}: this is what a part of {whole}{SUFFIX} is called",
            remedy=f"-o {whole}{SUFFIX}; with --split-max-size its parts get such names",
        )


def _check_options(options: Options, scheme: Scheme | None, *, is_gguf: bool) -> None:
    """What would be ignored is refused."""
    if options.tokenizer_pre is not None and is_gguf:
        raise UsageError("--tokenizer-pre: a GGUF is re-baked with the tokenizer that it has")
    if options.imatrix is not None and (scheme is None or not scheme.quantised):
        raise UsageError("--imatrix: nothing is quantised", remedy="Say which type to write with --type")


def _check_apart(plan: Plan) -> None:
    """An artifact can't take the place of what it is made from: nobody could verify it any more."""
    gone = {path.resolve() for path in replaced_files(plan.output, plan.names)}
    if sources := [path for path in plan.stamps if path.resolve() in gone]:
        raise UsageError(
            f"{plan.output} would replace {sources[0]}, which it is made from", remedy="Give it a name of its own"
        )


def _check_shape(model: Model, architecture: str) -> None:
    """What llama.cpp's loaders of these architectures insist on."""
    shape = model.shape
    width = shape.heads * shape.head_dim
    if architecture == "phi3" and width != shape.hidden:
        raise UnsupportedError(
            f"{model.reference}: {shape.heads} heads of {shape.head_dim} make {width} channels; llama.cpp's phi3 needs "
            f"as many as the hidden size, {shape.hidden}"
        )
    if architecture in GGUF_INTERLEAVED and shape.rotary_dim != shape.head_dim:
        raise UnsupportedError(
            f"{model.reference}: {shape.rotary_dim} of {shape.head_dim} channels rotate; llama.cpp's {architecture} "
            "rotates whole heads"
        )


def _kept(spec: RopeSpec, options: Options) -> tuple[RopeSpec, list[str]]:
    """What llama.cpp can express of the spec, and what is given up; refused unless the user allows that."""
    kept, losses = project(spec, LLAMA_CPP)
    if losses and not options.lossy:
        advice = "bake to hf, whose own code is exact, or give this up with --allow-lossy"
        if any("attention factor" in loss for loss in losses):
            advice = f"`recipe derive --uniform` makes one attention factor for both sets; or {advice}"
        raise UnsupportedError("; ".join(losses), remedy=advice[0].upper() + advice[1:])
    if options.static:
        kept, more = project(kept, LLAMA_CPP_STATIC)
        losses += more
    return kept, losses


def _scheme(model: Model, options: Options, *, rewritten: bool) -> Scheme | None:
    """The scheme to write, None where every stored byte stays."""
    if options.type is not None:
        return get_scheme(options.type)
    if model.checkpoint.gguf is not None and not rewritten:
        return None
    if (own := _OWN_TYPE.get(model.dtype)) is None:
        raise UsageError(
            f"{model.reference} is quantised ({model.dtype}), and its weights would change",
            remedy="Say which type to write with --type; a recipe alone is baked without touching the weights",
        )
    return get_scheme(own)


def _tensors(model: Model, architecture: str, scheme: Scheme | None, imatrix: Imatrix | None) -> list[Source]:
    """Every tensor of the model with its name, type and row order, as they will follow each other."""
    shape, interleave = model.shape, architecture in GGUF_INTERLEAVED
    rows = {row.role: row for row in model.family.rows}
    facts = MixFacts(architecture, shape.layers, shape.heads, shape.kv_heads, shape.tied, imatrix is not None)
    heads = {"heads": shape.heads, "kv": shape.kv_heads}
    checkpoint = model.checkpoint
    found = []
    for (role, layer), tensor in model.roles.items():
        if role == "lm_head" and shape.tied:
            continue  # a copy of the embedding that some programs store
        name = rows[role].gguf.replace(LAYER, str(layer))
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
        found.append(Source(Planned(name, kind, tensor.shape), tensor.name, permuted))
    if checkpoint.gguf is not None:  # in the order of its file
        order = {name: place for place, name in enumerate(checkpoint.tensors)}
        found.sort(key=lambda source: order[source.name])
    return found


def _files(
    output: Path, metadata: Mapping[str, Value], sources: Sequence[Source], limit: int | None
) -> list[tuple[str, list[Source], bytes]]:
    by_name = {source.planned.name: source for source in sources}
    parts = split_parts([source.planned for source in sources], limit)
    if len(parts) == 1:
        return [(output.name, list(sources), header_of(metadata, parts[0]))]
    files = []
    for number, part in enumerate(parts):
        # What llama.cpp's gguf-split writes: all metadata in the first part.
        split = {
            "split.no": Scalar(GGUFValueType.UINT16, number),
            "split.count": Scalar(GGUFValueType.UINT16, len(parts)),
            "split.tensors.count": Scalar(GGUFValueType.INT32, len(sources)),
        }
        name = f"{output.stem}-{number + 1:05}-of-{len(parts):05}{SUFFIX}"
        header = header_of({**metadata, **split} if number == 0 else split, part)
        files.append((name, [by_name[planned.name] for planned in part], header))
    return files


def _window_notes(spec: RopeSpec, static: bool) -> list[str]:
    step, short = LLAMA_CPP.context_step, spec.tiers[0].max_length
    if static or len(spec.tiers) == 1 or short % step == 0:
        return []
    usable = short // step * step
    reach = f"contexts of up to {usable}" if usable else "no context at all"
    return [f"llama.cpp makes contexts in steps of {step} tokens: the short set, up to {short}, serves {reach}"]


def _recorded(
    options: Options, spec: RopeSpec, architecture: str, scheme: Scheme | None, scale: float, imatrix: Imatrix | None
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "window": spec.window,
        "type": None if scheme is None else scheme.name,
        "architecture": architecture,
    }
    if options.static:
        found["static_long"] = True
    if scale != 1.0:
        found["folded_attention"] = scale
    if options.tokenizer_pre is not None:
        found["tokenizer_pre"] = options.tokenizer_pre
    if options.split is not None:
        found["split_max_size"] = options.split
    if imatrix is not None:
        found["imatrix"] = imatrix.facts
    return found


def write(
    plan: Plan, *, library: LlamaLibrary | None = None, force: bool = False, progress: Progress | None = None
) -> Manifest:
    """Carry the plan out."""
    _check_apart(plan)
    report = progress or (lambda what, done, total: None)
    done, total = 0, sum(plan.sizes.values())
    encoder = encode.Encoder(library, plan.imatrix)
    every = [source for _, sources, _ in plan.files for source in sources]
    with (
        FileStaging(plan.output, plan.names, force=force) as staging,
        closing(made_ahead(jobs(plan.weights, every, encoder))) as blocks,
    ):
        for name, data in plan.texts.items():
            staging.write_bytes(name, data)
        for name, sources, header in plan.files:
            with staging.create(name) as file:
                file.write(header)
                for source in sources:
                    left = source.planned.nbytes
                    while left:
                        block = next(blocks)
                        file.write(block)
                        left -= block.nbytes
                        done += block.nbytes
                        report(source.planned.name, done, total)
                    file.write(bytes(padding(source.planned.nbytes)))
        check_unchanged(plan.stamps)
        manifest = Manifest(
            target="gguf",
            source=described(plan.model),
            recipe=asdict(plan.recipe),
            options=plan.options,
            losses=plan.given_up,
            notes=plan.notes,
        )
        staging.publish(manifest)
    return manifest


__all__ = ["Options", "Plan", "manifest_path", "plan", "write"]
