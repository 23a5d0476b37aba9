# SPDX-License-Identifier: Apache-2.0
"""A quantised folder as a checkpoint of plain weights: dequantised by rows, as they are read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from lrconvert.checkpoint.base import FLOAT_DTYPES, Checkpoint, CheckpointView, TensorInfo
from lrconvert.checkpoint.blocks import Array, Block
from lrconvert.checkpoint.folder import FolderCheckpoint
from lrconvert.checkpoint.quantised.formats import BESIDE, FORMATS, SIGNS, Format
from lrconvert.checkpoint.quantised.settings import Settings
from lrconvert.checkpoint.quantised.weight import DAMAGED, Parts, Weight
from lrconvert.errors import InputError, UnsupportedError

SECTIONS = ("quantization_config", "compression_config")
# Where quantisers leave the section too, for programs that don't read config.json.
BESIDE_CONFIG = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
TORCH_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MOST_NAMED = 3  # problems of one checkpoint


class DequantisedCheckpoint(CheckpointView):
    """A folder whose modules' weights mean what their parts say. What isn't quantised is read as it is."""

    def __init__(self, base: FolderCheckpoint, method: str, weights: Mapping[str, Weight]) -> None:
        """`weights`: by the names that plain ones would have."""
        super().__init__(base, weights)
        self._weights = weights
        self.config = {key: value for key, value in base.config.items() if key not in SECTIONS}
        self.outdated = {key: base.config[key] for key in SECTIONS if key in base.config}
        self.quantised_with, self.native, self.dequantises = method, False, True
        self.tensors: Mapping[str, TensorInfo] = dict(_tensors(base, weights))
        self.dense_dtype = _dense_dtype(self)

    def blocks(self, name: str) -> Iterator[Block]:
        weight = self._weights.get(name)
        if weight is None:
            return self.base.blocks(name)
        return (replace(block, read=partial(self._checked, name, block)) for block in weight.blocks())

    def _checked(self, name: str, block: Block) -> Array:
        """Damaged codes can be no number, and a damaged scale can make infinity of them."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = block.read()
        if not np.isfinite(values).all():
            info = self.tensors[name]
            raise InputError(f"{info.file}: {name} holds values that are not finite", remedy=DAMAGED)
        return values


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether it is a folder whose config says so. Looks at no tensor."""
    named = (checkpoint.config.get(key) is not None for key in SECTIONS)
    return isinstance(checkpoint, FolderCheckpoint) and any(named)


def readable(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with plain weights, and notes: itself, unless it is a folder of a quantiser's.

    Raises `UnsupportedError` for a method or a layout that isn't read, and `InputError` for parts that don't fit
    together and for a config that doesn't say how the weights are quantised.
    """
    if not isinstance(checkpoint, FolderCheckpoint):
        return checkpoint, []
    key = next((key for key in SECTIONS if checkpoint.config.get(key) is not None), None)
    if key is None:
        _refuse_unnamed(checkpoint)
        return checkpoint, []
    method, format, settings = _format(checkpoint, key)
    format.check(settings)
    weights = _weights(checkpoint, format, settings)
    notes = []
    if not weights:
        if method != "compressed-tensors" or settings.values.get("format") not in (None, "dense", "fakequant"):
            raise InputError(
                f"{checkpoint.path}: config.json says that the weights are quantised with {method}, and none is",
                remedy=f"Remove {key} from config.json, if they are plain",
            )
        notes.append(f"config.json names {method}; the weights are plain")
    elif format.activations(settings.values):
        notes.append(f"{method} rounds activations or the cache too when it runs this model; an artifact does not")
    return DequantisedCheckpoint(checkpoint, method, weights), notes


def _format(checkpoint: FolderCheckpoint, key: str) -> tuple[str, Format, Settings]:
    """The method that the config names, its format, and its settings."""
    section = checkpoint.config[key]
    if not isinstance(section, dict):
        raise InputError(f"{checkpoint.path}/config.json: {key} is {section!r:.60}; a section is needed")
    method = section.get("quant_method")
    if method is None:
        method = "compressed-tensors" if "config_groups" in section else None
        method = "bitsandbytes" if section.get("load_in_4bit") or section.get("load_in_8bit") else method
    if method is None:
        raise InputError(f"{checkpoint.path}/config.json: {key}.quant_method is missing", remedy=_known())
    if not isinstance(method, str) or method not in FORMATS:
        raise UnsupportedError(
            f"{checkpoint.path}: weights quantised with {method!r:.60} can't be read",
            remedy=f"{_known()}. Else convert the unquantised checkpoint",
        )
    return method, FORMATS[method], Settings(section, key)


