# SPDX-License-Identifier: Apache-2.0
"""Planning an ONNX folder: the graph, the configs around it, and the place of every weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert import __version__
from lrconvert.artifact.card import CARD, render, source_card
from lrconvert.artifact.plan import Plan, Stream, StreamTensor
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.sliding import settle_windows
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.adapter import Adapter, merged
from lrconvert.checkpoint.onnx_folder import TIED_HEAD
from lrconvert.checkpoint.padding import settle_vocabulary
from lrconvert.checkpoint.source import snapshot
from lrconvert.engines.capability import native_config
from lrconvert.errors import UnsupportedError, UsageError, require
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec
from lrconvert.targets.hf.config import edited_config, json_bytes, json_in, side_files
from lrconvert.targets.onnx.card import CARD_TEXT
from lrconvert.targets.onnx.consumers import GENAI, MODEL_FILE, ONNX_FOLDER, config_of, genai_config

if TYPE_CHECKING:
    from lrconvert.targets.onnx.tensors import Stored

# What a user asks for: the dtype of activations and plain tensors, and the bits of quantised ones.
DTYPES: dict[str, tuple[str, int | None]] = {
    "f32": ("F32", None),
    "f16": ("F16", None),
    "bf16": ("BF16", None),
    "int8": ("F32", 8),
    "int4": ("F32", 4),
}
OPSETS = range(23, 26)
LIGHTER = ("f16", "int8", "int4")  # types to name where the disk is too small, the best first
MAX_GRAPH_BYTES = 2**31 - 1  # of a protobuf message


@dataclass(frozen=True)
class Options:
    """What a user may ask of an ONNX folder. `double`: angles in float64, else from float32 tables; `genai_rewind`:
    make onnxruntime-genai recompute a sequence at the boundary, where it can."""

    window: int | None = None
    dtype: str = "f32"
    attention: str = "gqa"
    opset: int = 23
    double: bool = True
    genai_rewind: bool = False
    lift: bool = False  # a sliding window
    pad: bool = False  # the embedding, to the size of the tokenizer


def plan(
    model: Model, recipe: Recipe, output: Path, options: Options | None = None, *, adapter: Adapter | None = None
) -> Plan:
    """Resolve, build the graph, lay out. Touches no weights yet.

    Raises `UnsupportedError` for heads that GroupQueryAttention doesn't take, `UsageError` for options that exclude
    each other, and what `Model.resolve` and `merged` raise.
    """
    options, source = options or Options(), model
    require("onnx", "onnx", "ONNX")
    from lrconvert.targets.onnx.graph import Choices, build
    from lrconvert.targets.onnx.tensors import files_of, lay_out

    _check(model, options)
    computing, bits = DTYPES[options.dtype]
    spec = model.resolve(recipe, options.window)
    windows = settle_windows(model, spec.window, lift=options.lift, keeps=True, target="onnx")
    model = windows.model
    if adapter is not None:  # rounded once, when it is stored
        model = merged(model, adapter, rounded=False)
    model, rows = settle_vocabulary(model, pad=options.pad)
    choices = Choices(computing, options.attention, options.opset, options.double)  # type: ignore[arg-type]
    tensors = lay_out(model, computing, bits)
    graph = build(model, spec, tensors, choices, producer=__version__).SerializeToString(deterministic=True)
    if len(graph) > MAX_GRAPH_BYTES:
        raise UnsupportedError(f"the graph has {len(graph)} bytes; an ONNX file can have {MAX_GRAPH_BYTES}")
    streams = [_stream(model, f"{ONNX_FOLDER}/{name}", group) for name, group in files_of(tensors).items()]
    native, _ = native_config(model.family, model.shape).fit(spec)
    config, edits = edited_config(model, spec, native, computing, lifted=windows.lifted)
    texts, copies, more = side_files(model, spec)
    generation = json_in(texts, copies, "generation_config.json")
    genai = genai_config(model, spec, choices, generation, rewind=options.genai_rewind)
    texts |= {
        MODEL_FILE: graph,
        "config.json": json_bytes(config_of(config, choices, len(streams)), "config.json"),
        GENAI: json_bytes(genai, GENAI),
    }
    found = source_card(model)
    written = model.dequantised(options.dtype)
    notes = [*model.notes, *written, *windows.notes, *recipe.warnings(), *_notes(options, spec), *found.notes]
    dropped = list(windows.dropped)
    card = render(model, recipe, spec, CARD_TEXT, source=found, dropped=dropped, notes=notes, adapter=adapter)
    texts[CARD] = card.encode()
    added = [] if adapter is None else [adapter.file.path]
    tiers = ", ".join(str(tier.max_length) for tier in spec.tiers)
    return Plan(
        target="onnx",
        model=model,
        recipe=recipe,
        spec=spec,
        output=output,
        record=BakeRecord(spec.window, options.dtype, lifted=windows.lifted, padded=rows),
        texts=texts,
        copies=copies,
        streams=streams,
        headline=f"tiers up to {tiers}; {options.dtype}, {options.attention} attention",
        edits=[*(edit for edit in edits if edit.key != "auto_map"), *more],
        dropped=dropped,
        notes=notes,
        options={key: value for key, value in asdict(options).items() if key not in ("window", "dtype", "lift", "pad")},
        lighter={
            f"--dtype {name}": partial(plan, source, recipe, output, replace(options, dtype=name), adapter=adapter)
            for name in LIGHTER
        },
        stamps=snapshot([*model.checkpoint.weight_files(), *copies.values(), *added]),
    )


def _check(model: Model, options: Options) -> None:
    """Refuse what can't be written, before the graph is built."""
    if DTYPES[options.dtype][1] is not None:
        require("onnxruntime", "onnx", f"--dtype {options.dtype}")
    if options.opset not in OPSETS:
        raise UsageError(f"--opset {options.opset}: {OPSETS[0]} to {OPSETS[-1]} are known")
    if options.attention == "gqa" and model.shape.head_dim % 8:
        raise UnsupportedError(
            f"{model.reference} has heads of {model.shape.head_dim} channels; GroupQueryAttention takes multiples of 8",
            remedy="Convert with --attention standard",
        )


def _stream(model: Model, name: str, tensors: list[Stored]) -> Stream:
    """A data file. The head of a tied model, where it is quantised, is made from the embedding."""
    from lrconvert.targets.onnx.tensors import jobs

    tied = {TIED_HEAD: model.roles["embedding", None].name} if model.shape.tied else {}
    streamed = [
        StreamTensor(t.name, t.nbytes, partial(jobs, model.checkpoint, t, tied.get(t.name, t.name))) for t in tensors
    ]
    return Stream(name, streamed)


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
        notes.append("programs with a cache keep the keys cached before a boundary; only recomputing the sequence "
                     "there is exact (docs/onnx.md)")  # fmt: skip
    if options.genai_rewind:
        notes.append("genai_config.json names a model type for which onnxruntime-genai recomputes a one-row sequence "
                     f"when a generated token is the {spec.boundaries[0] + 1}th: a pause as long as a prompt of "
                     "that length; not when an appended prompt skips past it")  # fmt: skip
    return notes
