# SPDX-License-Identifier: Apache-2.0
"""Which `tokenizer.ggml.pre` a tokenizer.json needs: found in its structure, not in a digest of its output.

llama.cpp knows how to split text before the merges only by name. Its own converter finds the name in a table of
digests over the encoding of one fixed text, so it knows published vocabularies and fails for a fine-tune with one
added token. What has to agree is the splitting, which tokenizer.json spells out; `PRE_TOKENIZERS`, the reader's
table, says what the names mean, and is read backwards here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lrconvert.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, PreTokenizer
from lrconvert.errors import UnsupportedError, UsageError

# gpt-4o's way with combining marks, named after the encoder that llama.cpp learned it for (PR 22716).
WITH_MARKS = "granite-embed-multi-97m"
# Several names mean the same; these are written.
CANONICAL = ("llama-bpe", "dbrx", "qwen2", "smollm", "gpt-2", "tekken", "gpt-4o", WITH_MARKS, "deepseek-v3", "default")

# Every name that llama.cpp's loader takes for a byte-level BPE vocabulary (src/llama-vocab.cpp of ggml-org/llama.cpp,
# `llama_vocab::impl::load`, read in 2026; older versions know fewer, and refuse the others when loading). Left out are
# names of vocabularies in plain UTF-8 (gemma4, granite-embed-multi-311m, sarvam-moe, whitespace), of encoders, for
# which it adds a separator (jina-v1-en, jina-v2-code, roberta-bpe), and kimi-k2, which has no merges.
_NAMES = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx
    deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1
    falcon3 gigachat glm4 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-97m grok-2 hunyuan
    hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kormo laguna
    lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2
    modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact seed-coder smaug-bpe smollm solar-open spark2_5
    stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking youtu
"""
LLAMA_CPP_NAMES = frozenset(_NAMES.split())

# Other spellings of the same regular expression, with the spelling of the table.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
    (r"\p{N}{1}|", r"\p{N}|"),
)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHOWN = 400  # characters of a pre-tokenizer in a message


def choose(tokenizer: Mapping[str, Any], where: str, override: str | None) -> tuple[str, list[str]]:
    """The name for `tokenizer.ggml.pre`, and notes on what it doesn't say.

    `override` wins over the structure. Raises `UsageError` when llama.cpp doesn't know it, and `UnsupportedError`
    when the structure has no name and there is no override.
    """
    if override is not None and override not in LLAMA_CPP_NAMES:
        raise UsageError(
            f"--tokenizer-pre {override}: llama.cpp has no such pre-tokenizer",
            remedy=f"It has: {', '.join(sorted(LLAMA_CPP_NAMES))}",
        )
    structure = read_structure(tokenizer)
    found = name_of(structure) if structure else None
    if override is None:
        if found is None or structure is None:
            raise UnsupportedError(
                f"{where}: lrconvert knows no llama.cpp name for this pre-tokenizer: {_shown(tokenizer)}",
                remedy="A wrong name would silently give wrong tokens. Known by their structure: "
                f"{', '.join(PRE_TOKENIZERS)}. If you know the right name: --tokenizer-pre NAME",
            )
        return found, _losses(structure, found)
    return override, _contradictions(override, structure, found)


def _contradictions(override: str, structure: PreTokenizer | None, found: str | None) -> list[str]:
    """What has to be said about a name that was asked for."""
    meant = PRE_TOKENIZERS.get(override)
    if meant is not None and structure is not None and _splitting(meant) == _splitting(structure):
        return _losses(structure, override)
    if found is not None:
        return [f"tokenizer.ggml.pre is {override}, as requested, but tokenizer.json splits text as {found} does"]
    return [f"tokenizer.ggml.pre is {override}, as requested; tokenizer.json has a pre-tokenizer without a known name"]


def name_of(structure: PreTokenizer) -> str | None:
    """The canonical name of a structure, None where the table has none. Of names that split alike, one that treats
    whole words alike wins."""
    names = [*CANONICAL, *(name for name in PRE_TOKENIZERS if name not in CANONICAL)]
    alike = [name for name in names if _splitting(PRE_TOKENIZERS[name]) == _splitting(structure)]
    same = [name for name in alike if PRE_TOKENIZERS[name].whole_words == structure.whole_words]
    return next(iter([*same, *alike]), None)