def _known() -> str:
    return f"Known methods: {', '.join(FORMATS)}"


def _weights(checkpoint: FolderCheckpoint, format: Format, settings: Settings) -> dict[str, Weight]:
    """The quantised weights, by the names that plain ones would have."""
    found, problems = dict[str, Weight](), list[str]()
    for module, names in _modules(checkpoint.tensors, format.parts).items():
        if names.keys() == {"weight"} and checkpoint.tensors[names["weight"]].dtype in FLOAT_DTYPES:
            continue
        parts = Parts(checkpoint, module, names)
        try:
            weight = format.decoder(settings, parts)
        except InputError as error:
            problems.append(error.message)
            continue
        if unused := sorted({*names.values()} - {*weight.parts}):
            problems.append(f"{unused[0]}: no part of {weight.kind}")
        found[f"{module}.weight"] = weight
    if problems:
        more = [f"and {len(problems) - MOST_NAMED} more like these"] if len(problems) > MOST_NAMED else []
        raise InputError(f"{checkpoint.path}: {'; '.join([*problems[:MOST_NAMED], *more])}", remedy=DAMAGED)
    return found


def _modules(names: Iterable[str], parts: Iterable[str]) -> dict[str, dict[str, str]]:
    """The tensors of every module that may be quantised, by part."""
    found: dict[str, dict[str, str]] = {}
    longest_first = sorted(parts, key=len, reverse=True)
    for name in names:
        part = next((part for part in longest_first if name.endswith(f".{part}")), None)
        if part is not None:
            found.setdefault(name.removesuffix(f".{part}"), {})[part] = name
    return found


def _tensors(base: FolderCheckpoint, weights: Mapping[str, Weight]) -> Iterator[tuple[str, TensorInfo]]:
    """What there is to read, in the order of the files: a weight stands where its first part stands."""
    owner = {part: name for name, weight in weights.items() for part in weight.parts}
    seen = set()
    for stored, info in base.tensors.items():
        name = owner.get(stored)
        if name is None:
            if stored.rpartition(".")[2] not in BESIDE:
                yield stored, info
        elif name not in seen:
            seen.add(name)
            weight = weights[name]
            nbytes = sum(base.tensors[part].nbytes for part in weight.parts)
            yield name, TensorInfo(name, weight.kind, weight.shape, info.file, nbytes)


def _dense_dtype(checkpoint: Checkpoint) -> str:
    """What dequantised weights are written as: the dtype that the config computes in, else that of the weights that
    are stored plain."""
    stated = checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype")
    if isinstance(stated, str) and stated in TORCH_DTYPES:
        return TORCH_DTYPES[stated]
    plain = [info.dtype for info in checkpoint.tensors.values() if info.dtype in FLOAT_DTYPES]
    return max(sorted(set(plain)), key=plain.count) if plain else "BF16"


def _refuse_unnamed(checkpoint: FolderCheckpoint) -> None:
    """`InputError`, in one line, for quantised weights beside a config that doesn't say so. Layouts that look alike
    mean different numbers, so none is guessed."""
    for sign in SIGNS:
        if names := [name for name in checkpoint.tensors if name.endswith(f".{sign.part}")]:
            beside = [name for name in BESIDE_CONFIG if (checkpoint.path / name).is_file()]
            where = f"{beside[0]} beside it has the settings" if beside else "The original config.json has it"
            raise InputError(
                f"{checkpoint.path}: the weights are quantised ({names[0]} and {len(names) - 1} more), and config.json "
                "has no quantization_config that says how",
                remedy=f"Put it back, with quant_method {sign.methods} and {sign.keys}. {where}",
            )
    if odd := [info for info in checkpoint.tensors.values() if info.dtype.startswith("F8_")]:
        raise InputError(
            f"{checkpoint.path}: {odd[0].name} and {len(odd) - 1} more are {odd[0].dtype}, without scales, and "
            "config.json has no quantization_config",
            remedy="Convert the checkpoint that this one was made from",
        )


def zero_biases(checkpoint: Checkpoint, expected: Collection[str]) -> set[str]:
    """Biases of quantised modules that the family doesn't have and that are zero: AutoGPTQ stores them with every
    module."""
    tensors = checkpoint.tensors
    added = [name for name in tensors if name.endswith(".bias") and name not in expected]
    weights = {name: tensors.get(f"{name.removesuffix('.bias')}.weight") for name in added}
    quantised = [name for name, weight in weights.items() if weight and weight.dtype not in FLOAT_DTYPES]
    return {name for name in quantised if tensors[name].dtype in FLOAT_DTYPES and not checkpoint.read(name).any()}
