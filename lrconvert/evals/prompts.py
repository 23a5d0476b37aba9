# SPDX-License-Identifier: Apache-2.0
"""Prompts and answers as tokens, by the convention of lm-eval's own Hugging Face adapter.

Spaces at the end of a prompt belong to the answer; prompt and answer are read as one text, which is cut where the
prompt's own tokens end. Special tokens are those that the template in tokenizer.json adds; transformers 5 asks nothing
else, whatever `add_bos_token` says. Behind an empty prompt the answer follows BOS, or EOS where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.checkpoint import open_checkpoint
from lrconvert.checkpoint.tokenizer import read_tokenizer
from lrconvert.errors import InputError

CHUNK = 1024  # texts encoded at once: what the tokenizer returns is many times larger than the ids


@dataclass(frozen=True)
class Row:
    """A prompt with an answer: all tokens (int32), and how many of them, at the end, are the answer's."""

    tokens: np.ndarray
    judged: int

    @classmethod
    def of(cls, tokens: Sequence[int], judged: int) -> Row:
        return cls(np.array(tokens, dtype=np.int32), judged)

    def within(self, window: int) -> Row:
        """The same, without the first tokens of the prompt where it is longer than `window` tokens."""
        if self.judged >= window:
            raise InputError(f"an answer of {self.judged} tokens does not fit into a window of {window}")
        return Row(self.tokens[-window:], self.judged)


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer, and the token before an answer without prompt (None: the tokenizer has none)."""

    tokenizer: Any
    prefix: int | None = None

    @classmethod
    def of(cls, artifact: Path) -> PromptTokenizer:
        """The artifact's tokenizer, for any format. `InputError` where it has none."""
        tokenizer, config = read_tokenizer(artifact), _tokenizer_config(artifact)
        for name in ("bos_token", "eos_token"):
            value = config.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            found = tokenizer.token_to_id(text) if isinstance(text, str) else None
            if found is not None:
                return cls(tokenizer, found)
        return cls(tokenizer)

    def encode(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """The ids (int32) of every text, special tokens included; each text is read once."""
        start = None if self.prefix is None else self.tokenizer.id_to_token(self.prefix)
        marked: dict[bool, list[str]] = {True: [], False: []}
        for text in dict.fromkeys(texts):
            marked[start is not None and text.startswith(start)].append(text)
        # What begins with the token gets no second one.
        return dict(self._batches(marked[False], special=True)) | dict(self._batches(marked[True], special=False))

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Every (prompt, answer) as a row with at least one token before the answer's.

        Raises `InputError` for an answer that has no tokens of its own.
        """
        moved = [_with_spaces_moved(*pair) for pair in pairs]
        found = self.encode(text for prompt, answer in moved if prompt for text in (prompt, prompt + answer))
        bare = dict(self._batches([answer for prompt, answer in moved if not prompt], special=False))
        rows = []
        for prompt, answer in moved:
            if prompt:
                row = Row(found[prompt + answer], len(found[prompt + answer]) - len(found[prompt]))
            else:
                row = self._behind_prefix(bare[answer])
            if not 0 < row.judged < len(row.tokens):
                raise InputError(f"the answer {answer[:80]!r} has no tokens of its own after its prompt")
            rows.append(row)
        return rows

    def _behind_prefix(self, answer: np.ndarray) -> Row:
        if self.prefix is None:
            raise InputError("an empty prompt needs a token to start from; the tokenizer has neither BOS nor EOS")
        if len(answer) and answer[0] == self.prefix:
            return Row(answer, len(answer) - 1)
        return Row.of([self.prefix, *answer], len(answer))

    def _batches(self, texts: Sequence[str], *, special: bool) -> Iterable[tuple[str, np.ndarray]]:
        for start in range(0, len(texts), CHUNK):
            part = list(texts[start : start + CHUNK])
            for text, encoding in zip(
                part, self.tokenizer.encode_batch_fast(part, add_special_tokens=special), strict=True
            ):
                yield text, np.array(encoding.ids, dtype=np.int32)


def _with_spaces_moved(prompt: str, answer: str) -> tuple[str, str]:
    kept = prompt.rstrip()
    return kept, prompt[len(kept) :] + answer


def _tokenizer_config(artifact: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, beside special_tokens_map.json, which older folders have alone."""
    files, found = open_checkpoint(artifact, tolerant=True).side_files(), {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        source = files.get(name, b"{}")
        try:
            values = json.loads(source.read_bytes() if isinstance(source, Path) else source)
        except (OSError, ValueError) as error:
            raise InputError(f"{artifact}: {name} can't be read ({error})") from error
        if isinstance(values, dict):
            found |= {key: value for key, value in values.items() if value is not None}
    return found
