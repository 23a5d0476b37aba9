# SPDX-License-Identifier: Apache-2.0
"""Tokens and keys are found wherever they hide: escaped in JSON, in the headers of weights, in a graph."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file
from support import gguf_files
from support.gguf_files import f32

from lrconvert.artifact.redaction import secrets_beside, secrets_in

TOKEN = "hf_" + "aB3" * 12
FOUND = ["a Hugging Face token"]


@pytest.mark.parametrize("before", ["", " ", "\n", "\t", "key=", "\u2028", "é"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_in_a_text_of_json_as_it_is_and_escaped(before: str, ascii_only: bool) -> None:
    """A line's end is spelled \\n there, whose n would be one word with a token."""
    text = json.dumps({"a": [{"b": f"x{before or ' '}{TOKEN}"}]}, ensure_ascii=ascii_only)
    assert secrets_in(text.encode()) == FOUND


def test_other_spellings_of_json() -> None:
    spelled = TOKEN.replace("h", "\\u0068").replace("_", "\\u005F")
    assert secrets_in(f'{{"a": "{spelled}"}}'.encode()) == FOUND
    assert secrets_in(rb'{"a": "https:\/\/me:secret@host\/x"}') == ["a password in an address"]
    assert secrets_in(TOKEN.encode() * 2) == FOUND  # once for each kind


def test_no_part_of_a_word_is_a_token() -> None:
    assert secrets_in(f"x{TOKEN} hf_short AKIA sk-learn https://host/a:b@c".encode()) == []


def in_safetensors(path: Path, text: str) -> Path:
    save_file({"a": np.zeros(4, np.float32)}, path / "a.safetensors", metadata={"settings": text})
    return path / "a.safetensors"


def in_gguf(path: Path, text: str) -> Path:
    made = path / "a.gguf"
    gguf_files.write_gguf(made, {"general.architecture": "llama", "general.description": text}, {"a": f32(np.ones(8))})
    return made


def in_graph(path: Path, text: str) -> Path:
    node = onnx.helper.make_node("Identity", ["a"], ["b"], doc_string=text)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    (path / "a.onnx").write_bytes(model.SerializeToString())
    return path / "a.onnx"


@pytest.mark.parametrize("write", [in_safetensors, in_gguf, in_graph])
@pytest.mark.parametrize("length", [0, 60, 71, 100])
def test_beside_the_numbers_of_a_binary_file(write: Callable[[Path, str], Path], tmp_path: Path, length: int) -> None:
    """A text's length stands before it, and may look like a letter."""
    assert secrets_beside(write(tmp_path, TOKEN + " " * length)) == FOUND
    assert secrets_beside(write(tmp_path, "nothing")) == []


def test_numbers_are_not_looked_through(tmp_path: Path) -> None:
    """What weights happen to spell is no token; headers that lie about their length are read as far as they go."""
    values = np.frombuffer(TOKEN.ljust(40).encode(), np.float32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    assert secrets_beside(tmp_path / "a.safetensors") == []
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"x")
    assert secrets_beside(tmp_path / "b.safetensors") == []
