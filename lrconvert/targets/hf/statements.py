# SPDX-License-Identifier: Apache-2.0
"""What a folder's JSON files have to say (`artifact.statements` compares), and what of its files loaders would read.

The tables are for Hugging Face folders; an ONNX folder has the same files and takes them with a few rows changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lrconvert.artifact.checks import Row
from lrconvert.artifact.manifest import MANIFEST
from lrconvert.artifact.statements import (
    ABSENT,
    SOURCE,
    Difference,
    Facts,
    Files,
    Statement,
    Such,
    as_json,
    differences,
    file_differences,
    rows_from,
    spelling_differences,
    unasked,
)
from lrconvert.checkpoint import Checkpoint, read_json
from lrconvert.checkpoint.base import FLOAT_DTYPES
from lrconvert.checkpoint.folder import CONFIG, PICKLES, SIDE_FILES, side_files_of
from lrconvert.checkpoint.folder_code import AUTO_MAP, MODELING_FILE
from lrconvert.checkpoint.padding import tokens_of
from lrconvert.checkpoint.rope_config import LONGROPE_KEY
from lrconvert.engines.capability import native_config
from lrconvert.errors import InputError, LrconvertError
from lrconvert.families.layers import LOCAL_THETA
from lrconvert.targets.hf.config import TORCH_NAMES
from lrconvert.targets.hf.spelling import native_keys, own_key, plain_keys

TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"


# --- config.json -----------------------------------------------------------------------------------------


def _native(key: str) -> Callable[[Facts], Any]:
    def wanted(facts: Facts) -> Any:
        family, shape = facts.model.family, facts.model.shape
        return native_keys(native_config(family, shape).fit(facts.spec)[0], family, shape)[key]

    return wanted


def _plain(key: str) -> Callable[[Facts], Any]:
    """Where layers that slide rotate by themselves; elsewhere `rope_parameters` says again what rope_scaling does."""

    def wanted(facts: Facts) -> Any:
        model = facts.model
        native = native_config(model.family, model.shape).fit(facts.spec)[0]
        return plain_keys(native, model.family, model.shape).get(key, ABSENT)

    return wanted


def _partial(facts: Facts) -> Any:
    shape = facts.model.shape
    if shape.rotary_dim == shape.head_dim:
        return SOURCE
    words = f"a part of {shape.head_dim} channels that makes {shape.rotary_dim}"
    return Such(words, lambda found: _is_number(found) and int(shape.head_dim * found) == shape.rotary_dim)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tied(facts: Facts) -> Such:
    tied = facts.model.shape.tied
    return Such("true" if tied else "false: the head is a tensor of its own", lambda found: (found is True) == tied)


def _dtype(key: str) -> Callable[[Facts], Any]:
    """What the weights are; or what the source says of the same weights, whether it is so or not."""

    def wanted(facts: Facts) -> Any:
        source = facts.model.checkpoint.config
        stored = TORCH_NAMES.get(facts.dtype or "")
        if not facts.compared or (key not in source and {"dtype", "torch_dtype"} & source.keys()):
            return SOURCE
        right = {stored, source.get(key)} if facts.record.stored is None else {stored}
        words = " or ".join(sorted(f'"{name}"' for name in right if name is not None))
        gone = not words or not facts.ours  # versions of transformers have two names for it
        return Such(
            f"{words}, which the weights are",
            lambda found: gone if found is ABSENT else isinstance(found, str | None) and found in right,
        )

    return wanted


def _spelled_dtype(facts: Facts) -> Any:
    """torch_dtype, which is added where the source has neither spelling and the dtype is not the source's."""
    source = facts.model.checkpoint.config
    if not {"dtype", "torch_dtype"} & source.keys():
        stored = TORCH_NAMES.get(facts.dtype or "")
        return Such(f'"{stored}", which the weights are', lambda found: found in (ABSENT, stored))
    return _dtype("torch_dtype")(facts)


def _only_a_source_says(facts: Facts) -> Any:
    """What changes all that some program computes: a source may say it, nobody else."""
    return SOURCE if facts.compared else ABSENT


