# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a GGUF file as Hugging Face files: tokenizer.json, its config, the generation config.

A GGUF stores the vocabulary, and the merges or scores. How text is split before the merges is only a *name*
there, `tokenizer.ggml.pre`; `PRE_TOKENIZERS` says what the names mean. A wrong split is silent, so an unknown
name is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lrconvert.checkpoint.gguf_header import GgufArray, GgufHeader
from lrconvert.errors import InputError, UnsupportedError, require

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
MAX_PIECE = 512  # characters of a SentencePiece piece; the time to find its merges grows with the square
SPACE = "\u2581"  # SentencePiece's visible space
# Texts that llama.cpp takes for special tokens wherever a vocabulary has them, also as ordinary pieces: it gives them
# that type when it loads a file ("control-looking token", src/llama-vocab.cpp, `llama_vocab::impl::load`, 2026).
_SPECIAL = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜>
    <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|>
    <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|>
    <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|>
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
"""
SPECIAL_TEXTS = frozenset(_SPECIAL.split())

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE vocabulary splits text before its merges apply."""

    splits: tuple[str, ...] = ()  # regular expressions, applied one after the other
    digits: bool = False  # every digit on its own, first of all
    gpt2_words: bool = False  # GPT-2's regular expression, last of all
    whole_words: bool = False  # a piece that is in the vocabulary is taken before any merge
    nfc: bool = False  # text is normalised to NFC; llama.cpp leaves that out
    adds_bos: bool = False  # where tokenizer.ggml.add_bos_token is missing


