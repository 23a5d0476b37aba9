# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers in the layouts of published ones, awkward texts, and a GGUF around a vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lrconvert.targets.gguf import sentencepiece

TEXTS = {
    "empty": "",
    "space": " ",
    "spaces": "  ",
    "newline": "\n",
    "tab": "\t",
    "blank lines": " \n \n\n  \n\t\t \r\n x",
    "plain": "Hello world",
    "space in front": " Hello",
    "runs of spaces": "hello  world   x    y",
    "space behind": "end with space ",
    "newline behind": "end with newline\n",
    "numbers": "1234567890 3.14159 1,000,000 ½ ²³ ٣٤ 一二三 Ⅻ 1st v1.2.3 0x1F",
    "contractions": "I'm you'RE WE'LL don'T it's 'S 'RE ''ll I'Ve",
    "emoji": "🚀😶\u200d🌫️✅🦙🦙 👩\u200d👩\u200d👧 🇩🇪",
    "east": "中文字符，日本語のテキスト。한국어 텍스트",
    "marks": "e\u0301te\u0301 A\u030a हिन्दी தமிழ் កាន់តែ",
    "accents": "naïve Ångström Žluťoučký",
    "code": "def f(x):\n    return x**2 # no\n\tif (a!=b) && c||d: {}[];",
    "right to left": "مرحبا بالعالم שלום עולם",
    "invisible": "zero\u200bwidth\u200cjoin\u200der\ufeff",
    "long word": "a" * 300,
    "longer word": "Supercalifragilisticexpialidocious" * 8,
    "camel case": "CamelCaseXMLHttpRequest iPhone",
    "punctuation": "!!!???...---===~~~```\"\"\"'''",
    "address": "http://example.com/a/b?c=d&e=f#g\nfoo@bar.com",
    "other spaces": "a\u00a0b\u2003c\u3000d\u2028e",
    "control characters": "\x00\x01\x1f\x7f",
    "private": "\U0010ffff\ue000\ufffd",
}
SPECIAL_TEXTS = {
    "special": "a<|eot_id|> b<tool>\n<|endoftext|>",
    "special in front": "<tool><tool> x",
}

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+X|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*X"
TEKKEN = _WORD.replace("X", "") + r"|\p{N}" + _END
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
GPT4O = _WORD.replace("X", CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _END


def split(*expressions: str, behavior: str = "isolated", invert: bool = False) -> Any:
    """The pre-tokenizer of most models since Llama 3."""
    steps = [pre_tokenizers.Split(Regex(expression), behavior, invert) for expression in expressions]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(pre: Any, *, nfc: bool = False, whole_words: bool = False) -> Tokenizer:
    """A small byte-level BPE with that pre-tokenizer. Its merges reach across every border between words, as they
    were trained without one: a border in another place shows."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|eot_id|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS.values(), *TEXTS.values(), " ".join(TEXTS.values())], trainer)
    tokenizer.pre_tokenizer = pre
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def two_letters(pre: Any, joined: str) -> Tokenizer:
    """The bytes, and merges that make nothing but `joined`, of two characters of two bytes each."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(joined)[0][0]
    vocab = {letter: index for index, letter in enumerate(sorted(letters))}
    merges = [(encoded[0], encoded[1]), (encoded[2], encoded[3]), (encoded[:2], encoded[2:])]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre
    return tokenizer


@dataclass(frozen=True)
class Style:
    """A way to split text that llama.cpp has a name for. `known`: the texts of which it makes other tokens."""

    pre: Any
    nfc: bool = False
    whole_words: bool = False
    known: tuple[str, ...] = ()

    def tokenizer(self) -> Tokenizer:
        return byte_level(self.pre, nfc=self.nfc, whole_words=self.whole_words)


_DIGITS = pre_tokenizers.Digits(individual_digits=True)
STYLES: Mapping[str, Style] = {
    "gpt-2": Style(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": Style(pre_tokenizers.Sequence([_DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    "llama-bpe": Style(split(LLAMA3), whole_words=True),
    "dbrx": Style(split(LLAMA3)),  # Phi-4
    "qwen2": Style(split(QWEN2), nfc=True, known=("marks",)),  # llama.cpp leaves out NFC
    # its expression splits at marks, which count as letters in the tokenizer's own
    "tekken": Style(split(TEKKEN), whole_words=True, known=("marks",)),
    "gpt-4o": Style(split(GPT4O, behavior="removed", invert=True), known=("marks",)),
    "granite-embed-multi-97m": Style(split(GPT4O), whole_words=True),
    "deepseek-v3": Style(split(*DEEPSEEK3)),
}

SPM_SPECIALS = ["<unk>", "<s>", "</s>"]
SPM_TEXT = (
    "the world is wide and the words are many; hello world, where are we? 12 34 1234 x = y  +   z\n\n\tthe end\n" * 2
    + " " * 12
    + "return the wide world\n"
    + " " * 8
    + "return the end\n"
)


def spm_pieces() -> list[str]:
    """Pieces as SentencePiece has them, best first: made by joining, then single characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*|[^▁]+"), "isolated")
    tokenizer.train_from_iterator(
        [SPM_TEXT, *SPM_TEXT.split("\n")], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return [*("".join(pair) for pair in model["merges"]), *(piece for piece in model["vocab"] if len(piece) == 1)]


def spm(
    normalizer: Any = None, pre: Any = None, *, every_pair: bool = True, runs: bool = False, **flags: bool
) -> Tokenizer:
    """SentencePiece BPE as transformers converts it: every pair whose joined text is a piece is a merge, the best piece
    first. Without `every_pair` it has one merge for every piece, like a vocabulary trained as merges. With `runs`,
    runs of spaces come first and are added tokens as well, as in Gemma's."""
    pieces = spm_pieces()
    spaces = ["▁" * count for count in range(12, 1, -1)] if runs else []
    pieces = [*spaces, *(piece for piece in pieces if piece not in spaces)]
    vocab = {piece: index for index, piece in enumerate([*SPM_SPECIALS, *sentencepiece.BYTES, *pieces])}
    merges = []
    for piece in pieces:
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
        merges += pairs if every_pair else pairs[:1]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    strip = [decoders.Strip(" ", 1, 0)] if pre is None else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    kept = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>")]
    tokenizer.add_special_tokens([*kept, AddedToken("</s>", special=True, normalized=False, **flags)])
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|eot_id|>", special=True, normalized=False, **flags)])
    tokenizer.add_tokens([AddedToken(run, special=False, normalized=False) for run in spaces])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False, **flags)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPM_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def files_of(tokenizer: Tokenizer, config: Mapping[str, Any] | None = None, **others: Any) -> dict[str, Path | bytes]:
    values = {"tokenizer_config": config or {}, **others}
    made = {f"{name}.json": json.dumps(value).encode() for name, value in values.items()}
    return {"tokenizer.json": tokenizer.to_str().encode(), **made}


def rows_of(tokenizer: Tokenizer, more: int = 5) -> dict[str, Any]:
    return {"vocab_size": tokenizer.get_vocab_size() + more}


def write_gguf(path: Path, metadata: Mapping[str, Any], name: str = "pico", rows: int | None = None) -> Path:
    """A model of one layer with that vocabulary."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_string("general.name", name)
    rows = rows or len(metadata["tokenizer.ggml.tokens"])
    numbers = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
        "rope.dimension_count": 32,
        "vocab_size": rows,
    }
    for key, number in numbers.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        adders = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        adders[type(value)](key, value)
    shapes = {"token_embd": (rows, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for tensor, shape in (shapes | {f"blk.0.{matrix}": (32, 32) for matrix in matrices}).items():
        writer.add_tensor(f"{tensor}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_of(files: Mapping[str, Path | bytes]) -> Tokenizer:
    source = files["tokenizer.json"]
    return Tokenizer.from_str((source.read_bytes() if isinstance(source, Path) else source).decode())


def tokenizer_json(files: Mapping[str, Path | bytes]) -> bytes:
    source = files["tokenizer.json"]
    assert isinstance(source, bytes)
    return source


def as_file(value: Any, name: str = "tokenizer.json") -> dict[str, Path | bytes]:
    return {name: json.dumps(value).encode()}


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object]) -> dict[str, Path | bytes]:
    """tokenizer.json with a change."""
    value = json.loads(tokenizer.to_str())
    change(value)
    return as_file(value)


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **plain, "special": True, **flags}


def ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    found = {re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", key): value for key, value in metadata.items()}
    return {match[1]: value for match, value in found.items() if match}
