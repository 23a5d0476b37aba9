# SPDX-License-Identifier: Apache-2.0
"""Baking an ONNX folder: plan every byte, then stream the weights, then publish all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrconvert import __version__
from lrconvert.artifact.card import CARD, render, source_card
from lrconvert.artifact.manifest import Manifest
from lrconvert.artifact.prefetch import made_ahead
from lrconvert.artifact.redaction import described
from lrconvert.artifact.staging import Staging
from lrconvert.checkpoint import Checkpoint, Model
from lrconvert.checkpoint.adapter import Adapter, merged
from lrconvert.checkpoint.base import refuse_quantised
from lrconvert.checkpoint.source import check_unchanged, snapshot
from lrconvert.engines.capability import native_hf, project
from lrconvert.errors import UnsupportedError, UsageError, require
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec
from lrconvert.targets.hf.config import Edit, edited_config, json_bytes, json_in, side_files
from lrconvert.targets.onnx.consumers import GENAI, MODEL_FILE, ONNX_FOLDER, config_of, genai_config

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all
TARGET = "onnx"
# What a user asks for: the dtype of activations and plain tensors, and the bits of quantised ones.
DTYPES: dict[str, tuple[str, int | None]] = {
    "f32": ("F32", None),
    "f16": ("F16", None),
    "bf16": ("BF16", None),
    "int8": ("F32", 8),
    "int4": ("F32", 4),
}
OPSETS = range(23, 26)
MAX_GRAPH_BYTES = 2**31 - 1  # of a protobuf message


@dataclass(frozen=True)
class Options:
    """What a user may ask of an ONNX folder. `double`: angles in float64, else from float32 tables; `genai_rewind`:
    have onnxruntime-genai compute a sequence anew at the boundary, where it can."""

    window: int | None = None
    dtype: str = "f32"
    attention: str = "gqa"
    opset: int = 23
    double: bool = True
    genai_rewind: bool = False


@dataclass(frozen=True)
class Plan:
    """What would be written, before anything is."""

    model: Model
    weights: Checkpoint
    recipe: Recipe
    spec: RopeSpec
    output: Path
    texts: dict[str, bytes]  # files that are made here, the graph among them
    kept: dict[str, Path]  # files that come along unchanged
    data: dict[str, list[Any]]  # weight files: their tensors (`tensors.Stored`), in order
    edits: list[Edit]
    notes: list[str]
    options: dict[str, Any]
    stamps: dict[Path, tuple[int, int]] = field(repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Every file of the artifact but the manifest, with its size in bytes."""
        sizes = {name: len(data) for name, data in self.texts.items()}
        sizes |= {name: path.stat().st_size for name, path in self.kept.items()}
        sizes |= {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in self.data.items()}
        return dict(sorted(sizes.items()))


