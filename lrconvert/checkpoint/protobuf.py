# SPDX-License-Identifier: Apache-2.0
"""The fields of a protocol-buffer message, as far as a tokenizer.model needs it."""

from __future__ import annotations

from collections.abc import Iterator


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of every field of a protocol-buffer message: an int, or the bytes of anything else. `ValueError`
    for a message that is cut off or damaged."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire = key >> 3, key & 7
        if wire == 0:
            number, position = _varint(data, position)
            yield field, number
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if length > len(data) - position:
            raise ValueError(f"cut off at byte {position}")
        yield field, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError(f"cut off at byte {position}")
        byte = data[position]
        value |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return value, position
    raise ValueError(f"a number of more than ten bytes at byte {position}")