CONFIG_SAYS: tuple[Statement, ...] = (
    Statement("max_position_embeddings", _native("max_position_embeddings"), "the window"),
    Statement("original_max_position_embeddings", _native("original_max_position_embeddings"), spelling=True),
    Statement("rope_theta", _native("rope_theta"), spelling=True),
    Statement("rope_scaling", _native("rope_scaling"), spelling=True),
    Statement("rope_parameters", _plain("rope_parameters"), "the recipe, which rope_scaling spells,", spelling=True),
    Statement(LOCAL_THETA, _plain(LOCAL_THETA), "the model", spelling=True),
    Statement(LONGROPE_KEY, lambda facts: own_key(facts.spec, facts.model.shape), spelling=True),
    Statement("partial_rotary_factor", _partial, "the model"),
    Statement(
        "head_dim",
        lambda facts: facts.model.shape.head_dim if facts.model.family.hf_states_head_size else SOURCE,
        "the model",
    ),
    Statement(
        "sliding_window",
        lambda facts: facts.spec.window if facts.record.lifted and facts.compared else SOURCE,
        "the lifted sliding window",
    ),
    Statement("tie_word_embeddings", _tied, "the model"),
    Statement("architectures", lambda facts: [facts.model.family.hf_class], "the model", spelling=True),
    Statement("auto_map", lambda facts: dict(AUTO_MAP), "the artifact's own code", spelling=True),
    Statement("transformers_version", lambda facts: SOURCE, spelling=True),
    Statement("torch_dtype", _spelled_dtype, "the weights' dtype"),
    Statement("dtype", _dtype("dtype"), "the weights' dtype"),
    Statement("quantization_config", lambda facts: ABSENT, "the weights, which are plain,"),
    Statement("compression_config", lambda facts: ABSENT, "the weights, which are plain,"),
    *(
        Statement(key, _only_a_source_says, whose)
        for key, whose in (
            ("quantization", "the weights, which are plain to mlx-lm too,"),
            ("text_config", "the model, which this config describes itself,"),
            ("dual_chunk_attention_config", "the recipe, beside which vLLM would use it,"),
        )
    ),
)

# --- what lies beside it ---------------------------------------------------------------------------------

SIDE_SAY: dict[str, tuple[Statement, ...]] = {
    TOKENIZER: (
        Statement("model_max_length", lambda facts: facts.spec.window),
        Statement("auto_map", _only_a_source_says, "the tokenizer, which needs no code,"),
    ),
}
CONFIGS = frozenset({CONFIG, "genai_config.json"})  # what programs look for first in a folder
VOCABULARIES = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"})
# Files beside those of the source that some loader reads: patterns, and what reads them.
READ_BY_LOADERS: dict[str, str] = {
    "adapter_config.json": "transformers merges the adapter that it names",
    "adapter_model*": "transformers merges it",
    "quant*config.json": "engines take the weights for quantised ones",
    "hf_quant_config.json": "engines take the weights for quantised ones",
    "custom_generate": "transformers runs its generate.py",
    "params.json": "engines read it in place of config.json",
    "consolidated*": "engines read it in place of the weights",
    "*.safetensors": "engines read every such file as weights",
    "*.safetensors.index.json": "loaders read it for where weights lie",
    "*.gguf": "loaders read it as weights",
    "*.onnx": "programs choose among graphs by their names",
    "*.ort": "programs choose among graphs by their names",
    "*.h5": "loaders read it as weights",
    "*.msgpack": "loaders read it as weights",
    "weights*.npz": "loaders read it as weights",
    **dict.fromkeys(PICKLES, "loaders read it as weights"),
    "onnx": "programs read the graph in it in place of the weights",
    "openvino_*": "programs read it in place of the weights",
    "original": "programs read what is in it in place of the weights",
    "spiece.model": "loaders read a tokenizer from it",
    "tiktoken.model": "loaders read a tokenizer from it",
    "code": "servers run its inference.py",
    "modules.json": "sentence-transformers reads it",
    "handler.py": "servers run it",
    "requirements.txt": "servers install what it names",
    "*.py": "loaders run it where a file names it",
    "*processor_config.json": "transformers takes the model for one of images or sound",
}


