# SPDX-License-Identifier: Apache-2.0
"""The `tokenizer.*` metadata of a GGUF from the files that lie beside a Hugging Face model.

The opposite direction of `checkpoint.gguf_tokenizer`. What llama.cpp reads is in src/llama-vocab.cpp of
ggml-org/llama.cpp (`llama_vocab::impl::load` and `tokenize`); what transformers computes is tokenizer.json, with
tokenizer_config.json on top (`tokenizer_files`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.checkpoint.gguf_tokenizer import CONTROL, NORMAL, SPACE, SPECIAL_TEXTS, UNKNOWN, USER_DEFINED
from lrconvert.errors import InputError, UnsupportedError, UsageError
from lrconvert.targets.gguf.token_table import UNUSED, TokenTable, from_tokenizer_json, from_tokenizer_model
from lrconvert.targets.gguf.tokenizer_files import TokenizerFiles

MAX_TOKENS = 2**22

# Scores that llama.cpp's own converter gives to tokens which are never made by joining.
_SCORES = {UNUSED: -10000.0, USER_DEFINED: -1000.0}
# The token that ends a generation where no key names one; there is no way to say that none does.
_DEFAULT_EOS = {"gpt2": 11, "llama": 2}
# Some of the texts that end a generation without a key (three ids have one: eos, eot, eom).
_KNOWN_ENDS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "</s>"}
)
# In a model whose general.name contains phi-3 or phi3, special tokens take in the space behind them, but for the
# first three. It won't load where one of the four is missing.
_PHI3_KEEPS, _PHI3_NEEDS = {"<unk>", "<s>", "<|endoftext|>"}, {"<unk>", "<s>", "<|endoftext|>", "</s>"}
# Files of tokenizers whose rules are a program of some library.
_OTHER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class Vocabulary:
    """Metadata in the order in which it is written, and notes on what it can't say.

    An int is a uint32, a float a float32; a list of int is of int32, a list of float of float32.
    """

    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()
    strips: bool = False  # llama.cpp has to be told, by phi-3 in general.name, that special tokens take in space


def vocabulary(
    side_files: Mapping[str, Path | bytes], config: Mapping[str, Any], *, pre: str | None = None
) -> Vocabulary:
    """The metadata of the vocabulary in `side_files`, for a model with `config`.

    `pre` names the pre-tokenizer in place of the one found in the structure of tokenizer.json. Without any tokenizer
    the model is written as one without vocabulary; llama.cpp then takes the number of tokens from the key
    `{architecture}.vocab_size`.

    Raises `InputError` for damaged files, `UnsupportedError` for tokenizers that llama.cpp can't be told about, and
    `UsageError` for a `pre` that doesn't apply.
    """
    files, rows = TokenizerFiles(side_files), _rows(config)
    if files.tokenizer is not None:
        table = from_tokenizer_json(files, rows, pre)
    elif "tokenizer.model" in files:
        table = from_tokenizer_model(files, rows)
    else:
        return _without(files, pre)
    if pre is not None and table.kind != "gpt2":
        raise UsageError(f"--tokenizer-pre {pre}: this vocabulary is SentencePiece, which llama.cpp splits in one way")
    tokens, types, scores = _arrays(table, rows, files)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": table.kind,
        "tokenizer.ggml.pre": table.pre,
        "tokenizer.ggml.tokens": tokens,
    }
    if scores is not None:
        metadata["tokenizer.ggml.scores"] = scores
    metadata["tokenizer.ggml.token_type"] = types
    table.notes += _taken_for_special(tokens, types)
    if table.merges is not None:
        metadata["tokenizer.ggml.merges"] = table.merges
    metadata |= _special(table, files, config, tokens)
    metadata["tokenizer.ggml.add_space_prefix"] = table.adds_space
    metadata |= _chat_templates(files)
    strips = _strips(table)
    return Vocabulary(metadata, tuple(dict.fromkeys(table.notes)), strips)


def _without(files: TokenizerFiles, pre: str | None) -> Vocabulary:
    if others := [name for name in _OTHER_FILES if name in files]:
        raise UnsupportedError(
            f"{files.where(others[0])}: a tokenizer without tokenizer.json, which says how text is split",
            remedy="Load it with transformers' AutoTokenizer and save it again; that writes tokenizer.json",
        )
    if pre is not None:
        raise UsageError(f"--tokenizer-pre {pre}: the model has no tokenizer")
    note = "the model has no tokenizer files: the GGUF has no vocabulary and accepts token ids only"
    return Vocabulary({"tokenizer.ggml.model": "none"}, (note,))


def _rows(config: Mapping[str, Any]) -> int:
    """Of the embedding; llama.cpp wants as many tokens."""
    rows = config.get("vocab_size")
    if not isinstance(rows, int) or isinstance(rows, bool) or not 0 < rows <= MAX_TOKENS:
        raise InputError(f"config.json: vocab_size is {rows!r:.40}; a number from 1 to {MAX_TOKENS} is needed")
    return rows


def _arrays(table: TokenTable, rows: int, files: TokenizerFiles) -> tuple[list[str], list[int], list[float] | None]:
    """Text, type and score of every row of the embedding."""
    where = files.where("tokenizer.json" if files.tokenizer is not None else "tokenizer.model")
    types = [UNUSED] * rows
    by_id: dict[int, str] = {}
    for token, index in table.vocab.items():
        if index in by_id:
            raise InputError(f"{where}: {by_id[index]!r:.40} and {token!r:.40} have the id {index}")
        by_id[index] = token
        types[index] = table.types.get(index, NORMAL)
    scores = None
    if table.scores is not None:
        scores = [table.scores.get(by_id.get(index, ""), 0.0) for index in range(rows)]
    for added in table.added:
        types[added.id] = CONTROL if added.special else USER_DEFINED
    if table.kind == "llama" and "unk" in table.special:
        types[table.special["unk"]] = UNKNOWN
    if table.kind == "llama":  # llama.cpp looks for these in the text as it is, before it makes spaces visible
        raw = {token.id for token in table.added if not token.normalized}
        found = (index for index, kind in enumerate(types) if kind == USER_DEFINED and index not in raw)
        by_id |= {index: by_id[index].replace(SPACE, " ") for index in found}
    for index in [index for index, text in by_id.items() if "\0" in text]:
        table.notes.append(f"token {index} contains a zero byte, where llama.cpp would end it: left out")
        del by_id[index]
        types[index] = UNUSED
    if scores is not None:
        apart = [kind in _SCORES and by_id.get(index) not in table.made for index, kind in enumerate(types)]
        scores = [_SCORES[kind] if it else score for it, kind, score in zip(apart, types, scores, strict=True)]
    taken = set(by_id.values())
    tokens = [by_id.get(index) or _filler(index, taken) for index in range(rows)]
    _check_text(tokens, f"{where}: a token")
    if len(set(tokens)) != rows:
        raise InputError(f"{where}: two tokens have the same text, which llama.cpp refuses")
    return tokens, types, scores


def _taken_for_special(tokens: list[str], types: list[int]) -> list[str]:
    """A note on ordinary pieces that llama.cpp finds before anything else, as if they were added tokens."""
    taken = [text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL and text in SPECIAL_TEXTS]
    if not taken:
        return []
    return [f"llama.cpp takes {', '.join(map(repr, taken))[:200]} for special tokens, tokenizer.json for ordinary text"]


def _filler(index: int, taken: set[str]) -> str:
    """The text of a row that no token has; that of llama.cpp's own converter."""
    text = f"[PAD{index}]"
    while text in taken:
        text = f"[{text}]"
    return text