def _splitting(row: PreTokenizer) -> PreTokenizer:
    """What has to be equal. The rest can be said, or matters little, or llama.cpp does without (NFC)."""
    return replace(row, whole_words=False, nfc=False, adds_bos=False)


def _losses(structure: PreTokenizer, name: str) -> list[str]:
    """What llama.cpp does differently under the right name."""
    row, notes = PRE_TOKENIZERS[name], []
    # Expressions that tell small and capital letters apart in ASCII only; most of them have no class for marks either.
    if name == WITH_MARKS:
        notes.append(
            f"llama.cpp's {name} tells small letters from capitals in ASCII only. Versions before May 2026 don't know "
            "it; --tokenizer-pre gpt-4o is for those, which splits words at combining marks"
        )
    elif row.splits in (PRE_TOKENIZERS["tekken"].splits, PRE_TOKENIZERS["gpt-4o"].splits):
        notes.append(f"llama.cpp's {name} splits words at combining marks: text in Indic scripts, for one, differs")
        if row.splits == PRE_TOKENIZERS[WITH_MARKS].splits:
            notes[-1] += f"; --tokenizer-pre {WITH_MARKS} doesn't, in llama.cpp of May 2026 and later"
    if structure.nfc:
        notes.append("tokenizer.json normalises text to NFC, llama.cpp doesn't: text with combining marks may differ")
    if structure.whole_words != row.whole_words:
        takes, leaves = ("llama.cpp", "tokenizer.json") if row.whole_words else ("tokenizer.json", "llama.cpp")
        notes.append(
            f"{takes} takes a word that is in the vocabulary before any merge (ignore_merges), {leaves} doesn't: words "
            "that the merges don't lead to differ"
        )
    return notes


def read_structure(tokenizer: Mapping[str, Any]) -> PreTokenizer | None:
    """tokenizer.json's normalizer, pre_tokenizer and ignore_merges as a row of the table; None for anything
    that a row can't say."""
    nfc = _reads_nfc(tokenizer.get("normalizer"))
    steps = steps_of(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if nfc is None or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    if steps[-1].get("add_prefix_space") is not False:  # llama.cpp puts none before byte-level BPE
        return None
    digits, splits = False, []
    gpt2_words = steps[-1].get("use_regex") is not False  # its default is true
    for step in steps[:-1]:
        if step.get("type") == "Digits" and step.get("individual_digits") is True and not splits and not digits:
            digits = True
        elif (split := _split(step)) is not None:
            splits.append(split)
        else:
            return None
    if splits and splits[-1] == _GPT2_WORDS and not gpt2_words:
        gpt2_words = bool(splits.pop())
    if splits and splits[0] == r"\p{N}" and gpt2_words and not digits:
        digits = bool(splits.pop(0))
    model = tokenizer.get("model")
    whole_words = isinstance(model, dict) and model.get("ignore_merges") is True
    return PreTokenizer(tuple(splits), digits, gpt2_words, whole_words, nfc)


def _reads_nfc(normalizer: Any) -> bool | None:
    """Whether it is NFC (True) or nothing (False); None for any other."""
    kinds = [step.get("type") for step in steps_of(normalizer, "normalizers")]
    return kinds == ["NFC"] if kinds in ([], ["NFC"]) else None


def steps_of(part: Any, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences unrolled."""
    if not part:
        return []
    if not isinstance(part, dict):
        return [{}]
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get(key)
    return [step for item in inner for step in steps_of(item, key)] if isinstance(inner, list) else [{}]


def _split(step: Mapping[str, Any]) -> str | None:
    """The regular expression of a Split that keeps everything, in the table's spelling."""
    pattern = step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    if step.get("type") != "Split" or not isinstance(expression, str):
        return None
    behavior = (step.get("behavior"), step.get("invert", False))
    # One that ends so matches every character: to remove what lies between the matches removes nothing.
    if behavior != ("Isolated", False) and not (behavior == ("Removed", True) and expression.endswith(r"|\s+")):
        return None
    for other, ours in _SPELLINGS:
        expression = expression.replace(other, ours)
    return expression


def _shown(tokenizer: Mapping[str, Any]) -> str:
    parts = {key: tokenizer.get(key) for key in ("normalizer", "pre_tokenizer")}
    text = json.dumps(parts)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
