# SPDX-License-Identifier: Apache-2.0
"""What the tokenizer files of a Hugging Face folder say together, checked.

tokenizer.json holds the vocabulary; transformers lays tokenizer_config.json over it (flags of added tokens, names of
the special ones), in older folders special_tokens_map.json and added_tokens.json too. The order here is that of
transformers (`PreTrainedTokenizerBase._from_pretrained`, 4.57 and 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lrconvert.checkpoint.base import MAX_TOKENIZER_BYTES, read_json_source
from lrconvert.errors import InputError

MAX_TEMPLATE_BYTES = 4 * 2**20
MAX_MODEL_BYTES = 32 * 2**20  # tokenizer.model: 4 MB for 256,000 pieces

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # SPECIAL_TOKENS_ATTRIBUTES of transformers


@dataclass(frozen=True)
class Added:
    """An added token: matched in the text before anything else."""

    content: str
    id: int
    special: bool
    normalized: bool  # looked for in the normalised text, not in the text as it is
    rstrip: bool  # takes in the spaces behind it
    other_limits: bool  # takes in those before it, or stands for whole words only


class TokenizerFiles:
    """The side files of a model, read once each. Errors name the file and the key."""

    def __init__(self, side_files: Mapping[str, Path | bytes]) -> None:
        self.side_files = side_files

    def __contains__(self, name: str) -> bool:
        return name in self.side_files

    def where(self, name: str) -> str:
        source = self.side_files.get(name)
        return str(source) if isinstance(source, Path) else name

    def json(self, name: str, limit: int = MAX_TEMPLATE_BYTES) -> dict[str, Any] | None:
        source = self.side_files.get(name)
        return None if source is None else read_json_source(source, name, limit)

    def data(self, name: str, limit: int) -> bytes:
        source = self.side_files[name]
        if isinstance(source, bytes):
            return source
        try:
            if not source.is_file():  # a pipe or a device has no end
                raise InputError(f"{source}: not a file")
            if (size := source.stat().st_size) > limit:
                raise InputError(f"{source}: {size} bytes; at most {limit} are read")
            return source.read_bytes()
        except OSError as error:
            raise InputError(f"{source}: can't be read ({error.strerror or error})") from error

    @cached_property
    def tokenizer(self) -> dict[str, Any] | None:
        """tokenizer.json."""
        return self.json("tokenizer.json", MAX_TOKENIZER_BYTES)

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, under special_tokens_map.json where transformers reads that: in folders of the time
        before added_tokens_decoder."""
        config = self.json("tokenizer_config.json", MAX_TOKENIZER_BYTES) or {}
        if "added_tokens_decoder" in config:
            return config
        return {**config, **(self.json("special_tokens_map.json") or {})}

    @cached_property
    def generation(self) -> dict[str, Any]:
        return self.json("generation_config.json") or {}

    def special(self) -> dict[str, str]:
        """The tokens with a name, in the order of transformers: bos, eos, … and whatever else ends in `_token`."""
        named = [key.removesuffix("_token") for key in self.config if key.endswith("_token")]
        order = {name: place for place, name in enumerate(_NAMED)}
        named.sort(key=lambda name: order.get(name, len(order)))
        contents = {name: _content(self.config[f"{name}_token"]) for name in named}
        return {name: content for name, content in contents.items() if content}

    def flag(self, key: str) -> bool | None:
        value = self.config.get(key)
        return value if isinstance(value, bool) else None

    # --- added tokens ------------------------------------------------------------------------------------

    def added(self, vocab: Mapping[str, int]) -> tuple[list[Added], list[str]]:
        """Every added token, and notes. `vocab`: the ids of the vocabulary itself.

        Beside tokenizer.json the id that a file states is no fact: the tokenizers library counts on from the
        vocabulary, in the order of the list, and so transformers does. Without it the stated ids hold.
        """
        named = set(self.special().values())
        found: dict[str, Added] = {}
        top, strays = -1, []
        for content, stated, entry in self._stated():
            if entry is None and content in found:
                continue
            entry = {"special": True} if entry is None else entry
            known = found.get(content)
            index = known.id if known else vocab.get(content)
            if index is None and self.tokenizer is None:
                index = stated
            if index is None:
                index = top + 1 if top >= len(vocab) or not vocab else len(vocab)
            if stated is not None and stated != index:
                strays.append(f"{content!r:.40} {index}, not {stated}")
            found[content] = Added(
                content,
                index,
                special=entry.get("special") is True or content in named,
                normalized=entry.get("normalized") is True,
                rstrip=entry.get("rstrip") is True,
                other_limits=entry.get("lstrip") is True or entry.get("single_word") is True,
            )
            top = max(top, index)
        notes = []
        if strays:
            notes.append(
                f"{len(strays)} added tokens have other ids than the files state, as the tokenizers library gives them "
                f"({strays[0]})"
            )
        return list(found.values()), notes

    def _stated(self) -> Iterator[tuple[str, int | None, Mapping[str, Any] | None]]:
        """Content, id and flags of added tokens as every file states them, later ones over earlier ones. Tokens that
        are only named come last, without flags."""
        where = self.where("tokenizer.json")
        listed = (self.tokenizer or {}).get("added_tokens") or []
        if not isinstance(listed, list):
            raise InputError(f"{where}: added_tokens is {listed!r:.60}; a list is needed")
        for position, entry in enumerate(listed):
            yield _token(entry, f"{where}: added_tokens[{position}]")
        where = self.where("tokenizer_config.json")
        decoder = self.config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            for key in sorted(decoder, key=lambda key: (len(key), key)):
                place = f"{where}: added_tokens_decoder.{key:.20}"
                if not key.isascii() or not key.isdigit() or len(key) > 10:
                    raise InputError(f"{place}: an id is needed")
                content, _, entry = _token(decoder[key], place)
                yield content, int(key), entry
        elif decoder is not None:
            raise InputError(f"{where}: added_tokens_decoder is {decoder!r:.60}; an object is needed")
        else:
            yield from self._legacy()
        for content in [*self.special().values(), *self._extra_special()]:
            yield content, None, None

    def _legacy(self) -> Iterator[tuple[str, int | None, Mapping[str, Any]]]:
        special = set(self._extra_special())
        listed = (self.tokenizer or {}).get("added_tokens") or []
        known = {entry.get("content") for entry in listed if isinstance(entry, dict)}
        for content, index in (self.json("added_tokens.json") or {}).items():
            place = f"{self.where('added_tokens.json')}: {content!r:.40}"
            if content and content not in known:
                yield (
                    content,
                    _index(index, place),
                    {"special": content in special, "normalized": content not in special},
                )

    def _extra_special(self) -> list[str]:
        found = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = self.config.get(key) or []
            items = value.values() if isinstance(value, dict) else value
            if not isinstance(value, list | dict):
                raise InputError(f"{self.where('tokenizer_config.json')}: {key} is {value!r:.60}; a list is needed")
            found += [content for item in items if (content := _content(item))]
        return found

    # --- chat templates ----------------------------------------------------------------------------------

    def chat_templates(self) -> dict[str, str]:
        """By name; the one that is used unasked is `default`. Files win over tokenizer_config.json."""
        files = {}
        if "chat_template.jinja" in self:
            files["default"] = self._text("chat_template.jinja")
        for name in self.side_files:
            folder, _, file = name.rpartition("/")
            if folder == "additional_chat_templates" and file.endswith(".jinja"):
                files[file.removesuffix(".jinja")] = self._text(name)
        if files:
            return files
        for name in ("tokenizer_config.json", "chat_template.json"):
            source = self.config if name == "tokenizer_config.json" else self.json(name) or {}
            if (value := source.get("chat_template")) is not None:
                return _templates(value, f"{self.where(name)}: chat_template")
        return {}

    def _text(self, name: str) -> str:
        try:
            return self.data(name, MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where(name)}: not UTF-8 ({error})") from error


def _content(value: Any) -> str | None:
    """The text of a special token, which is a string or an AddedToken as JSON; None for anything else."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _index(value: Any, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{place} has the id {value!r:.40}; a whole number of 0 or more is needed")
    return value


def _token(entry: Any, place: str) -> tuple[str, int | None, Mapping[str, Any]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
        raise InputError(f"{place} is {entry!r:.60}; a token with content is needed")
    return entry["content"], _index(entry["id"], place) if "id" in entry else None, entry


def _templates(value: Any, place: str) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for item in value.items() for part in item):
        raise InputError(f"{place} is {value!r:.60}; a text, or a list of names with templates, is needed")
    return value
