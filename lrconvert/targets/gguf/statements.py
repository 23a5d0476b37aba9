# SPDX-License-Identifier: Apache-2.0
"""What the metadata of a GGUF, and the Modelfile beside it, have to say, compared with source and recipe.

Every key of the file is one that the source makes, one of the recipe's, or a description. So a key that was added is
found without being listed. Values of our own files are compared as bytes, types included.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lrconvert.artifact.manifest import Manifest
from lrconvert.artifact.statements import Difference, Facts, same, shown
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.checkpoint.gguf_header import GgufArray, GgufHeader
from lrconvert.errors import InputError, LrconvertError
from lrconvert.families.base import GGUF_STEP35
from lrconvert.targets.gguf import modelfile
from lrconvert.targets.gguf.layout import Raw, Value, pack
from lrconvert.targets.gguf.metadata import (
    OURS,
    PHI3_NAME,
    QUANTISATION_VERSION,
    carried_keys,
    lift_windows,
    rope_keys,
    shape_keys,
)
from lrconvert.targets.gguf.schemes import get_scheme
from lrconvert.targets.gguf.step35 import architecture_keys
from lrconvert.targets.gguf.vocabulary import vocabulary
from lrconvert.targets.gguf.yarn import by_formula, formula_keys

NAME = "general.name"
# Descriptions, which no program computes with; and ours, which `_recipe` looks at.
DESCRIPTIVE = (
    NAME, "general.author", "general.version", "general.organization", "general.finetune", "general.basename",
    "general.description", "general.quantized_by", "general.size_label", "general.license", "general.license.*",
    "general.url", "general.doi", "general.uuid", "general.repo_url", "general.source.*", "general.base_model.*",
    "general.dataset.*", "general.datasets", "general.tags", "general.languages", "general.base_models", f"{OURS}*",
)  # fmt: skip
# Of another program's file: keys that can't say the same otherwise.
DECISIVE = frozenset({"tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"})
TOKENS = "tokenizer.ggml.tokens"
SPLIT = frozenset({"split.no", "split.count", "split.tensors.count"})  # of a file in parts


def metadata_differences(facts: Facts, stored: GgufCheckpoint) -> Iterator[Difference]:
    """Everything that the metadata say otherwise. Without the source: what they say of each other."""
    manifest = Manifest.read(facts.artifact) if facts.ours else None
    if manifest is not None:
        yield from _recipe(stored.headers[0], manifest)
    for header in stored.headers[1:]:
        for key in header.metadata:
            if not key.startswith("split."):
                yield Difference(key, f"{header.path.name}: {key}; all metadata belong in the first part")
    if not facts.compared:
        yield from _sound(stored)
        return
    try:
        wanted, strips = _wanted(facts, stored.architecture, manifest)
    except LrconvertError as error:  # a tokenizer that llama.cpp can't be told about: another program wrote the file
        yield Difference("tokenizer", f"the model's vocabulary can't be compared: {error.message}", known=True)
        return
    if bool(PHI3_NAME.search(str(stored.metadata.get(NAME)))) != strips:
        what = "take in the space behind special tokens" if strips else "leave spaces alone"
        yield Difference(NAME, f"{NAME} is {stored.metadata.get(NAME)!r:.60}, and llama.cpp has to {what} by it")
    header = stored.headers[0]
    for key in dict.fromkeys([*header.metadata, *wanted]):
        described = any(fnmatchcase(key, pattern) for pattern in DESCRIPTIVE)
        if not described and not (key in SPLIT and len(stored.headers) > 1):
            yield from _compared(header, key, wanted.get(key), exact=facts.exact)


def _wanted(facts: Facts, architecture: str, manifest: Manifest | None) -> tuple[dict[str, Value], bool]:
    """The metadata that source and recipe make, descriptions aside; and whether special tokens take in spaces."""
    model, record, spec = facts.model, facts.record, facts.spec
    source = model.checkpoint.gguf
    keys: dict[str, Value] = {}
    if source is not None:
        keys |= carried_keys(source, architecture)
        strips = bool(PHI3_NAME.search(str(source.metadata.get(NAME))))
    else:
        pre = None if manifest is None else manifest.options.get("tokenizer_pre")
        words = vocabulary(model.checkpoint.side_files(), model.checkpoint.config, pre=pre)
        keys |= {"general.type": "model"} | shape_keys(architecture, model.shape) | words.metadata
        strips = words.strips
    if architecture == GGUF_STEP35:
        keys |= architecture_keys(model.shape)
    if record.lifted:
        lift_windows(keys, architecture, spec.window)
    if record.stored is not None:
        scheme = get_scheme(record.stored)
        keys |= {"general.quantization_version": QUANTISATION_VERSION, "general.file_type": int(scheme.file_type)}
    if by_formula(model.family, architecture):
        rope = formula_keys(architecture, spec)
    else:
        rope = rope_keys(architecture, spec, model.shape, static=record.static)
    return keys | rope | {"general.architecture": architecture}, strips


def _compared(header: GgufHeader, key: str, wanted: Value | None, *, exact: bool) -> Iterator[Difference]:
    is_there = key in header.metadata
    if wanted is None:
        yield Difference(key, f"{key} is {_shown(header, key)}; neither the source nor the recipe says so", not exact)
        return
    if is_there and header.raw(key) == pack(wanted):
        return
    right = _value(wanted)
    if is_there and not exact and same(_read(header, key), right):
        return  # another type for the same number
    known = not exact and not (is_there and (key in DECISIVE or (key == TOKENS and _moved(header, right))))
    found = _apart(_read(header, key), right) if is_there else f"is missing; {shown(right)} is needed"
    yield Difference(key, f"{key} {found}", known)


def _moved(header: GgufHeader, wanted: Any) -> bool:
    """Whether the same tokens have other ids."""
    found = _read(header, TOKENS)
    return isinstance(found, list) and found != wanted and sorted(map(str, found)) == sorted(map(str, wanted))


def _apart(found: Any, wanted: Any) -> str:
    if isinstance(found, list) and isinstance(wanted, list):
        if len(found) != len(wanted):
            return f"has {len(found)} items; {len(wanted)} are needed"
        pairs = enumerate(zip(found, wanted, strict=True))
        index = next((place for place, pair in pairs if not same(*pair)), None)
        if index is None:
            return "has items of another type than the source's"
        return f"has {shown(found[index])} as item {index}; {shown(wanted[index])} is needed"
    if same(found, wanted):
        return f"is {shown(found)}, of another type than needed"
    return f"is {shown(found)}; {shown(wanted)} is needed"


def _read(header: GgufHeader, key: str) -> Any:
    value = header.metadata[key]
    return header.array(key) if isinstance(value, GgufArray) else value


def _shown(header: GgufHeader, key: str) -> str:
    value = header.metadata[key]
    return f"an array of {value.count}" if isinstance(value, GgufArray) else shown(value)


def _value(wanted: Value) -> Any:
    """What a planned value reads as; of one that is carried its bytes, which are only compared."""
    if isinstance(wanted, Raw):
        return f"{len(wanted.data)} bytes of the source"
    return wanted


def _recipe(header: GgufHeader, manifest: Manifest) -> Iterator[Difference]:
    """The recipe in the file is the one that the manifest has."""
    key = f"{OURS}recipe"
    try:
        found = json.loads(str(header.metadata.get(key, "null")))
    except ValueError:
        found = None
    if not same(found, json.loads(json.dumps(manifest.recipe))):
        yield Difference(key, f"{key} is not the recipe of the manifest")


def _sound(stored: GgufCheckpoint) -> Iterator[Difference]:
    """What a vocabulary says of itself: as many types and scores as tokens, ids that exist, merges of pieces."""
    header, rows = stored.headers[0], stored.config["vocab_size"]
    try:
        tokens, merges = header.array(TOKENS), header.array("tokenizer.ggml.merges")
    except InputError as error:
        yield Difference("tokenizer", error.message)
        return
    if tokens is None:
        if header.metadata.get("tokenizer.ggml.model", "none") != "none":
            yield Difference(TOKENS, f"{TOKENS} is missing")
        return
    if len(tokens) != rows:
        yield Difference(TOKENS, f"{TOKENS} has {len(tokens)} items; the embedding has {rows} rows")
    if len(set(tokens)) != len(tokens):
        yield Difference(TOKENS, f"{TOKENS} has a text twice")
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        value = header.metadata.get(key)
        if isinstance(value, GgufArray) and value.count != len(tokens):
            yield Difference(key, f"{key} has {value.count} items for {len(tokens)} tokens")
    if header.metadata.get("tokenizer.ggml.model") == "gpt2" and not merges:
        reason = "tokenizer.ggml.merges is missing, and the vocabulary is byte-level BPE"
        yield Difference("tokenizer.ggml.merges", reason)
    pieces = set(tokens)
    if lost := next((m for m in merges or [] if any(part not in pieces for part in m.split(" ", 1))), None):
        yield Difference("tokenizer.ggml.merges", f"tokenizer.ggml.merges joins {lost!r:.60}, which are no tokens")
    for key, value in header.metadata.items():
        names_token = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if names_token and (not isinstance(value, int) or value >= len(tokens)):
            yield Difference(key, f"{key} is {value!r:.40}; there are {len(tokens)} tokens")


# --- the Modelfile ---------------------------------------------------------------------------------------


def modelfile_of(artifact: Path) -> Path:
    """Where the Modelfile of a GGUF lies, if it has one."""
    return artifact.with_name(modelfile.name_of(artifact))


def modelfile_differences(facts: Facts) -> Iterator[Difference]:
    """What the Modelfile beside a file says otherwise; remarks are anybody's."""
    path = modelfile_of(facts.artifact)
    try:
        lines = re.split(r"[\r\n]", path.read_bytes().decode())  # Ollama knows no other ends of lines
        wanted = modelfile.render([facts.artifact.name], facts.spec).splitlines()
    except (OSError, ValueError, LrconvertError) as error:
        yield Difference(path.name, f"{path.name}: {error}")
        return
    said, right = ([line.strip() for line in text if line.strip()[:1] not in ("", "#")] for text in (lines, wanted))
    for line in (line for line in right if line not in said):
        yield Difference(path.name, f"{path.name}: does not say {line!r}, which recipe and file need")
    for line in (Counter(said) - Counter(right)).elements():
        reason = f"{path.name}: says {line!r:.80}, which contradicts or adds to what was written"
        yield Difference(path.name, reason, not facts.ours)