_GPT2 = PreTokenizer(gpt2_words=True)
_SMOLLM = PreTokenizer(digits=True, gpt2_words=True)
_LLAMA3 = PreTokenizer(
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",),
    whole_words=True,
    adds_bos=True,
)
_QWEN2 = PreTokenizer(
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",), nfc=True
)
_TEKKEN = PreTokenizer(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
    ),
    whole_words=True,
    adds_bos=True,
)
_GPT4O = PreTokenizer(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
    ),
)
_DEEPSEEK3 = PreTokenizer(
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}",
    ),
)
# llama.cpp's own fallback; no model was trained with it, but it is what files that say "default" run with.
_DEFAULT = PreTokenizer(
    (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "dbrx": PreTokenizer(_LLAMA3.splits),  # Phi-4
    "default": _DEFAULT,
    "deepseek-r1-qwen": _QWEN2,
    "deepseek-v3": _DEEPSEEK3,
    "falcon3": _LLAMA3,
    "gpt-2": _GPT2,
    "gpt-4o": _GPT4O,  # Phi-4-mini
    "granite-embed-multi-97m": replace(_GPT4O, whole_words=True),  # the same with marks, of an encoder of that name
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "phi-2": _GPT2,
    "qwen2": _QWEN2,  # Qwen2, 2.5 and 3
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "tekken": _TEKKEN,  # Mistral Nemo and later
}


def side_files(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Every file besides config and weights, as deterministic bytes. A file without vocabulary gives none
    of a tokenizer. Raises `UnsupportedError` for a kind of tokenizer or a `pre` that isn't known."""
    files: dict[str, bytes] = {}
    vocabulary = _Vocabulary(header)
    if vocabulary.kind is not None:
        files["tokenizer.json"] = vocabulary.tokenizer_json().encode()
        files["tokenizer_config.json"] = _json(vocabulary.config(config["max_position_embeddings"]))
    if generation := vocabulary.generation_config():
        files["generation_config.json"] = _json(generation)
    if note := _licence_note(header):
        files["LICENSE-NOTE.txt"] = note.encode()
    return dict(sorted(files.items()))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _licence_note(header: GgufHeader) -> str:
    keys = ("general.license", "general.license.name", "general.license.link", "general.source.url")
    stated = [f"{key}: {header.metadata[key]}" for key in keys if isinstance(header.metadata.get(key), str)]
    if not any(line.startswith("general.license") for line in stated):
        return ""
    return "\n".join(["The GGUF file that this model was read from states:", *stated, ""])


class _Vocabulary:
    """The `tokenizer.*` metadata of a file, checked."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        kind = self._get("tokenizer.ggml.model", str)
        self.kind = None if kind in (None, "none", "no_vocab") else kind
        if self.kind not in (None, "gpt2", "llama"):
            raise UnsupportedError(
                f"{header.path}: tokenizer.ggml.model is {self.kind!r:.60}, which can't be rebuilt",
                remedy="Known: gpt2 (byte-level BPE), llama (SentencePiece BPE)",
            )
        self.is_bpe = self.kind == "gpt2"
        self.tokens: list[str] = self._items("tokenizer.ggml.tokens") if self.kind else []
        self.types: list[int] = []
        if self.kind:
            self.types = self._items("tokenizer.ggml.token_type", [NORMAL] * len(self.tokens))
        self.pre = self._pre_tokenizer() if self.is_bpe else None
        # llama.cpp's defaults for SentencePiece files that state none
        spm = {"bos": 1, "eos": 2, "unknown": 0} if self.kind == "llama" else {}
        self.ids: dict[str, int] = {}
        for name in ("bos", "eos", "unknown", "padding"):
            token = self._get(f"tokenizer.ggml.{name}_token_id", int)
            token = spm.get(name) if token is None else token
            if token is None:
                continue
            if self.kind and token >= len(self.tokens):
                raise InputError(
                    f"{header.path}: tokenizer.ggml.{name}_token_id is {token}; there are {len(self.tokens)} tokens"
                )
            self.ids[name] = token
        adds_bos = self._get("tokenizer.ggml.add_bos_token", bool)
        if adds_bos is None:
            adds_bos = self.pre.adds_bos if self.pre else self.kind == "llama"
        self.adds_bos = adds_bos and "bos" in self.ids
        self.adds_eos = bool(self._get("tokenizer.ggml.add_eos_token", bool)) and "eos" in self.ids
        prefix = self._get("tokenizer.ggml.add_space_prefix", bool)
        self.adds_space = not self.is_bpe if prefix is None else prefix

    def _get(self, key: str, kind: type) -> Any:
        value = self.header.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
            raise InputError(f"{self.header.path}: {key} is {value!r:.60}; {kind.__name__} is needed")
        return value

    def _items(self, key: str, default: list[Any] | None = None) -> list[Any]:
        """An array with one item for every token; `default` where it is missing."""
        items = self.header.array(key)
        items = default if items is None else items
        if not items:
            raise InputError(f"{self.header.path}: {key} is missing or empty")
        text = key.endswith(("tokens", "merges"))
        if not isinstance(items[0], str if text else (int, float)) or isinstance(items[0], bool):
            raise InputError(f"{self.header.path}: {key} holds {type(items[0]).__name__} items")
        if not text and len(items) != len(self.tokens):
            raise InputError(f"{self.header.path}: {key} has {len(items)} items for {len(self.tokens)} tokens")
        return items

    def _pre_tokenizer(self) -> PreTokenizer:
        name = self._get("tokenizer.ggml.pre", str)
        if name not in PRE_TOKENIZERS:
            raise UnsupportedError(
                f"{self.header.path}: tokenizer.ggml.pre is {'missing' if name is None else repr(name)[:60]}, so the "
                "pre-tokenizer isn't known, and a wrong guess would go unnoticed",
                remedy=f"Known: {', '.join(PRE_TOKENIZERS)}",
            )
        return PRE_TOKENIZERS[name]

    # --- tokenizer.json ----------------------------------------------------------------------------------

    def tokenizer_json(self) -> str:
        tokenizers = require("tokenizers", "hf", "rebuilding a tokenizer from GGUF")
        try:
            tokenizer = self._byte_level(tokenizers) if self.is_bpe else self._sentencepiece(tokenizers)
            tokenizer.add_special_tokens(self._added(tokenizers, special=True))
            tokenizer.add_tokens(self._added(tokenizers, special=False))
        except InputError:
            raise
        except Exception as error:  # what the library raises for merges of unknown tokens and the like
            raise InputError(
                f"{self.header.path}: no tokenizer can be built from its vocabulary ({str(error)!r:.200})"
            ) from error
        if self.adds_bos or self.adds_eos:
            tokenizer.post_processor = self._template(tokenizers)
        return tokenizer.to_str(pretty=True) + "\n"

    def _ids_by_token(self) -> dict[str, int]:
        # Of equal tokens the last one counts, as in llama.cpp. An empty one can't be a key there or here.
        return {token or f"[EMPTY_{index}]": index for index, token in enumerate(self.tokens)}

    def _byte_level(self, tokenizers: Any) -> Any:
        assert self.pre is not None
        pre, steps = tokenizers.pre_tokenizers, []
        if self.pre.digits:
            steps.append(pre.Digits(individual_digits=True))
        steps += [pre.Split(tokenizers.Regex(split), behavior="isolated") for split in self.pre.splits]
        steps.append(pre.ByteLevel(add_prefix_space=self.adds_space, use_regex=self.pre.gpt2_words))
        merges = []
        for index, merge in enumerate(self.header.array("tokenizer.ggml.merges") or []):
            left, separator, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
            if not separator or not left or not right or " " in right:
                raise InputError(
                    f"{self.header.path}: tokenizer.ggml.merges[{index}] is {merge!r:.60}; two tokens are needed"
                )
            merges.append((left, right))
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(self._ids_by_token(), merges, ignore_merges=self.pre.whole_words)
        )
        if self.pre.nfc:
            tokenizer.normalizer = tokenizers.normalizers.NFC()
        tokenizer.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self, tokenizers: Any) -> Any:
        """SentencePiece BPE as merges, with Llama 2's normaliser: the space is put before the text and after
        every special token, as in llama.cpp."""
        normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                self._ids_by_token(),
                self._merges_from_scores(),
                unk_token=self.tokens[self.ids["unknown"]],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        prepend = [normalizers.Prepend(SPACE)] if self.adds_space else []
        strip = [decoders.Strip(" ", 1, 0)] if self.adds_space else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return tokenizer

    def _merges_from_scores(self) -> list[tuple[str, str]]:
        """Every way to put a token together from two others, the best-scored tokens first. Of those that are also
        found in the text as it is (Gemma's runs of spaces) too, as llama.cpp joins them."""
        scores = self._items("tokenizer.ggml.scores")
        joined = (NORMAL, USER_DEFINED)
        pieces = {token: index for index, token in enumerate(self.tokens) if token and self.types[index] in joined}
        merges = []
        for token, index in pieces.items():
            if len(token) > MAX_PIECE:
                raise InputError(
                    f"{self.header.path}: tokenizer.ggml.tokens[{index}] has {len(token)} characters; at most "
                    f"{MAX_PIECE} are read"
                )
            for cut in range(1, len(token)):
                left, right = pieces.get(token[:cut]), pieces.get(token[cut:])
                if left is not None and right is not None:
                    merges.append((-scores[index], index, left, right))
        merges.sort()
        return [(self.tokens[left], self.tokens[right]) for _, _, left, right in merges]

    def _added(self, tokenizers: Any, *, special: bool) -> list[Any]:
        wanted = {index for index, kind in enumerate(self.types) if kind == (CONTROL if special else USER_DEFINED)}
        if special:
            wanted |= set(self.ids.values())
        # Phi-3's template puts a line end after its special tokens, which they take in. GGUF has no key for
        # that: llama.cpp knows it from the model's name (a file of arch phi3 with SentencePiece is such a model).
        strips = self.header.metadata.get("general.architecture") == "phi3" and not self.is_bpe and special
        keeps = ("<unk>", "<s>", "<|endoftext|>")
        return [
            tokenizers.AddedToken(
                self.tokens[index],
                special=special,
                normalized=False,
                rstrip=strips and self.tokens[index] not in keeps,
            )
            for index in sorted(wanted)
            if self.tokens[index]
        ]

    def _template(self, tokenizers: Any) -> Any:
        bos, eos = (self._token(name) for name in ("bos", "eos"))
        start, end = f"{bos}:0 " if self.adds_bos else "", f" {eos}:0" if self.adds_eos else ""
        start_pair, end_pair = (part.replace(":0", ":1") for part in (start, end))
        used = [(self._token(name), self.ids[name]) for name in ("bos", "eos") if getattr(self, f"adds_{name}")]
        return tokenizers.processors.TemplateProcessing(
            single=f"{start}$A:0{end}", pair=f"{start}$A:0{end} {start_pair}$B:1{end_pair}", special_tokens=used
        )

    # --- the configs -------------------------------------------------------------------------------------

    def _token(self, name: str) -> str | None:
        return self.tokens[self.ids[name]] if name in self.ids else None

    def config(self, window: int) -> dict[str, Any]:
        """tokenizer_config.json. `add_*_token` repeat the template of tokenizer.json, for transformers 5."""
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        config: dict[str, Any] = {
            "add_bos_token": self.adds_bos,
            "add_eos_token": self.adds_eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": window,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        config |= {names[name]: self._token(name) for name in names if name in self.ids}
        if (template := self._chat_template()) is not None:
            config["chat_template"] = template
        return config

    def _chat_template(self) -> str | list[dict[str, str]] | None:
        """The chat template; a list of named ones where the file has several, as transformers spells it."""
        default = self._get("tokenizer.chat_template", str)
        names = self.header.array("tokenizer.chat_templates") if self._has_array("tokenizer.chat_templates") else []
        named = {str(name): self._get(f"tokenizer.chat_template.{name}", str) for name in names or []}
        if not any(named.values()):
            return default
        every = {"default": default, **named}
        return [{"name": name, "template": template} for name, template in every.items() if template]

    def _has_array(self, key: str) -> bool:
        return isinstance(self.header.metadata.get(key), GgufArray)

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json: the ids; every end (of text, of turn, of message) ends a generation."""
        config: dict[str, Any] = {}
        ends = [self.ids.get("eos")] + [self._get(f"tokenizer.ggml.{end}_token_id", int) for end in ("eot", "eom")]
        unique = list(dict.fromkeys(end for end in ends if end is not None))
        if "bos" in self.ids:
            config["bos_token_id"] = self.ids["bos"]
        if unique:
            config["eos_token_id"] = unique if len(unique) > 1 else unique[0]
        if "padding" in self.ids:
            config["pad_token_id"] = self.ids["padding"]
        return config