def plan(model: Model, recipe: Recipe, output: Path, options: Options, *, adapter: Adapter | None = None) -> Plan:
    """Resolve, build the graph, lay out. Touches no weights yet.

    Raises `UnsupportedError` for quantised sources, `UsageError` for options that exclude each other, and what
    `Model.resolve` and `merged` raise.
    """
    require("onnx", "onnx", "ONNX")
    from lrconvert.targets.onnx.graph import Choices, build
    from lrconvert.targets.onnx.tensors import files_of, lay_out

    refuse_quantised(model, "ONNX")
    computing, bits = DTYPES[options.dtype]
    if bits is not None:
        require("onnxruntime", "onnx", f"--dtype {options.dtype}")
    if options.opset not in OPSETS:
        raise UsageError(f"--opset {options.opset}: {OPSETS[0]} to {OPSETS[-1]} are known")
    shape = model.shape
    if options.attention == "gqa" and shape.head_dim % 8:
        raise UnsupportedError(
            f"{model.reference} has heads of {shape.head_dim} channels; GroupQueryAttention takes multiples of 8",
            remedy="Convert with --attention standard",
        )
    spec = model.resolve(recipe, options.window)
    if adapter is not None:  # rounded once, when it is stored
        model = merged(model, adapter, rounded=False)
    choices = Choices(computing, options.attention, options.opset, options.double)  # type: ignore[arg-type]
    tensors = lay_out(model, computing, bits)
    graph = build(model, spec, tensors, choices, producer=__version__).SerializeToString(deterministic=True)
    if len(graph) > MAX_GRAPH_BYTES:
        raise UnsupportedError(f"the graph has {len(graph)} bytes; an ONNX file can have {MAX_GRAPH_BYTES}")
    data = {f"{ONNX_FOLDER}/{name}": group for name, group in files_of(tensors).items()}
    native, _ = project(spec, native_hf(model.family))
    config, edits = edited_config(model, spec, native, computing)
    texts, kept, more = side_files(model, spec)
    edits = [*(edit for edit in edits if edit.key != "auto_map"), *more]
    generation = json_in(texts, kept, "generation_config.json")
    genai = genai_config(model, spec, choices, generation, rewind=options.genai_rewind)
    texts |= {
        MODEL_FILE: graph,
        "config.json": json_bytes(config_of(config, choices, len(data)), "config.json"),
        GENAI: json_bytes(genai, GENAI),
    }
    notes = [*model.notes, *recipe.warnings(), *_notes(options, spec)]
    found = source_card(model)
    notes += found.notes
    texts[CARD] = render(model, recipe, spec, notes=notes, adapter=adapter, source=found, target=TARGET).encode()
    added = [] if adapter is None else [adapter.file.path]
    return Plan(
        model=model,
        weights=model.checkpoint,
        recipe=recipe,
        spec=spec,
        output=output,
        texts=texts,
        kept=kept,
        data=data,
        edits=edits,
        notes=notes,
        options={
            "window": spec.window,
            "dtype": options.dtype,
            "attention": options.attention,
            "opset": options.opset,
            "double": options.double,
            "genai_rewind": options.genai_rewind,
        },
        stamps=snapshot([*model.checkpoint.weight_files(), *kept.values(), *added]),
    )


def _notes(options: Options, spec: RopeSpec) -> list[str]:
    """What a user of the folder has to know."""
    notes = []
    if options.dtype == "bf16":
        notes.append("bf16: ONNX Runtime has no bfloat16 products on a CPU; this folder runs with CUDA")
    if options.attention == "gqa":
        notes.append("GroupQueryAttention can't be padded on the left: such a batch is an error; --attention standard "
                     "serves it")  # fmt: skip
        if DTYPES[options.dtype][0] == "F32":
            notes.append("GroupQueryAttention has no float32 kernel on CUDA: use f16 or --attention standard there")
    if spec.boundaries:
        notes.append("programs that keep a cache go on with the keys that they cached before a boundary; what is exact "
                     "is to read the sequence anew there (docs/onnx.md)")  # fmt: skip
    if options.genai_rewind:
        notes.append("genai_config.json names a model type for which onnxruntime-genai reads a sequence of one row "
                     f"anew when a generated token is the {spec.boundaries[0] + 1}th: a pause as long as a prompt of "
                     "that length; not when a prompt that is appended jumps over it")  # fmt: skip
    return notes


def write(plan: Plan, *, force: bool = False, progress: Progress | None = None) -> Manifest:
    """Carry the plan out."""
    from lrconvert.checkpoint.onnx_folder import TIED_HEAD
    from lrconvert.targets.onnx.tensors import jobs

    report = progress or (lambda what, done, total: None)
    total, done = sum(plan.sizes.values()), 0
    tied = {TIED_HEAD: plan.model.roles["embedding", None].name} if plan.model.shape.tied else {}
    with Staging(plan.output, force=force, link=False) as staging:
        for name, data in sorted(plan.texts.items()):
            staging.write_bytes(name, data)
            done += len(data)
        for name, path in sorted(plan.kept.items()):
            staging.copy(path, name)
            done += path.stat().st_size
        ordered = [tensor for tensors in plan.data.values() for tensor in tensors]
        with closing(made_ahead(jobs(plan.weights, ordered, sources=tied))) as blocks:
            for name, tensors in plan.data.items():
                with staging.create(name) as file:
                    for tensor in tensors:
                        left = tensor.nbytes
                        while left:
                            block = next(blocks)
                            file.write(block)
                            left -= block.nbytes
                            done += block.nbytes
                        report(tensor.name, done, total)
        check_unchanged(plan.stamps)
        manifest = Manifest(
            target=TARGET,
            source=described(plan.model),
            recipe=asdict(plan.recipe),
            options=plan.options,
            losses=[],
            notes=plan.notes,
        )
        staging.publish(manifest)
    return manifest