def folder_rows(
    facts: Facts,
    weights: Sequence[Path],
    *,
    config: Sequence[Statement] = CONFIG_SAYS,
    side: Mapping[str, Sequence[Statement]] = SIDE_SAY,
) -> list[Row]:
    """What config.json and the files beside it say, compared with recipe and source. `weights`: the files that hold
    them."""
    folder, source = facts.artifact, facts.model.checkpoint
    stated = differences(CONFIG, read_json(folder / CONFIG), source.config if facts.compared else None, config, facts)
    rows = rows_from("config", "what config.json says", stated)
    try:
        found = side_files_of(folder)
        wanted: Files = source.side_files() if facts.compared else {}
    except LrconvertError as error:
        return [*rows, Row("config", "the files beside it", "fail", reason=error.message)]
    spelled = [path for path in sorted(folder.glob("*.json")) if path.name != MANIFEST]
    beside = [*_strays(facts, weights), *_sound(found, facts), *spelling_differences(spelled, wanted)]
    if facts.compared:
        beside += file_differences(found, wanted, side, facts)
    else:
        own = {name: path for name, path in found.items() if name in side}
        for name, path in own.items():
            beside += differences(name, as_json(path, name), None, side[name], facts)
    rows += rows_from("config", f"{len(found)} files beside config.json", beside)
    return rows + unasked(facts, "tokenizer, chat template, generation settings, the rest of config.json, weights")


def _strays(facts: Facts, weights: Sequence[Path]) -> Iterator[Difference]:
    """Files that lrconvert did not write and some loader reads."""
    folders = {facts.artifact, *(path.parent for path in weights)}
    known = {*weights, *folders}
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        beside = any(fnmatchcase(path.name.lower(), pattern) for pattern in SIDE_FILES)
        if path.parent != facts.artifact and (beside or path.name in CONFIGS):
            reason = f"{path.parent.name}/{path.name}: not part of the artifact, and who opens this folder reads it"
            yield Difference(path.name, reason, not facts.ours)
            continue
        if path in known or path.name == MODELING_FILE or beside:
            continue
        for pattern, what in READ_BY_LOADERS.items():
            if fnmatchcase(path.name.lower(), pattern):
                yield Difference(path.name, f"{path.name}: not part of the artifact, and {what}", not facts.ours)
                break


def _sound(found: Files, facts: Facts) -> Iterator[Difference]:
    """What the files say of each other, whatever the source was: ids that have no row, a vocabulary that isn't there.

    A source may have such mistakes itself; then they are the source's, and what differs from it is told elsewhere.
    """
    if facts.compared:
        return
    names = set(found)
    if TOKENIZER in names and not names & VOCABULARIES:
        yield Difference(TOKENIZER, f"{TOKENIZER}: no file of a vocabulary lies beside it")
    if "tokenizer.json" in names and (problem := _broken_tokenizer(found["tokenizer.json"])):
        yield Difference("tokenizer.json", f"tokenizer.json: {problem}")
    rows = facts.model.shape.vocab
    for name in (CONFIG, GENERATION):
        if name != CONFIG and name not in names:
            continue
        values = read_json(facts.artifact / name)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            stated = values.get(key)
            ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
            if bad := [item for item in ids if not isinstance(item, int) or item >= rows]:
                yield Difference(f"{name}: {key}", f"{name}: {key} is {bad[0]!r:.40}; the embedding has {rows} rows")


def _broken_tokenizer(source: Path | bytes) -> str | None:
    """Why tokenizer.json is none: ids that two tokens have, merges of what is no piece."""
    try:
        content = as_json(source, "tokenizer.json")
        tokens_of({"tokenizer.json": source})
    except InputError as error:
        return error.message
    model = content.get("model")
    if not isinstance(model, dict):
        return "has no model"
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict):
        return None if isinstance(vocabulary, list) else "its model has no vocabulary"
    if len(set(vocabulary.values())) != len(vocabulary):
        return "two tokens have one id"
    if model.get("type") == "BPE" and not merges and len(vocabulary) > 256:
        return "a BPE vocabulary without merges"
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges or [])
    lost = next((pair for pair in pairs if any(part not in vocabulary for part in pair)), None)
    return None if lost is None else f"merges {' and '.join(map(str, lost))!r:.60}, which are no pieces"


# --- folders of Hugging Face -----------------------------------------------------------------------------


def dtype_of(checkpoint: Checkpoint) -> str | None:
    """The float dtype of most values."""
    counts: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
    most = max(counts, key=lambda name: counts[name], default=None)
    return most if most in FLOAT_DTYPES else None