def _check_text(texts: Iterable[str], what: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not text ({error.reason})") from error


def _strips(table: TokenTable) -> bool:
    """Whether special tokens take in the space behind them just as llama.cpp computes it for Phi-3."""
    taking = {token.content for token in table.added if token.rstrip}
    every = {token.content for token in table.added}
    if taking and table.vocab.keys() >= _PHI3_NEEDS and taking == every - _PHI3_KEEPS:
        return True
    if taking or any(token.other_limits for token in table.added):
        table.notes.append(
            "some added tokens take in the spaces around them or stand for whole words only (lstrip, rstrip, "
            "single_word): llama.cpp doesn't know that"
        )
    return False


# --- special tokens ---------------------------------------------------------------------------------------


def _special(table: TokenTable, files: TokenizerFiles, config: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The ids of special tokens, and which of them surround every text."""
    ids = _named_ids(table, files, config)
    ends = _ends(files, config, len(tokens))
    adds = _surrounding(table, files, ids)
    if "eos" not in ids and ends:
        ids["eos"] = ends[0]
    if "eos" not in ids:
        taken = _DEFAULT_EOS[table.kind]
        text = f" ({tokens[taken]!r:.40})" if taken < len(tokens) else ""
        table.notes.append(f"no token ends a text; llama.cpp ends a generation at token {taken} then{text}")
    ids |= _turn_ends([end for end in ends if end != ids.get("eos")], tokens, table.notes)
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
    metadata: dict[str, Any] = {
        f"tokenizer.ggml.{key}_token_id": ids[name] for name, key in keys.items() if name in ids
    }
    return metadata | {f"tokenizer.ggml.add_{name}_token": adds[name] and name in ids for name in ("bos", "eos")}


def _named_ids(table: TokenTable, files: TokenizerFiles, config: Mapping[str, Any]) -> dict[str, int]:
    """The ids of bos, eos, unk and pad: tokenizer_config.json names them, else the vocabulary itself or config.json."""
    names, ids, rows = files.special(), {}, set(table.vocab.values())
    for name in ("bos", "eos", "unk", "pad"):
        stated = _ids(config.get(f"{name}_token_id"), f"config.json: {name}_token_id")
        candidates = [table.vocab.get(names.get(name, "")), table.special.get(name), *(i for i in stated if i in rows)]
        if found := [index for index in candidates if index is not None]:
            ids[name] = found[0]
    return ids


def _ids(value: Any, place: str) -> list[int]:
    """The ids of a config's key, which is a number, a list or null."""
    items = value if isinstance(value, list) else [value]
    if not all(item is None or (isinstance(item, int) and not isinstance(item, bool)) for item in items):
        raise InputError(f"{place} is {value!r:.60}; an id or a list of ids is needed")
    return list(dict.fromkeys(item for item in items if item is not None))


def _ends(files: TokenizerFiles, config: Mapping[str, Any], rows: int) -> list[int]:
    """Every token that ends a generation. One without a row (-1, often) is never generated."""
    for name, source in (("generation_config.json", files.generation), ("config.json", config)):
        if source.get("eos_token_id") is not None:
            found = _ids(source["eos_token_id"], f"{files.where(name)}: eos_token_id")
            return [end for end in found if 0 <= end < rows]
    return []


def _turn_ends(ends: list[int], tokens: list[str], notes: list[str]) -> dict[str, int]:
    """Ends beyond eos: two have keys; more of them have to be texts that llama.cpp knows."""
    messages = [end for end in ends if tokens[end] == "<|eom_id|>"]
    found = {"eom": messages[0]} if messages else {}
    # The other keys go to those that it doesn't know by their text, if there are any.
    rest = sorted((end for end in ends if end not in messages), key=lambda end: tokens[end] in _KNOWN_ENDS)
    for key in ("eot", "eom"):
        if rest and key not in found:
            found[key] = rest.pop(0)
    if lost := [tokens[end] for end in rest if tokens[end] not in _KNOWN_ENDS]:
        notes.append(f"{', '.join(lost)[:200]} end a generation, but a GGUF names no more than three such tokens")
    return found


def _surrounding(table: TokenTable, files: TokenizerFiles, ids: dict[str, int]) -> dict[str, bool]:
    """Whether bos is put before and eos after every text; `ids` takes the bos of a template.

    A template in tokenizer.json decides. Where there is none, add_bos_token of tokenizer_config.json does:
    transformers 5 ignores it beside a tokenizer.json, transformers 4 obeys it for Llama's class.
    """
    stated = {name: files.flag(f"add_{name}_token") for name in ("bos", "eos")}
    where = files.where("tokenizer.json")
    template = _template((files.tokenizer or {}).get("post_processor"), where, table.notes)
    if template is None:
        return {name: bool(table.adds.get(name) if flag is None else flag) for name, flag in stated.items()}
    first, last = template
    if unknown := {index for index in template if index is not None} - set(table.vocab.values()):
        raise InputError(f"{where}: post_processor adds token {min(unknown)}, which does not exist")
    if first is not None and first != ids.get("bos"):
        if "bos" in ids:
            table.notes.append(f"tokenizer.json begins every text with token {first}, not with bos; it becomes bos")
        ids["bos"] = first
    if last is not None and last != ids.get("eos"):
        table.notes.append(f"tokenizer.json ends every text with token {last}, not with eos: llama.cpp adds none")
        last = None
    adds = {"bos": first is not None, "eos": last is not None}
    for name, flag in stated.items():
        if flag is not None and flag != adds[name]:
            table.notes.append(
                f"tokenizer_config.json has add_{name}_token {str(flag).lower()}, the template of tokenizer.json says "
                "otherwise and is followed, as in transformers 5"
            )
    return adds


def _template(processor: Any, where: str, notes: list[str]) -> tuple[int | None, int | None] | None:
    """The tokens before and after every text; None where no template says."""
    if not isinstance(processor, dict):
        return None
    kind = processor.get("type")
    if kind == "Sequence":
        inner = processor.get("processors")
        found = [_template(step, where, notes) for step in inner] if isinstance(inner, list) else []
        return next((template for template in found if template is not None), None)
    if kind != "TemplateProcessing":
        if kind != "ByteLevel":
            notes.append(
                f"tokenizer.json's post_processor {kind!r:.40} has no equivalent in llama.cpp, which adds nothing"
            )
        return None
    single, known = processor.get("single"), processor.get("special_tokens")
    items = single if isinstance(single, list) else []
    texts = [position for position, item in enumerate(items) if isinstance(item, dict) and "Sequence" in item]
    if len(texts) != 1 or texts[0] > 1 or len(items) - texts[0] > 2:
        notes.append("tokenizer.json adds more than a token before and one after a text: llama.cpp adds none of them")
        return None, None
    before, after = items[: texts[0]], items[texts[0] + 1 :]
    return _template_id(before, known, where), _template_id(after, known, where)


def _template_id(items: list[Any], known: Any, where: str) -> int | None:
    if not items:
        return None
    try:
        ids = known[items[0]["SpecialToken"]["id"]]["ids"]
    except (KeyError, TypeError, IndexError):
        ids = None
    if not isinstance(ids, list) or len(ids) != 1 or not isinstance(ids[0], int) or isinstance(ids[0], bool):
        raise InputError(f"{where}: post_processor adds {items[0]!r:.60}, to which special_tokens gives no id")
    return ids[0]


# --- chat templates ---------------------------------------------------------------------------------------


def _chat_templates(files: TokenizerFiles) -> dict[str, Any]:
    """tokenizer.chat_template, and named ones with the list of their names. Names have letters and digits only, as
    gguf-py writes them."""
    templates = files.chat_templates()
    _check_text((text for item in templates.items() for text in item), "a chat template")
    metadata: dict[str, Any] = {}
    if templates.get("default"):
        metadata["tokenizer.chat_template"] = templates["default"]
    named = {}
    for name in sorted(templates.keys() - {"default"}):
        plain = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
        if plain and templates[name]:
            named[plain] = templates[name]
    metadata |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if named:
        metadata["tokenizer.chat_templates"] = list(named)
    return metadata
